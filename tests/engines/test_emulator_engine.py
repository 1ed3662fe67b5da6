"""The engine around the emulator: two clocks that agree, a time scale that stretches everything back, stated damage."""

from __future__ import annotations

import json
import math
import shutil
import time
from array import array
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests import studies
from tests.engines.conftest import LLAMA_8B, plan, trace
from tuner.engines.emulator import EmulatorEngine
from tuner.engines.emulator.engine import EmulatorServer
from tuner.engines.emulator.flags import parse as parse_flags
from tuner.engines.emulator.quality import STATED_KL, Answers
from tuner.engines.emulator.rescale import hastened, rescale, step_from_records
from tuner.engines.protocol import LaunchFailed, Site, StepPlan
from tuner.errors import UsageError
from tuner.load.records import Record, read, write
from tuner.space.config import ServingConfig
from tuner.spec.slo import parse
from tuner.spec.study import EngineSpec
from tuner.study.outcome import Boot, Step


def virtual(config: ServingConfig, site: Site, load: float = 1.0, **options: object) -> Step:
    server = EmulatorEngine(clock="virtual", **options).launch(config, site)  # type: ignore[arg-type]
    return server.measure(plan(site, load, trace(60, 20.0, 300, 50)))


def latencies(step: Step) -> dict[str, float]:
    return {name: value for name, value in step.metrics.items() if name.startswith(("ttft", "tpot", "itl", "e2e"))}


def test_the_same_trial_measures_the_same_and_another_folder_is_another_launch(
    config: ServingConfig, site: Site, tmp_path: Path
) -> None:
    other = tmp_path / "0002"
    other.mkdir()
    one, two = virtual(config, site), virtual(config, site)
    three = virtual(config, replace(site, folder=other))

    assert latencies(one) == latencies(two)
    elsewhere = shutil.copytree(config.model, tmp_path / "elsewhere" / Path(config.model).name)
    moved = virtual(replace(config, model=str(elsewhere)), site)
    assert latencies(moved) == latencies(one), "wherever the model lies"
    assert latencies(one) != latencies(three)
    assert three.metrics["tpot_p50_s"] == pytest.approx(one.metrics["tpot_p50_s"], rel=0.15)


def test_the_process_and_the_virtual_clock_tell_the_same_story(config: ServingConfig, site: Site) -> None:
    """Medians only: the wall clock adds HTTP, and a busy machine adds its own."""
    engine = EmulatorEngine(boot_scale=0, noise={"launch": 0.0, "step": 0.0, "stalls_per_s": 0.0, "stall_s": 0.0})
    server = engine.launch(config, site)
    try:
        wall = server.measure(plan(site, 1.0, trace(60, 20.0, 300, 50)))
    finally:
        server.stop()
    quiet = virtual(config, site, noise={"launch": 0.0, "step": 0.0, "stalls_per_s": 0.0, "stall_s": 0.0})

    assert wall.metrics["tpot_p50_s"] == pytest.approx(quiet.metrics["tpot_p50_s"], rel=0.25)
    assert wall.metrics["ttft_p50_s"] >= quiet.metrics["ttft_p50_s"] - 0.002


@pytest.mark.parametrize("options", [{"clock": "virtual"}, {"time_scale": 4.0, "boot_scale": 0}, {"boot_scale": 0}])
def test_a_launch_whose_time_is_not_the_walls_tells_what_it_took(
    config: ServingConfig, site: Site, options: dict[str, Any]
) -> None:
    took = list[float]()
    tell = replace(site, on_event=lambda name, data: took.append(data["seconds"]) if name == "took" else None)
    begun_s = time.monotonic()
    server = EmulatorEngine(**options).launch(config, tell)
    server.measure(plan(tell, 1.0, trace(60, 20.0, 300, 50)))
    server.stop()
    wall_s, boot_s = time.monotonic() - begun_s, server.boot.total_s
    if options.get("clock"):
        assert took == [pytest.approx(boot_s + 3 + 1, abs=1.5)] and boot_s > 20  # requests for three seconds, a pause
    else:
        assert took == [pytest.approx(4 * wall_s, rel=0.05)] * ("time_scale" in options)
    failing = {**options, "fault": "oom-kv"}
    with pytest.raises(LaunchFailed) as failure:
        EmulatorEngine(**failing).launch(config, tell)
    assert len(took) == 2 * ("clock" in options or "time_scale" in options)
    assert "clock" not in options or took[-1] == pytest.approx(failure.value.outcome.boot.total_s, abs=0.01)


