"""Samples become a file, metrics of a step, and a reason to distrust it."""

import os
import time
from dataclasses import replace

import pytest

from tests.server.test_gpu import GIB, Nvml
from tuner.server.gpu import Gpus
from tuner.server.telemetry import Host, HostSample, Sample, Telemetry, summary, throttling
from tuner.server.tree import Pid


def me() -> set[Pid]:
    pid = Pid.of(os.getpid())
    return {pid} if pid else set()


def look(at_s: float, **gpu) -> Sample:
    host = HostSample(cpu=0.5, memory_used_bytes=2 * GIB, server_cpu_cores=1.5, server_memory_bytes=GIB)
    return Sample(at_s, host, (Gpus(Nvml(gpu)).sample(0),))


def test_the_file_has_a_row_per_look_and_gpu(tmp_path):
    import pyarrow.parquet as pq

    gpus = Gpus(Nvml({"reasons": 0x40, "used": GIB}, {}))
    telemetry = Telemetry(tmp_path / "telemetry.parquet", Host(me), gpus, (0, 1), period_s=60)
    telemetry.start()
    telemetry.sample()
    telemetry.stop()
    telemetry.stop()
    rows = pq.read_table(tmp_path / "telemetry.parquet").to_pylist()
    assert [row["gpu_index"] for row in rows] == [0, 1, 0, 1]
    assert rows[0]["gpu_throttled"] == "hardware thermal slowdown" and rows[0]["gpu_memory_used_bytes"] == GIB
    assert rows[0]["server_memory_bytes"] > 10 * 2**20 and rows[0]["host_memory_used_bytes"] > 0


def test_without_a_gpu_the_host_alone_is_written(tmp_path):
    import pyarrow.parquet as pq

    telemetry = Telemetry(tmp_path / "t.parquet", Host(me), Gpus(Nvml()), ())
    telemetry.start()
    telemetry.stop()
    rows = pq.read_table(tmp_path / "t.parquet").to_pylist()
    assert len(rows) == 1 and rows[0]["gpu_index"] is None


def test_the_cpu_that_the_server_spent_is_counted_in_cores(tmp_path):
    """About one, less where others have the processors: no more than was spent around the looks in the time between
    them, no less than was spent between them in the time around."""

    def now() -> tuple[float, float]:
        times = os.times()
        return time.monotonic(), times.user + times.system

    host, looks = Host(me), [now()]
    host.sample()
    looks.append(now())
    while now()[1] < looks[-1][1] + 0.3:
        sum(range(1000))
    looks.append(now())
    cores = host.sample().server_cpu_cores
    looks.append(now())
    (at_s, spent_s), (in_s, spent_in_s), (out_s, spent_out_s), (end_s, spent_end_s) = looks
    tick_s = 2 / os.sysconf("SC_CLK_TCK")
    assert (spent_out_s - spent_in_s - tick_s) / (end_s - at_s) <= cores
    assert cores <= (spent_end_s - spent_s + tick_s) / (out_s - in_s)


def test_energy_comes_from_the_gpus_own_counter_where_it_has_one():
    counted = [look(0, millijoules=1_000_000), look(1, millijoules=1_400_000), look(2, millijoules=1_900_000)]
    assert summary(counted)["system_gpu_energy_j"] == pytest.approx(900)
    estimated = [look(0, milliwatts=200_000), look(1, milliwatts=300_000), look(2, milliwatts=100_000)]
    assert summary(estimated)["system_gpu_energy_j"] == pytest.approx(400)


def busy(at_s: float, counted: bool) -> Sample:
    """A server that draws 120 W before and 200 W after the 30 s from 102.5 on, in which it draws 500 W."""
    served = min(max(at_s - 102.5, 0), 30)
    joules = 120 * min(at_s - 100, 2.5) + 500 * served + 200 * max(at_s - 132.5, 0)
    now = 120 if served == 0 else 500 if served < 30 else 200
    return look(at_s, milliwatts=1000 * now, **({"millijoules": 10**9 + 1000 * joules} if counted else {}))


