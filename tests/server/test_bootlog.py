"""Phases and facts are read from logs as vLLM and SGLang write them."""

import re
from pathlib import Path

import pytest

from tuner.engines.sglang import DIALECT as SGLANG
from tuner.engines.vllmlog import DIALECT as VLLM
from tuner.server.bootlog import GIB, LINE, BootLog, Dialect, Fact, LogFile

CPU_032 = """\
(APIServer pid=1) INFO 11-23 19:13:39 [api_utils.py:286] non-default args: {'host': '127.0.0.1', 'port': 8123}
(APIServer pid=1) INFO 11-23 19:13:49 [model.py:2152] Using max model len 4096
(EngineCore pid=2) INFO 11-23 19:13:56 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='tiny'
(Worker pid=3) INFO 11-23 19:14:04 [cpu_model_runner.py:68] Starting to load model tiny...
(Worker pid=3) INFO 11-23 19:14:05 [cpu_worker.py:260] Explicitly set (1.0/11.34) GiB for KV cache on node 0.
(EngineCore pid=2) INFO 11-23 19:14:05 [kv_cache_utils.py:2327] CPU KV cache size: 131,072 tokens, Maximum concurrency \
for 4,096 tokens per request: 32.00x
(EngineCore pid=2) INFO 11-23 19:14:08 [core.py:402] init engine (profile, create kv cache, warmup model) took 3.33 s
INFO:     Application startup complete.
"""
# Line formats of vLLM's sources (gpu_model_runner.py, gpu_worker.py, kv_cache_utils.py, monitor.py, core.py).
CUDA = """\
INFO 05-06 20:59:01 [utils.py:253] non-default args: {'model': 'm'}
(EngineCore_DP0 pid=9) INFO 05-06 20:59:10 [core.py:82] Initializing a V1 LLM engine (v0.25.1) with config: model='m'
(EngineCore_DP0 pid=9) INFO 05-06 20:59:12 [gpu_model_runner.py:3007] Starting to load model m...
(EngineCore_DP0 pid=9) INFO 05-06 20:59:37 [default_loader.py:384] Loading weights took 24.84 seconds
(EngineCore_DP0 pid=9) INFO 05-06 20:59:39 [gpu_model_runner.py:3067] Model loading took 12.66 GiB memory and \
31.657031 seconds
(EngineCore_DP0 pid=9) INFO 05-06 20:59:47 [backends.py:1128] Dynamo bytecode transform time: 3.54 s
(EngineCore_DP0 pid=9) INFO 05-06 20:59:58 [monitor.py:34] torch.compile took 14.20 s in total
(EngineCore_DP0 pid=9) INFO 05-06 20:59:59 [gpu_worker.py:298] Available KV cache memory: 53.21 GiB
(EngineCore_DP0 pid=9) INFO 05-06 20:59:59 [kv_cache_utils.py:1087] GPU KV cache size: 1,245,184 tokens
(EngineCore_DP0 pid=9) INFO 05-06 20:59:59 [kv_cache_utils.py:1091] Maximum concurrency for 8,192 tokens per request: \
152.00x
Capturing CUDA graphs (mixed prefill-decode, PIECEWISE): 100%|##########| 51/51
(EngineCore_DP0 pid=9) INFO 05-06 21:00:05 [gpu_model_runner.py:3480] Graph capturing finished in 6 secs, took 0.52 GiB
(EngineCore_DP0 pid=9) INFO 05-06 21:00:05 [core.py:210] init engine (profile, create kv cache, warmup model) took \
26.11 seconds
"""
SGL = """\
[2026-01-15 13:56:21] server_args=ServerArgs(model_path='m', chunked_prefill_size=8192, port=30000)
[2026-01-15 13:56:30 TP0] Load weight begin. avail mem=131.08 GB
[2026-01-15 13:56:49 TP0] Load weight end. type=Qwen3ForCausalLM, dtype=torch.bfloat16, avail mem=29.92 GB, \
mem usage=30.67 GB.
[2026-01-15 13:56:49 TP0] KV Cache is allocated. #tokens: 192896, K size: 8.84 GB, V size: 8.84 GB
[2026-01-15 13:56:49 TP0] Capture cuda graph begin. This can take up to several minutes. avail mem=11.91 GB
[2026-01-15 13:57:00 TP0] Capture cuda graph end. Time elapsed: 11.39 s. mem usage=1.00 GB. avail mem=11.17 GB.
[2026-01-15 13:57:01 TP0] max_total_num_tokens=192896, chunked_prefill_size=8192, max_running_requests=2048
INFO:     Uvicorn running on http://127.0.0.1:30000
"""
# SGLang 0.5.23 on a CPU; the line of the graphs is that of its sources (cuda_graph_setup.py), as no GPU was at hand.
SGL_0523 = """\
[2026-11-25 20:38:10] Cuda graph is disabled because of using torch native attention backend
[2026-11-25 20:38:18] server_args={'model_path': 'm', 'tokenizer_mode': 'auto', 'load_format': 'dummy'}
[2026-11-25 20:38:51] Init parallel begin.
[2026-11-25 20:38:56] Load weight begin. avail mem=19.99 GB
[2026-11-25 20:38:57] Load weight end. elapsed=0.42 s, type=Qwen3ForCausalLM, avail mem=19.92 GB, mem usage=0.06 GB.
[2026-11-25 20:38:58] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 8192, K size: 0.03 GB, V size: 0.03 GB
[2026-11-25 20:38:58] Memory pool end. avail mem=19.82 GB
[2026-11-25 20:38:58] Capture target decode CUDA graph end. bs=[1, 2, 4], elapsed=11.39 s, mem usage=1.00 GB, \
avail mem=11.17 GB.
[2026-11-25 20:38:58] max_total_num_tokens=8192, chunked_prefill_size=4096, max_prefill_tokens=16384, \
max_running_requests=2048, context_len=4096, available_cpu_mem=19.82 GB
[2026-11-25 20:38:59] INFO:     Application startup complete.
[2026-11-25 20:39:03] The server is fired up and ready to roll!
"""


