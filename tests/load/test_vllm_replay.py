"""The replay against a real vLLM: the prefix cache earns its true hit rate, and both sides count the same."""

import os
import socket
import subprocess
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests import real
from tests.load.replays import plan
from tuner.engines.protocol import Endpoint
from tuner.load import formats, synth, windows
from tuner.load.records import read
from tuner.load.sharing import shared_tokens
from tuner.load.step import measure
from tuner.load.trace import Trace
from tuner.measure.server import beside
from tuner.spec.facts import of_machine

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
BLOCK = 32


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """The endpoint of a vLLM with prefix caching in blocks of 32 tokens, started once for this module."""
    python, model = real.vllm(), real.model()
    held = socket.socket()  # bound until the server has it, so that nobody else gets it meanwhile
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        held.setsockopt(socket.SOL_SOCKET, option, 1)
    held.bind(("127.0.0.1", 0))
    port = held.getsockname()[1]
    dtype = of_machine()["native_dtype"]
    flags = f"--load-format dummy --dtype {dtype} --max-model-len 4096 --enforce-eager --block-size {BLOCK}"
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, "--port", str(port), *flags.split()], stdout=out, stderr=out, env=environment
        )
    try:
        deadline = time.monotonic() + 500
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"vLLM did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.5)
        held.close()
        yield Endpoint(f"http://127.0.0.1:{port}", model, tokenizer=model)
    finally:
        held.close()
        server.terminate()
        try:
            server.wait(60)
        finally:
            server.kill()


def shared_prefixes(groups: int = 6, each: int = 8) -> Trace:
    """Requests of 400 tokens, of which the first 256 are their group's."""
    n, width = groups * each, 13  # 13 blocks of 32 tokens: 8 of the group, 5 of the request
    ids = [
        [g * 1000 + b if b < 8 else 10**6 + i * 100 + b for b in range(width)]
        for i, g in enumerate(list(range(groups)) * each)
    ]
    return Trace(
        "groups", np.arange(n) / 4.0, np.full(n, 400), np.full(n, 12), BLOCK, np.array(ids).ravel(),
        np.arange(n + 1) * width,
    )  # fmt: skip


def conversation() -> Trace:
    """Production conversations, a sixteenth as long."""
    path = ROOT / "../shared/traces/mooncake_fast25_conversation.first4000.jsonl"
    if not path.exists():
        pytest.skip("the shared traces are not beside the repository")
    trace = synth.scale(formats.read(path), length=BLOCK / 512, max_input_tokens=1_500, max_output_tokens=12)
    return windows.cut(trace, 0, 90)


@pytest.mark.parametrize("make", [shared_prefixes, conversation])
def test_the_prefix_cache_earns_the_traces_own_sharing_rate(vllm, tmp_path, make):
    trace = make()
    asked = plan(tmp_path, trace, request_timeout_s=120.0, window=make.__name__)
    step = measure(vllm, asked)
    m = step.metrics
    truth = shared_tokens(trace, engine_block_tokens=BLOCK).sum() / trace.input_tokens.sum()
    assert m["server_prefix_hit_rate"] == pytest.approx(truth, abs=0.02)
    assert m["error_rate"] == 0 and m["output_share"] == 1
    # token ids, forced lengths and the running count were all understood
    assert read(asked.records).meta["dialect"]["counting"] == "usage"
    assert m["client_output_tokens"] == m["server_output_tokens"] == trace.output_tokens.sum()
    assert m["server_prompt_tokens"] == trace.input_tokens.sum()
    prompts = read(asked.records).columns["prompt_tokens"]
    assert (prompts[np.argsort(read(asked.records).columns["request"])] == trace.input_tokens).all()
    # the server's own TTFT leaves out only the way to its front end
    assert 0 <= m["client_ttft_mean_s"] - m["server_ttft_mean_s"] < 0.2 + 0.05 * m["server_ttft_mean_s"]
    assert not [reason for reason in step.untrusted if "server" in reason or "prefix" in reason]
    assert beside(asked.records).exists()


def test_the_same_prompts_again_are_found_out(vllm, tmp_path):
    """A second replay with the same seed meets its own prompts in the cache: a hit rate that no user would see."""
    trace = shared_prefixes()
    measure(vllm, plan(tmp_path, trace, seed=5))
    again = measure(vllm, plan(tmp_path, trace, seed=5))
    assert again.metrics["server_prefix_hit_rate"] > 0.8
    assert any("seen these prompts before" in reason for reason in again.untrusted)
    other = measure(vllm, plan(tmp_path, trace, seed=6))
    assert not any("prompts" in reason for reason in other.untrusted)


def test_a_cache_that_was_filled_holds_what_came_before(vllm, tmp_path):
    """Each group's prefix is found at its first request too, to the block."""
    trace = shared_prefixes()
    window = replace(windows.cut(trace, 24, 48), earlier=windows.cut(trace, 0, 24))
    step = measure(vllm, plan(tmp_path, window, request_timeout_s=120.0, window="filled"))
    truth = shared_tokens(window, engine_block_tokens=BLOCK).sum() / window.input_tokens.sum()
    alone = shared_tokens(replace(window, earlier=None), engine_block_tokens=BLOCK).sum() / window.input_tokens.sum()
    assert step.metrics["server_prefix_hit_rate"] == pytest.approx(truth, abs=0.005) and truth > alone + 0.05
    assert step.metrics["client_output_tokens"] == step.metrics["server_output_tokens"]
    assert (step.metrics["fill_requests"], step.metrics["fill_failures"]) == (24, 0)
    assert not [reason for reason in step.untrusted if "server" in reason or "prefix" in reason]