@pytest.mark.parametrize("counted", [True, False])
def test_power_and_energy_are_of_the_measured_window(counted):
    metrics = summary([busy(100.0 + at, counted) for at in range(50)], (103.2, 132.2))
    assert metrics["system_gpu_power_mean_w"] == pytest.approx(500, rel=0.005 if counted else 0.02)
    assert metrics["system_gpu_energy_j"] == pytest.approx(500 * 29, rel=0.005 if counted else 0.02)


def test_a_window_beyond_the_looks_draws_what_they_saw():
    looks = [busy(at, True) for at in (104.0, 105.0, 106.0)]
    assert summary(looks, (102.5, 107.5))["system_gpu_energy_j"] == pytest.approx(500 * 5)
    assert summary(looks[:1], (102.5, 107.5))["system_gpu_power_mean_w"] == 500


@pytest.mark.parametrize("missed", range(5))
def test_a_counter_that_one_look_did_not_tell_makes_no_power_of_it(missed):
    host = look(0).host
    told = [0 if second == missed else 1_000_000 + 300_000 * second for second in range(5)]
    nvml = [Nvml({"milliwatts": 300_000, "millijoules": energy}) for energy in told]
    looks = [Sample(float(second), host, (Gpus(of).sample(0),)) for second, of in enumerate(nvml)]
    assert summary(looks[::-1], (1.5, 3.5))["system_gpu_power_mean_w"] == pytest.approx(300)


def test_power_is_of_all_gpus_together_whichever_of_them_counts():
    host = look(0).host
    cards = ({"milliwatts": 100_000}, {"milliwatts": 900_000, "millijoules": 1_000})
    first = Sample(0.0, host, tuple(Gpus(Nvml(*cards)).sample(i) for i in (0, 1)))
    cards[1]["millijoules"] = 2_001_000
    last = Sample(4.0, host, tuple(Gpus(Nvml(*cards)).sample(i) for i in (0, 1)))
    assert summary([first, last])["system_gpu_power_mean_w"] == pytest.approx(100 + 500)


def test_metrics_carry_their_unit_and_the_prefix():
    metrics = summary([look(0, used=3 * GIB, celsius=70), look(1, used=5 * GIB, celsius=90)])
    assert all(name.startswith("system_") for name in metrics)
    assert metrics["system_gpu_memory_used_max_bytes"] == 5 * GIB
    assert metrics["system_gpu_temperature_max_c"] == 90
    assert metrics["system_gpu_power_mean_w"] == 300
    assert metrics["system_server_cpu_cores"] == 1.5
    assert summary([]) == {}


def test_a_gpu_that_slowed_down_for_heat_makes_a_measurement_untrusted():
    hot, cool = look(0, reasons=0x40, celsius=93), look(0)
    assert throttling([cool] * 9 + [hot]) == (
        "GPU 0 throttled in 10% of the samples (hardware thermal slowdown, up to 93 °C)"
    )
    assert throttling([cool] * 19 + [hot]) == ""


def test_one_gpu_of_eight_that_slows_down_holds_up_all():
    cool, hot = look(0), look(0, reasons=0x40, celsius=93)

    def eight(third: Sample) -> Sample:
        gpus = [(third if index == 3 else cool).gpus[0] for index in range(8)]
        return replace(cool, gpus=tuple(replace(gpu, index=index) for index, gpu in enumerate(gpus)))

    assert throttling([eight(hot)] * 3 + [eight(cool)]).startswith("GPU 3 throttled in 75% of the samples")
    assert throttling([eight(cool)] * 4) == throttling([]) == ""


def test_a_gpu_at_its_power_cap_does_not():
    assert throttling([look(0, reasons=0x04)] * 10) == ""
    assert summary([look(0, reasons=0x04)] * 2)["system_gpu_throttled_share"] == 1.0


def test_the_looks_of_a_step_are_those_within_it(tmp_path):
    telemetry = Telemetry(tmp_path / "t.parquet", Host(me), Gpus(Nvml()), (), period_s=60)
    telemetry.start()
    first = telemetry.between(0, 2**40)
    assert len(first) == 2 and telemetry.between(0, 1) == []
    telemetry.stop()
