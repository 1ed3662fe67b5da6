"""The emulator as a process answers as vLLM does: what a client of the real server relies on."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tuner.engines.vllmlog import DIALECT
from tuner.server.bootlog import BootLog

ROOT = Path(__file__).parents[2]
KEY = "k-123"


class Process:
    """An emulator on a free port."""

    def __init__(self, model: str, log: Path, *words: str, options: str = '{"boot_scale": 0}') -> None:
        held = socket.socket()  # bound until the emulator has it, so that nobody else gets it meanwhile
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        self.port = held.getsockname()[1]
        argv = [sys.executable, "-m", "tuner.engines.emulator", "--model", model, "--host", "127.0.0.1"]
        argv += ["--port", str(self.port), "--served-model-name", "m", "--api-key", KEY, "--max-model-len", "2048"]
        argv += ["--emulator", options, *words]
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(argv, cwd=ROOT, stdout=out, stderr=out)
        deadline = time.monotonic() + 120
        with held:
            while self.process.poll() is None and time.monotonic() < deadline:
                try:
                    if self.get("/health")[0] == 200:
                        return
                except OSError:
                    time.sleep(0.02)
        self.end()
        raise AssertionError(log.read_text())

    def ask(self, method: str, path: str, body: Any = None, key: str = KEY) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = json.dumps(body) if body is not None else None
        try:
            connection.request(method, path, data, {"Authorization": f"Bearer {key}"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def get(self, path: str, key: str = KEY) -> tuple[int, str]:
        return self.ask("GET", path, key=key)

    def complete(self, **body: Any) -> dict[str, Any]:
        status, text = self.ask("POST", "/v1/completions", {"model": "m", "prompt": [1, 2, 3, 4], **body})
        assert status == 200, text
        return json.loads(text)

    def stream(self, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
        prompt = {} if "messages" in body else {"prompt": [1, 2, 3, 4]}
        status, text = self.ask("POST", path, {"model": "m", "stream": True, **prompt, **body})
        assert status == 200, text
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    from tests.engines.conftest import LLAMA_8B

    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    process = Process(str(folder), folder / "log", options='{"boot_scale": 0, "noise": {"stalls_per_s": 0}}')
    yield process
    process.end()


def test_a_forced_stream_has_exactly_the_tokens_asked_for(server: Process) -> None:
    events = server.stream(
        max_tokens=7, min_tokens=7, ignore_eos=True, return_token_ids=True, stream_options={"include_usage": True}
    )
    *chunks, last = events

    assert [len(e["choices"][0]["token_ids"]) for e in chunks] == [1] * 7
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [1, 2, 3, 4]
    assert [e["choices"][0]["finish_reason"] for e in chunks] == [None] * 6 + ["length"]
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 4, "total_tokens": 11, "completion_tokens": 7}


def test_running_usage_counts_up(server: Process) -> None:
    events = server.stream(max_tokens=3, ignore_eos=True, stream_options={"continuous_usage_stats": True})

    assert [e["usage"]["completion_tokens"] for e in events] == [1, 2, 3]


def test_the_first_chat_chunk_carries_the_role_and_no_token(server: Process) -> None:
    messages = [{"role": "user", "content": "hello"}]
    events = server.stream(
        "/v1/chat/completions", messages=messages, max_tokens=3, ignore_eos=True, return_token_ids=True
    )

    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert sum(len(e["choices"][0].get("token_ids", [])) for e in events) == 3


def test_free_outputs_end_by_themselves(server: Process) -> None:
    answers = [server.complete(prompt=[i, i + 1], max_tokens=1500)["choices"][0]["finish_reason"] for i in range(4)]

    assert "stop" in answers


def test_prompt_log_probabilities_have_vllms_form(server: Process) -> None:
    choice = server.complete(max_tokens=1, temperature=0, prompt_logprobs=3)["choices"][0]
    first, *rest = choice["prompt_logprobs"]

    assert first is None
    assert len(rest) == 3
    for token, entry in zip([2, 3, 4], rest, strict=True):
        assert str(token) in entry
        assert sorted(v["rank"] for k, v in entry.items() if k != str(token)) == [1, 2, 3][: len(entry) - 1]


def test_greedy_answers_are_the_likeliest_tokens_and_repeat(server: Process) -> None:
    one, two = (
        server.complete(max_tokens=5, temperature=0, logprobs=1, ignore_eos=True, return_token_ids=True)
        for _ in range(2)
    )
    choice = one["choices"][0]

    assert choice["token_ids"] == two["choices"][0]["token_ids"]
    for token, top in zip(choice["token_ids"], choice["logprobs"]["top_logprobs"], strict=True):
        assert f"token_id:{token}" == max(top, key=top.get)


def test_several_prompts_in_one_request_are_several_choices(server: Process) -> None:
    answer = server.complete(prompt=[[1, 2], [3, 4, 5]], max_tokens=2, ignore_eos=True)

    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 9, "completion_tokens": 4}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "nope", "prompt": [1]}, 404, "The model `nope` does not exist"),
        ({"model": "m", "prompt": [1], "max_tokens": 5000}, 400, "cannot be greater than max_model_len=2048"),
        ({"model": "m", "prompt": [1] * 2000, "max_tokens": 100}, 400, "maximum context length is 2048 tokens"),
        ({"model": "m"}, 400, "validation error"),
    ],
)
def test_what_vllm_refuses_is_refused(server: Process, body: dict, status: int, words: str) -> None:
    got, text = server.ask("POST", "/v1/completions", body)

    assert (got, words in text) == (status, True), text


def test_only_the_key_opens_the_api_and_nobody_needs_it_for_health(server: Process) -> None:
    assert server.get("/v1/models", key="wrong")[0] == 401
    assert server.get("/health", key="wrong")[0] == 200
    assert json.loads(server.get("/v1/models")[1])["data"][0]["id"] == "m"


def value(server: Process, name: str) -> float:
    text = server.get("/metrics")[1]
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"vllm:{name}{{"))


def test_metrics_have_vllms_names_and_count(server: Process) -> None:
    before = value(server, "generation_tokens_total")
    server.complete(max_tokens=9, ignore_eos=True)

    assert value(server, "generation_tokens_total") == before + 9
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"):
        assert f"vllm:{name}{{" in server.get("/metrics")[1]


def test_a_client_that_hangs_up_is_forgotten(server: Process) -> None:
    before = value(server, "generation_tokens_total")
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        body = json.dumps({"model": "m", "prompt": [1], "max_tokens": 2000, "ignore_eos": True, "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall((head + body).encode())
        got = b""
        while got.count(b"data: ") < 3:  # it runs
            got += (more := client.recv(4096))
            assert more
    while value(server, "num_requests_running"):
        time.sleep(0.05)
    assert value(server, "generation_tokens_total") < before + 2000, "it ran to its end though its client was gone"


def test_tokenize_and_detokenize(server: Process) -> None:
    tokens = json.loads(server.ask("POST", "/tokenize", {"model": "m", "prompt": "hello world"})[1])
    back = json.loads(server.ask("POST", "/detokenize", {"model": "m", "tokens": tokens["tokens"]})[1])

    assert tokens["count"] == len(tokens["tokens"]) > 0
    assert back["prompt"]


def test_the_log_is_understood_by_the_dialect_of_vllm(model: str, tmp_path: Path) -> None:
    process = Process(model, tmp_path / "log")
    process.process.send_signal(signal.SIGTERM)
    assert process.process.wait(60) == 0
    log = BootLog(DIALECT, 0.0)
    log.feed((tmp_path / "log").read_text().splitlines(), 1.0)
    boot = log.boot(1.0)

    assert list(boot.phases_s) == ["imports", "config", "engine", "weights", "compile", "kv", "warmup", "graphs", "api"]
    assert boot.facts["weights_bytes"] == pytest.approx(16.06e9, rel=0.01)
    assert boot.facts["kv_cache_tokens"] / boot.facts["max_concurrency"] == pytest.approx(2048, rel=0.01)
    assert {"compile_s", "graph_capture_s", "kv_cache_bytes", "init_s"} <= boot.facts.keys()


def test_start_up_takes_the_time_it_says_unless_it_is_scaled(model: str, tmp_path: Path) -> None:
    began = time.monotonic()
    Process(model, tmp_path / "log", options='{"boot_scale": 0.05}').end()

    assert 1.5 < time.monotonic() - began < 40  # about 43 s x 0.05, and what a busy machine takes to start Python


def test_a_model_whose_layers_are_not_known_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba2", "hidden_size": 64}')
    argv = [sys.executable, "-m", "tuner.engines.emulator", "--model", str(tmp_path), "--emulator", '{"boot_scale": 0}']
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert (done.returncode, done.stderr.count("\n"), "Traceback" in done.stdout) == (2, 1, False)
    assert f"{tmp_path}/config.json: tuner does not know this architecture: mamba2" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--no-such-flag", "1"], "error: unrecognized arguments: --no-such-flag 1"),
        (["--max-num-seqs"], "error: argument --max-num-seqs: expected one argument"),
        (["--kv-cache-dtype", "fp3"], "error: argument --kv-cache-dtype: invalid choice: 'fp3'"),
        (["--fault", "nonsense"], "error: unknown fault 'nonsense'"),
        (["--gpu", "Voodoo"], "does not know the GPU"),
    ],
)
def test_a_bad_command_line_ends_as_argparse_ends(words: list[str], says: str, model: str) -> None:
    argv = [sys.executable, "-m", "tuner.engines.emulator", "--model", model, *words]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert done.returncode == 2
    assert says in done.stderr
