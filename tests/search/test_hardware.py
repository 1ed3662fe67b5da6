"""The hardware table: what is known of a GPU, and how a driver's name finds its row."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.test_gpu import Nvml
from tuner.errors import UsageError
from tuner.search import hardware
from tuner.spec import facts

GIB = 2**30


@pytest.mark.parametrize(
    ("driver", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),  # the SXM part has no word of its own
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"),  # not L40
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 3090", "RTX-3090"),
        ("NVIDIA RTX A6000", "RTX-A6000"),  # not the Ada one
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA B200", "B200"),
        ("h200_sxm", "H200"),  # as serving tables write it
        ("a100_sxm", "A100-80GB"),
    ],
)
def test_a_driver_s_name_finds_its_row(driver: str, row: str) -> None:
    found = hardware.lookup(driver)
    assert found is not None and found.name == row


def test_a_name_of_no_row_is_none() -> None:
    assert hardware.lookup("NVIDIA Rubin R100") is None


def test_every_row_cites_its_source_and_is_plausible() -> None:
    rows = hardware.table()
    assert {"A10", "L4", "L40S", "H20", "MI300X", "RTX-5090", "cpu-avx512", "cpu-amx"} <= set(rows)
    for row in rows.values():
        assert len(row.source) > 20, row.name
        assert row.price_usd_per_hour > 0
        if row.kind == "gpu":
            # operations per byte lie in one decade for every GPU of these years: a slipped power of ten would not
            assert 30 < row.flops["bf16"] / row.bandwidth_bytes_per_s < 600, row.name
            assert row.name.startswith("MI") or 7 <= row.capability <= 12, row.name  # else no rule about it applies
            assert all(rate >= row.flops["bf16"] for rate in row.flops.values()), row.name


def test_a_format_the_gpu_lacks_runs_as_bf16() -> None:
    a100 = hardware.lookup("A100-80GB")
    assert a100 is not None
    assert a100.rate("fp8") == a100.flops["bf16"]
    assert a100.rate("int8") == 2 * a100.flops["bf16"]


def test_a_user_s_row_adds_to_the_table_and_wins(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "- {name: R100, match: [R100], memory_gib: 288, bandwidth: 13000, tflops: {bf16: 4000}, source: mine}\n"
        "- {name: L4, match: [L4], memory_gib: 22.5, bandwidth: 250, tflops: {bf16: 100}, source: measured here}\n"
    )
    rows = hardware.table(hardware.written(file))
    assert rows["R100"].memory_bytes == 288 * GIB
    assert rows["L4"].bandwidth_bytes_per_s == 250e9
    assert "H200" in rows
    assert hardware.lookup("NVIDIA R100", rows) is rows["R100"]


def test_a_user_s_row_that_matches_as_ours_does_wins_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("- {name: mine, match: [H100], memory_gib: 80, bandwidth: 3000, tflops: {bf16: 900}, source: s}\n")
    found = hardware.lookup("NVIDIA H100 80GB HBM3", hardware.table(hardware.written(file)))
    assert found is not None and found.name == "mine"


def test_what_a_row_says_is_read_in_its_units(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "- {name: X, kind: cpu, memory_gib: 2, bandwidth: 3, bandwidth_limit: 7, tflops: {bf16: 4, int8: 5}, link: 6,"
        " link_latency_us: 8, op_us: 9, unpack_gweights: 10, price: 11, capability: 12.5, match: [X, 3], source: s}\n"
        "- {name: Y, memory_gib: 2, bandwidth: 3, tflops: {bf16: 4}, source: s}\n"
    )
    rows = hardware.table(hardware.written(file))
    assert rows["X"] == hardware.Hardware(
        name="X",
        memory_bytes=2 * GIB,
        bandwidth_bytes_per_s=3e9,
        flops={"bf16": 4e12, "int8": 5e12},
        link_bytes_per_s=6e9,
        link_latency_s=pytest.approx(8e-6),
        price_usd_per_hour=11,
        kind="cpu",
        op_s=pytest.approx(9e-6),
        unpack_weights_per_s=10e9,
        capability=12.5,
        match=("X", "3"),
        source="s",
        bandwidth_limit=7e9,
    )
    plain = rows["Y"]
    assert (plain.kind, plain.op_s, plain.unpack_weights_per_s, plain.match) == ("gpu", None, 0, ())
    assert plain.bandwidth_limit == math.inf and plain.link_bytes_per_s == 32e9  # PCIe 4.0
    assert plain.link_latency_s == pytest.approx(25e-6)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{name: X, memory_gib: 10, tflops: {bf16: 1}, source: s}", "needs bandwidth"),
        ("{name: X, memory_gib: 10, bandwith: 1, bandwidth: 1, tflops: {bf16: 1}, source: s}", "bandwith"),
        ("{name: X, memory_gib: 0, bandwidth: 1, tflops: {bf16: 1}, source: s}", "above zero"),
        ("{name: X, memory_gib: 10, bandwidth: 1, tflops: {fp8: 1}, source: s}", "needs bf16"),
        ("{name: X, memory_gib: 10, bandwidth: 1, tflops: {bf16: 1, fp9: 1}, source: s}", "needs bf16"),
        ("{name: X, memory_gib: 10, bandwidth: 1, tflops: 1, source: s}", "needs bf16"),
        ("{1: 2, memory_gib: 10, bandwidth: 1, tflops: {bf16: 1}, source: s}", "does not know 1"),
        ("{name: X, memory_gib: .inf, bandwidth: 1, tflops: {bf16: 1}, source: s}", "memory_gib must be a number"),
        ("{name: X, memory_gib: many, bandwidth: 1, tflops: {bf16: 1}, source: s}", "X: could not convert"),
        ("{name: X, memory_gib: 10, bandwidth: 1, tflops: {bf16: 1}, source: s, link: 0}", "link must be a number"),
        ("{name: X, memory_gib: 10, bandwidth: 1, tflops: {bf16: 1}, source: s, kind: GPU}", "kind is gpu or cpu"),
        ("{name: X, memory_gib: 10, bandwidth: 1, tflops: {bf16: 1}, source: s, match: H100}", "a list of words"),
        ("X", "is a mapping"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(tmp_path: Path, row: str, says: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"# mine\n- {{name: ok, memory_gib: 1, bandwidth: 1, tflops: {{bf16: 1}}, source: s}}\n- {row}\n")
    with pytest.raises(UsageError, match=says) as caught:
        hardware.table(hardware.written(file))
    assert caught.value.where == f"{file}:3"


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "no such hardware table"), ("- {", "cannot read the hardware table"), ("name: X", "is a list of rows")],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "mine.yaml"
    if text:
        file.write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        hardware.table(hardware.written(file))
    assert caught.value.where == str(file)


def test_detection_takes_memory_from_the_driver() -> None:
    found, line = hardware.detect(probe=lambda: ("NVIDIA H100 80GB HBM3", 79 * GIB))
    assert found is not None and found.name == "H100-SXM" and found.memory_bytes == 79 * GIB
    assert "H100-SXM" in line


def test_an_unknown_gpu_is_none_and_names_the_nearest() -> None:
    found, line = hardware.detect(probe=lambda: ("NVIDIA Rubin", 139 * GIB))
    assert found is None
    assert "H200" in line and "without a model" in line and "(139 GiB)" in line
    line = hardware.detect(probe=lambda: ("NVIDIA Rubin", 256 * GIB))[1].replace(str(hardware._TABLE), "")
    assert "cpu" not in line  # though its row has as much


def test_without_a_gpu_the_cores_are_the_hardware() -> None:
    found, line = hardware.detect(probe=lambda: None)
    assert found is not None and found.kind == "cpu" and found.cores >= 1
    assert str(found.cores) in line


def test_cpu_cores_scale_up_to_the_socket_s_bandwidth() -> None:
    row = hardware.table()["cpu-avx512"]
    two, many = row.with_cores(2), row.with_cores(64, 3 * GIB)
    assert (two.cores, two.memory_bytes, many.memory_bytes) == (2, row.memory_bytes, 3 * GIB)
    for of in ("price_usd_per_hour", "unpack_weights_per_s"):
        assert getattr(many, of) == 32 * getattr(two, of) == 64 * getattr(row, of) > 0
    assert many.flops["bf16"] == 32 * two.flops["bf16"]
    assert many.bandwidth_bytes_per_s == row.bandwidth_limit < 32 * two.bandwidth_bytes_per_s


@pytest.mark.parametrize(
    ("flags", "row"),
    [
        ({"avx2"}, "cpu-avx2"),
        ({"avx2", "avx512f"}, "cpu-avx512"),
        ({"avx2", "avx512f", "amx_bf16"}, "cpu-amx"),
        (set(), "cpu-avx2"),
    ],
)
def test_a_cpu_s_row_is_that_of_its_widest_instructions(monkeypatch, flags: set[str], row: str) -> None:
    monkeypatch.setattr(hardware, "cpu_flags", lambda: flags)
    found = hardware.cpu()
    assert found.name == row and found.cores == len(os.sched_getaffinity(0))
    assert found.flops["int8"] == pytest.approx(found.cores * hardware.table()[row].flops["int8"])


def test_ranks_on_one_cpu_server_have_equal_parts_of_it() -> None:
    server = hardware.table()["cpu-avx512"].with_cores(8)
    rank = server.shared_by(2)
    assert rank.cores == 4
    assert rank.bandwidth_bytes_per_s == server.bandwidth_bytes_per_s / 2
    assert rank.unpack_weights_per_s == server.unpack_weights_per_s / 2
    assert rank.flops == {fmt: rate / 2 for fmt, rate in server.flops.items()}


def test_detection_imports_no_torch() -> None:
    code = "import sys; from tuner.search.hardware import detect; detect(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_gpus_that_are_visible_count_and_the_first_of_them_is_looked_at(monkeypatch) -> None:
    small = {"name": "NVIDIA L4", "total": 23 * GIB, "capability": (8, 9)}
    monkeypatch.setitem(sys.modules, "pynvml", Nvml({}, {}, small, small))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert facts.of_gpus() == {"gpus": 2, "compute_capability": 8.9}
    assert hardware.detect()[1] == "NVIDIA L4 as L4"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert facts.of_gpus() == {}
    assert hardware.detect()[1].startswith("no GPU; ")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ""),
        ({"sys/class/drm/renderD128/device/vendor": "0x10de\n"}, ""),  # NVIDIA's: NVML's affair
        ({"sys/class/drm/renderD128/device/vendor": "0x1002\n"}, "an AMD GPU"),
        (
            {"sys/class/drm/renderD128/device/vendor": "0x8086\n", "dev/accel/accel0": ""},
            "an Intel GPU and an accelerator (a TPU, Gaudi or NPU)",
        ),
        ({"dev/accel0": "", "dev/accel1": ""}, "an accelerator (a TPU, Gaudi or NPU)"),
    ],
)
def test_accelerators_of_other_makers_are_seen(tmp_path: Path, files, words):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert hardware.strangers(tmp_path) == words


def test_a_gpu_that_tuner_cannot_tune_is_not_called_none(monkeypatch):
    monkeypatch.setattr(hardware, "strangers", lambda: "an AMD GPU")
    row, words = hardware.detect(probe=lambda: None)
    assert (
        row and row.kind == "cpu" and words.startswith("no NVIDIA GPU (an AMD GPU is here, which tuner cannot tune);")
    )


def test_our_table_is_read_once_and_nobody_changes_it(monkeypatch):
    read, reads = hardware._read, []
    monkeypatch.setattr(hardware, "_read", lambda path: reads.append(path) or read(path))
    hardware._ours.cache_clear()
    hardware.table().clear()
    assert len({hardware.device_of(f"{name} ") for name in hardware.table()}) == len(hardware.table())
    assert len(reads) == 1
