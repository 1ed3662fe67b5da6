import json

import pytest

from tuner.engines.protocol import Endpoint
from tuner.errors import EnvironmentFault
from tuner.verify.lmeval import evaluate


def test_lm_eval_is_called_on_the_running_server_and_its_results_are_read(tmp_path):
    seen = []

    def run(command, environment):
        seen.append((list(command), environment["OPENAI_API_KEY"]))
        results = {
            "results": {"gsm8k": {"alias": "gsm8k", "exact_match,strict": 0.52, "exact_match_stderr,strict": 0.01}}
        }
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "results_2026.json").write_text(json.dumps(results))
        return 0

    endpoint = Endpoint("http://127.0.0.1:8000", "m", "key", "/models/m")
    assert evaluate(endpoint, ["gsm8k"], tmp_path, limit=50, run=run) == {"gsm8k/exact_match": 0.52}
    command, key = seen[0]
    assert key == "key"
    arguments = command[command.index("--model_args") + 1]
    assert "base_url=http://127.0.0.1:8000/v1/completions" in arguments and "tokenizer=/models/m" in arguments
    assert command[command.index("--limit") + 1] == "50"


def test_a_failed_run_is_an_error_of_the_environment(tmp_path):
    with pytest.raises(EnvironmentFault, match="status 1"):
        evaluate(Endpoint("http://127.0.0.1:8000", "m"), ["gsm8k"], tmp_path, run=lambda _c, _e: 1)


def test_without_lm_eval_the_fix_is_a_command(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFault) as caught:
        evaluate(Endpoint("http://127.0.0.1:8000", "m"), ["gsm8k"], tmp_path)
    assert "pip install" in caught.value.fix