@pytest.mark.parametrize("options", [{"clock": "virtual"}, {"time_scale": 4.0, "boot_scale": 0}])
def test_a_step_of_which_all_is_warm_up_is_no_measurement_on_either_clock(
    config: ServingConfig, site: Site, options: dict
) -> None:
    server = EmulatorEngine(**options).launch(config, site)
    try:
        step = server.measure(plan(site, 1.0, trace(4, 20.0, 30, 5), warmup_s=2.0))
    finally:
        server.stop()
    assert (step.slo_misses, step.ok) == ((), False)
    assert "no request lies after the warm-up" in step.untrusted[0]


@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_a_model_in_the_cache_is_found_by_its_id_and_one_that_is_nowhere_is_told_what_to_fetch(
    config: ServingConfig, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: str
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (cached := tmp_path / "hub" / "models--org--name" / "snapshots" / "abc").mkdir(parents=True)
    (cached / "config.json").write_bytes((Path(config.model) / "config.json").read_bytes())
    engine = EmulatorEngine(clock=clock, boot_scale=0)
    engine.launch(replace(config, model="org/name"), site).stop()
    with pytest.raises(LaunchFailed) as failed:
        engine.launch(replace(config, model="org/other"), site)
    assert failed.value.outcome.cause == "model-not-found" and "org/other config.json" in failed.value.outcome.fix


@pytest.mark.parametrize("options", [{"clock": "virtual"}, {"time_scale": 4.0, "boot_scale": 0}])
def test_records_tell_for_how_long_their_traffic_was_to_last_on_either_clock(
    config: ServingConfig, site: Site, options: dict
) -> None:
    server = EmulatorEngine(**options).launch(config, site)
    asked = plan(site, 2.0, replace(trace(8, 8.0, 30, 5), lasts_s=3.0))
    try:
        step = server.measure(asked)
    finally:
        server.stop()
    assert read(asked.records).meta["lasts_s"] == 1.5
    assert step.metrics["offered_requests_per_s"] == pytest.approx(8 / 1.5)


HYBRID = {**LLAMA_8B, "model_type": "nemotron_h", "hybrid_override_pattern": "M-M-*-"}
UNKNOWN = "does not know this architecture: config.json has hybrid_override_pattern"


@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_a_model_whose_layers_are_not_known_is_not_emulated_as_another(
    config: ServingConfig, site: Site, clock: str
) -> None:
    (Path(config.model) / "config.json").write_text(json.dumps(HYBRID))
    with pytest.raises(LaunchFailed) as failed:
        EmulatorEngine(clock=clock, boot_scale=0).launch(config, site)
    outcome = failed.value.outcome
    assert outcome.cause == "model-unsupported" and UNKNOWN in outcome.message and "emulated" in outcome.fix


def test_a_draft_model_whose_layers_are_not_known_is_named(config: ServingConfig, site: Site, tmp_path: Path) -> None:
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").write_text(json.dumps(HYBRID))
    spec = json.dumps({"model": str(tmp_path / "draft"), "num_speculative_tokens": 3})
    with pytest.raises(LaunchFailed, match=UNKNOWN):
        virtual(replace(config, flags={**config.flags, "speculative-config": spec}), site)


def test_a_json_flag_that_is_given_twice_is_read_as_vllm_reads_it() -> None:
    """vLLM puts the parts together behind the other flags, where argparse takes the last."""
    words = ["m", "--speculative_config.method", "ngram", "--speculative-config", '{"num_speculative_tokens": 3}']
    words += ["--compilation-config.pass_config.fuse_norm_quant", "true", "--speculative-config.prompt_lookup_max", "4"]
    found = parse_flags(words)
    assert json.loads(found["speculative-config"] or "") == {"method": "ngram", "prompt_lookup_max": 4}
    assert json.loads(found["compilation-config"] or "") == {"pass_config": {"fuse_norm_quant": True}}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"method": "ngram", "prompt_lookup_max": 4}, "num_speculative_tokens must be provided"),
        ({"num_speculative_tokens": 3}, "num_speculative_tokens was provided but without speculative model"),
    ],
)
def test_half_a_speculation_is_refused_in_vllm_s_words(
    config: ServingConfig, site: Site, spec: dict[str, object], says: str
) -> None:
    with pytest.raises(LaunchFailed, match=says):
        virtual(replace(config, flags={**config.flags, "speculative-config": json.dumps(spec)}), site)