def read(dialect: Dialect, text: str) -> BootLog:
    """Feeds one line per second."""
    log = BootLog(dialect, 0.0)
    for second, line in enumerate(text.splitlines(), start=1):
        log.feed([line], float(second))
    return log


def test_vllm_on_a_cpu():
    log = read(VLLM, CPU_032)
    assert list(log.boot(9.0).phases_s) == ["imports", "config", "engine", "weights", "kv", "warmup", "api"]
    assert log.boot(9.0).facts == {
        "max_model_len": 4096,
        "kv_cache_bytes": 2**30,
        "kv_cache_tokens": 131072,
        "max_concurrency": 32,
        "init_s": 3.33,
    }


def test_vllm_on_cuda():
    boot = read(VLLM, CUDA).boot(20.0)
    assert list(boot.phases_s) == [
        "imports", "config", "engine", "weights", "compile", "kv", "warmup", "graphs", "api",
    ]  # fmt: skip
    assert boot.facts["weights_bytes"] == 12.66 * 2**30
    assert boot.facts["kv_cache_tokens"] == 1245184
    assert boot.facts["kv_cache_bytes"] == 53.21 * 2**30
    assert (boot.facts["compile_s"], boot.facts["graph_capture_s"], boot.facts["init_s"]) == (14.2, 6, 26.11)
    assert boot.facts["max_concurrency"] == 152


def test_sglang():
    boot = read(SGLANG, SGL).boot(20.0)
    assert list(boot.phases_s) == ["imports", "engine", "weights", "kv", "graphs", "api", "warmup"]
    assert boot.facts["kv_cache_tokens"] == 192896
    assert boot.facts["weights_bytes"] == 30.67 * 2**30
    assert boot.facts["max_num_seqs"] == 2048


def test_the_sglang_of_today():
    boot = read(SGLANG, SGL_0523).boot(20.0)
    assert list(boot.phases_s) == ["imports", "engine", "weights", "kv", "graphs", "api", "warmup"]
    assert boot.facts == {
        "weights_load_s": 0.42,
        "weights_bytes": 0.06 * 2**30,
        "kv_cache_tokens": 8192,
        "graph_capture_s": 11.39,
        "graph_bytes": 2**30,
        "max_num_batched_tokens": 4096,
        "max_num_seqs": 2048,
        "free_bytes": 19.82 * 2**30,
    }


def test_phases_last_from_their_line_to_the_next_and_sum_to_the_whole():
    boot = read(VLLM, CPU_032).boot(10.0)
    assert boot.phases_s["imports"] == 1.0  # the first line came at 1 s
    assert boot.phases_s["config"] == 2.0
    assert sum(boot.phases_s.values()) == boot.total_s == 10.0


