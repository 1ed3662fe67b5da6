"""The published traces go out as they are: every prompt in its full length, every output as long as it was."""

from pathlib import Path

import numpy as np
import pytest

from tests.load.replays import endpoint, plan
from tests.load.stub import stub
from tuner.load import formats, windows
from tuner.load.records import read
from tuner.load.step import measure

SHARED = Path(__file__).parents[2] / "../shared/traces"


@pytest.mark.parametrize(
    ("name", "arrivals"),
    [
        ("azure_llm_2023_code.csv", None),
        ("azure_llm_2023_conv.csv", None),
        ("mooncake_fast25_conversation.first4000.jsonl", None),  # prompts of up to 100,000 tokens that share prefixes
        ("vidur_arxiv_lengths.first1000.csv", "poisson:30"),  # lengths only
    ],
)
def test_a_real_trace_replays(tmp_path, name, arrivals):
    path = SHARED / name
    if not path.exists():
        pytest.skip("the shared traces are not beside the repository")
    trace = windows.cut(formats.read_with_report(path, arrivals=arrivals)[0], 0, 10)
    with stub(first_s=0.0, gap_s=0.0, glue=64) as (_, url):
        asked = plan(tmp_path, trace, load=max(1.0, 4 * float(trace.arrival_s[-1])))
        metrics = measure(endpoint(url), asked).metrics
    columns = read(asked.records).columns
    order = np.argsort(columns["request"])
    assert metrics["error_rate"] == 0 and len(order) == 10
    assert (columns["prompt_tokens"][order] == trace.input_tokens).all()  # as the server counted them
    assert (columns["output_tokens"][order] == trace.output_tokens).all()