def test_boot_times_are_those_of_the_emulated_start(config: ServingConfig, site: Site) -> None:
    server = EmulatorEngine(clock="virtual").launch(config, site)

    assert 30 < server.boot.total_s < 90
    assert server.boot.phases_s["weights"] > 5
    assert server.boot.facts["kv_cache_tokens"] > 100_000
    assert (site.folder / "server.log").read_text().count("GPU KV cache size") == 1


def test_a_scaled_plan_asks_for_everything_that_many_times_faster(site: Site) -> None:
    before = plan(site, 2.0, warmup_s=8.0)
    fast = hastened(before, 4.0, site.folder / "fast.parquet")

    assert (fast.load, fast.warmup_s, fast.request_timeout_s) == (8.0, 2.0, 5.0)
    assert [(slo.metric, slo.limit) for slo in fast.slos] == [
        ("ttft_p99", 2.5),
        ("tpot_p99", 0.25),
        ("error_rate", 0.01),
    ]


def test_rescaled_records_are_on_the_emulated_clock_and_so_are_the_clients_lags(site: Site) -> None:
    records = [
        Record(
            request=i,
            intended_ns=i * 10**8,
            sent_ns=i * 10**8 + 10**6,
            first_byte_ns=i * 10**8 + 10**7,
            first_byte_read_ns=i * 10**8 + 10**7,
            first_token_ns=i * 10**8 + 10**7,
            last_token_ns=i * 10**8 + 9 * 10**7,
            end_ns=i * 10**8 + 9 * 10**7,
            token_ns=array("q", range(i * 10**8 + 10**7, i * 10**8 + 9 * 10**7 + 1, 10**7)),
            input_tokens=40,
            prompt_tokens=40,
            wanted_tokens=9,
            output_tokens=9,
            error="",
            warmup=False,
            retried=False,
            read_lag_ns=10**5,
        )
        for i in range(20)
    ]
    wall = site.folder / "wall.parquet"
    scaled = plan(site, 4.0)
    lost = {"stopped": "tpot_p99 cannot hold 100 ms: 9 misses", "slos": {"tpot_p99": 0.1}}
    client = {"stamp_error_p99_s": 0.0005, "shards": 1}
    write(wall, records, {"load": 40.0, "window": "w0", "warmup_s": 0.0, "client": client, **lost})
    rescale(wall, scaled.records, scaled, 10.0)
    step, columns = step_from_records(scaled), read(scaled.records).columns

    assert step.metrics["ttft_p50_s"] == pytest.approx(0.1)
    assert step.metrics["tpot_p50_s"] == pytest.approx(0.1)
    assert step.metrics["itl_p50_s"] == pytest.approx(0.1)
    assert step.metrics["send_lag_p99_s"] == pytest.approx(0.01)
    assert step.metrics["stamp_error_p99_s"] == pytest.approx(0.005), "half a millisecond late counts as five"
    assert step.metrics["shards"] == 1
    assert columns["read_lag_ns"].max() == 10**6
    assert columns["output_tokens"].tolist() == [9] * 20
    assert (step.load, step.slo_misses, step.untrusted) == (4.0, (lost["stopped"],), ())