def test_a_phase_never_goes_back():
    log = BootLog(VLLM, 0.0)
    log.feed(["GPU KV cache size: 10 tokens", "Starting to load model draft..."], 1.0)
    assert log.phase == "warmup"


def test_the_first_worker_to_say_a_fact_is_believed():
    log = BootLog(VLLM, 0.0)
    log.feed(["Model loading took 10.0 GiB memory and 1.0 seconds", "Model loading took 99.0 GiB memory and 1 s"], 1.0)
    assert log.boot(2.0).facts["weights_bytes"] == 10 * 2**30


def test_a_growing_log_is_read_in_whole_lines_and_progress_bars_count_as_lines(tmp_path):
    path = tmp_path / "server.log"
    log = LogFile(path)
    assert log.new_lines() == []
    path.write_bytes(b"one\ntw")
    assert log.new_lines() == ["one"]
    path.write_bytes(b"one\ntwo\n 10%\r 20%\rthr")
    assert log.new_lines() == ["two", " 10%", " 20%"]


def test_a_huge_log_is_read_from_both_ends(tmp_path):
    path = tmp_path / "server.log"
    path.write_text("first\n" + "x" * (6 * 2**20) + "\nlast\n")
    text = LogFile(path).text()
    assert text.startswith("first") and text.endswith("last\n") and len(text) < 5 * 2**20


def test_facts_read_thousands_separators():
    dialect = Dialect("d", (("start", re.compile(r"(?!)")),), (Fact("n", re.compile(r"n=([\d,.]+)"), 2.0),))
    log = BootLog(dialect, 0.0)
    log.feed(["n=1,234.5"], 1.0)
    assert log.boot(1.0).facts == {"n": 2469.0}


LOGS = Path(__file__).parent / "logs"


def logged(name: str) -> str:
    """The log of a real launch on an H100, without the lines of its requests."""
    return (LOGS / f"vllm-0.25.1-h100-{name}.log").read_text(encoding="utf-8")


def test_a_real_start_on_an_h100_is_read():
    boot = read(VLLM, logged("default")).boot(60.0)
    assert list(boot.phases_s) == ["imports", "config", "engine", "weights", "compile", "kv", "warmup", "graphs", "api"]
    facts = {"max_model_len": 16384, "max_num_batched_tokens": 8192, "model_load_s": 1.526915, "compile_s": 24.7}
    facts |= {"kv_cache_tokens": 408_256, "max_concurrency": 24.92, "graph_capture_s": 5, "init_s": 49.78}
    facts |= {"weights_bytes": 15.27 * GIB, "kv_cache_bytes": 56.07 * GIB, "graph_bytes": GIB}
    assert boot.facts == pytest.approx(facts)


def test_a_real_start_with_a_draft_model_is_read_and_its_late_compilations_are_recognised():
    text = logged("draft")
    boot = read(VLLM, text).boot(90.0)
    assert list(boot.phases_s) == ["imports", "config", "engine", "weights", "compile", "kv", "warmup", "graphs", "api"]
    assert boot.facts["kv_cache_tokens"] == 453_696 and boot.facts["init_s"] == 118.18
    late = [found.group(1) for line in text.splitlines() if (found := VLLM.cold.search(line))]
    assert late[-1] == "eagle_prepare_inputs_padded_kernel" and len(late) >= 4


def test_a_line_that_comes_in_pieces_is_one_and_a_long_one_is_cut(tmp_path: Path):
    path = tmp_path / "log"
    log = LogFile(path)
    seen = []
    for piece in ("on", "e\n", "\rtwo\r", "\nx", "x" * LINE, "x" * LINE, "\nthree\n"):
        with path.open("a") as file:
            file.write(piece)
        seen += log.new_lines()
    assert seen == ["one", "two", "x" * LINE, "three"]


def test_what_is_kept_of_a_log_without_lines_does_not_grow(tmp_path: Path):
    """As of dots that show progress: every look at it would take longer than the one before."""
    path = tmp_path / "log"
    log = LogFile(path)
    for _ in range(3):
        with path.open("a") as file:
            file.write("." * 100_000)
        assert log.new_lines() == []
        assert len(log._rest) <= LINE
