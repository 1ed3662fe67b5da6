"""The hardware table: what is known of a GPU, and how a driver's name finds its row."""

from __future__ import annotations

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
    rows = hardware.table(file)
    assert rows["R100"].memory_bytes == 288 * GIB
    assert rows["L4"].bandwidth_bytes_per_s == 250e9
    assert "H200" in rows
    assert hardware.lookup("NVIDIA R100", rows) is rows["R100"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{name: X, memory_gib: 10, tflops: {bf16: 1}, source: s}", "needs bandwidth"),
        ("{name: X, memory_gib: 10, bandwith: 1, bandwidth: 1, tflops: {bf16: 1}, source: s}", "bandwith"),
        ("{name: X, memory_gib: 0, bandwidth: 1, tflops: {bf16: 1}, source: s}", "above zero"),
        ("{name: X, memory_gib: 10, bandwidth: 1, tflops: {fp8: 1}, source: s}", "needs bf16"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(tmp_path: Path, row: str, says: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"# mine\n- {{name: ok, memory_gib: 1, bandwidth: 1, tflops: {{bf16: 1}}, source: s}}\n- {row}\n")
    with pytest.raises(UsageError, match=says) as caught:
        hardware.table(file)
    assert caught.value.where == f"{file}:3"


def test_detection_takes_memory_from_the_driver() -> None:
    found, line = hardware.detect(probe=lambda: ("NVIDIA H100 80GB HBM3", 79 * GIB))
    assert found is not None and found.name == "H100-SXM" and found.memory_bytes == 79 * GIB
    assert "H100-SXM" in line


def test_an_unknown_gpu_is_none_and_names_the_nearest() -> None:
    found, line = hardware.detect(probe=lambda: ("NVIDIA Rubin", 139 * GIB))
    assert found is None
    assert "H200" in line and "without a model" in line


def test_without_a_gpu_the_cores_are_the_hardware() -> None:
    found, line = hardware.detect(probe=lambda: None)
    assert found is not None and found.kind == "cpu" and found.cores >= 1
    assert str(found.cores) in line


def test_cpu_cores_scale_up_to_the_socket_s_bandwidth() -> None:
    row = hardware.table()["cpu-avx512"]
    two, many = row.with_cores(2), row.with_cores(64)
    assert many.flops["bf16"] == 32 * two.flops["bf16"]
    assert many.bandwidth_bytes_per_s == row.bandwidth_limit < 32 * two.bandwidth_bytes_per_s


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