def test_a_share_of_the_configs_fails_and_always_the_same_ones(model: str, site: Site, tmp_path: Path) -> None:
    engine = EmulatorEngine(clock="virtual", faults=["oom-kv", "nccl"], fault_share=0.5)

    elsewhere = str(shutil.copytree(model, tmp_path / "elsewhere" / Path(model).name))

    def outcome(seqs: int, model: str = model) -> str:
        try:
            engine.launch(ServingConfig(model, {}, {"max-model-len": 4096, "max-num-seqs": seqs}), site)
        except LaunchFailed as failure:
            return failure.outcome.cause
        return "ok"

    causes = [outcome(seqs) for seqs in range(8, 72)]

    assert causes == [outcome(seqs) for seqs in range(8, 72)] == [outcome(seqs, elsewhere) for seqs in range(8, 72)]
    assert set(causes) == {"ok", "oom-kv", "nccl"}
    assert 16 <= causes.count("ok") <= 48


def test_what_does_not_fit_is_diagnosed_on_the_virtual_clock_too(model: str, site: Site) -> None:
    config = ServingConfig(model, {}, {"max-model-len": 131072, "gpu-memory-utilization": 0.3})
    with pytest.raises(LaunchFailed) as failure:
        EmulatorEngine(clock="virtual").launch(config, site)

    assert failure.value.outcome.cause == "oom-kv"
    assert (failure.value.outcome.short_bytes or 0) > 10 * 2**30


def test_a_gpu_of_the_hardware_table_that_the_emulator_has_no_row_for_is_taken_from_its_data_sheet(
    config: ServingConfig, site: Site
) -> None:
    slow, fast = (virtual(config, site, gpu=gpu).metrics["tpot_p50_s"] for gpu in ("A40", "GH200"))

    assert slow > 2 * fast  # 696 against 4,000 GB/s


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gpu": "Voodoo 2"}, "does not know the GPU"),
        ({"clock": "sundial"}, "wall or virtual"),
        ({"fault": "nonsense"}, "unknown fault 'nonsense'"),
        ({"time_scale": 0}, "above zero"),
    ],
)
def test_an_option_that_means_nothing_is_refused(options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        EmulatorEngine(**options)


@pytest.mark.parametrize("kl", [0.005, 0.05])
def test_damaged_answers_differ_by_the_stated_divergence(kl: float) -> None:
    base, damaged = Answers(5000, seed=1), Answers(5000, seed=1, kl=kl, salt="int4")
    total = 0.0
    for token in range(1500):
        context = base.context([token])
        other = dict(damaged.top(context, 8))
        total += sum(math.exp(p) * (p - other[candidate]) for candidate, p in base.top(context, 8))

    assert total / 1500 == pytest.approx(kl, rel=0.25)


def test_undamaged_answers_agree_and_probabilities_are_probabilities() -> None:
    one, two = Answers(5000, seed=1), Answers(5000, seed=1, kl=0.0, salt="another")
    context = one.context([1, 2, 3])

    assert one.top(context, 12) == two.top(context, 12)
    assert one.greedy(context) == one.top(context, 1)[0][0]
    assert sum(math.exp(p) for _, p in one.top(context, 8)) == pytest.approx(0.98, abs=1e-6)


def test_coarser_quantization_is_stated_to_cost_more() -> None:
    assert 0 < STATED_KL["fp8"] < STATED_KL["w8a8"] < STATED_KL["awq"]


@pytest.mark.parametrize("options", [{"clock": "virtual"}, {"time_scale": 4.0, "boot_scale": 0}])
def test_what_came_before_a_window_is_in_the_cache_on_either_clock(
    config: ServingConfig, site: Site, options: dict
) -> None:
    """Sixteen conversations, of which the first turn came before: 2,048 of 2,112 tokens were computed then."""
    quiet = {"launch": 0.0, "step": 0.0, "stalls_per_s": 0.0, "stall_s": 0.0}
    server = EmulatorEngine(**options, noise=quiet).launch(config, site)
    first = trace(16, 4.0, 2048, 5)
    blocks = replace(first, block_tokens=2048, block_ids=np.arange(16), block_offsets=np.arange(17))
    second = replace(blocks, input_tokens=first.input_tokens + 64)
    try:
        cold = server.measure(plan(site, 1.0, second, seed=1))
        warm = server.measure(plan(site, 1.001, replace(second, earlier=blocks), seed=1))
    finally:
        server.stop()
    assert warm.metrics["measured_requests"] == cold.metrics["measured_requests"]
    assert warm.metrics["ttft_p50_s"] < cold.metrics["ttft_p50_s"] / 2
    assert not warm.untrusted
    assert (warm.metrics["fill_requests"], warm.metrics["fill_failures"]) == (16, 0)
    assert 0.1 < warm.metrics["fill_s"] < 10 and "fill_s" not in cold.metrics


@pytest.mark.parametrize(
    ("slos", "axis", "late_ms", "bears"),
    [
        ("ttft_p99=5s", "tpot_p99", 20, ""),  # 5 s may be 250 ms off; TPOT is a mean
        ("ttft_p99=5s itl_p99=17ms", "tpot_p99", 20, "itl bears at most 5 ms"),
        ("ttft_p99=5s", "itl_p99", 20, "itl bears at most 5 ms"),
        ("ttft_p99=100s", "ttft_p99", 20, "ttft bears at most 10 ms"),  # the limit says nothing about the axis
        ("ttft_p99=5s", "itl_p99", 4, ""),
        ("tpot_p99=50ms", "tpot_p99", 20, "ttft bears at most 10 ms"),
    ],
)
def test_lateness_is_judged_against_every_latency_that_it_distorts(
    site: Site, monkeypatch: pytest.MonkeyPatch, slos: str, axis: str, late_ms: float, bears: str
) -> None:
    measured = Step(1.0, "w0", {"ttft_p99_s": 0.2, "itl_p99_s": 0.03, "tpot_p99_s": 0.02, "e2e_p99_s": 9.0})
    inner = SimpleNamespace(endpoint=None, boot=Boot(0.0, {}), measure=lambda _plan: measured)
    server = EmulatorServer(inner, 1.0, axis)
    monkeypatch.setattr(server, "_state", lambda reset=False: {"lateness_p99_s": late_ms / 1e3})
    asked = replace(plan(site, 1.0, trace(4, 20.0, 30, 5)), slos=tuple(map(parse, slos.split())))
    said = server.measure(asked).untrusted
    assert (bears in said[0]) if bears else not said


def test_the_engine_of_a_study_tells_its_servers_the_axis(tmp_path: Path) -> None:
    study = studies.study(tmp_path, engine=EngineSpec("emulator"))
    assert EmulatorEngine.from_study(study).axis == study.objective.latency


def test_what_is_late_while_the_cache_is_filled_is_not_held_against_the_step(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def measure(asked: StepPlan) -> Step:
        events.append("fill")
        asked.on_event("filled", {})
        events.append("replay")
        return Step(1.0, "w0", {"ttft_p99_s": 0.2})

    server = EmulatorServer(SimpleNamespace(endpoint=None, boot=Boot(0.0, {}), measure=measure), 1.0)
    monkeypatch.setattr(server, "_state", lambda reset=False: events.append("reset" if reset else "look") or {})
    server.measure(plan(site))
    assert events == ["reset", "fill", "reset", "replay", "look"]
