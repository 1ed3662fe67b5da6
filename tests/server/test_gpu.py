"""GPUs through NVML, which is mocked: no figure of a real GPU is claimed here."""

from types import SimpleNamespace as Thing

import pytest

from tuner.server.gpu import Gpus

GIB = 2**30


class Nvml:
    """The part of pynvml that is used, over a list of dictionaries."""

    def __init__(self, *gpus: dict) -> None:
        self.gpus = gpus

    def nvmlInit(self):
        if any(gpu.get("driver") is None and "driver" in gpu for gpu in self.gpus):
            raise RuntimeError("Driver Not Loaded")

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self.gpus[index]

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return Thing(used=gpu.get("used", 0), total=gpu.get("total", 80 * GIB))

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        return [Thing(pid=pid) for pid in gpu.get("pids", ())]

    def nvmlDeviceGetUUID(self, gpu):
        return gpu.get("uuid", "GPU-0")

    def nvmlDeviceGetName(self, gpu):
        return gpu.get("name", b"NVIDIA H200")

    def nvmlDeviceGetCudaComputeCapability(self, gpu):
        return gpu.get("capability", (9, 0))

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return Thing(gpu=gpu.get("busy", 50))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu):
        return gpu.get("reasons", 0)

    def nvmlDeviceGetPowerUsage(self, gpu):
        return gpu.get("milliwatts", 300_000)

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):
        if "millijoules" not in gpu:
            raise RuntimeError("Not Supported")
        return gpu["millijoules"]

    def nvmlDeviceGetTemperature(self, gpu, _sensor):
        return gpu.get("celsius", 60)

    def nvmlDeviceGetClockInfo(self, gpu, _kind):
        return 1980


def test_a_machine_without_a_driver_has_no_gpus():
    assert len(Gpus(Nvml({"driver": None}))) == 0


def test_units_are_converted():
    look = Gpus(Nvml({"used": GIB, "milliwatts": 250_500, "millijoules": 5_000})).sample(0)
    assert (look.power_w, look.energy_j, look.utilization, look.memory_used_bytes) == (250.5, 5.0, 0.5, GIB)


def test_what_a_gpu_does_not_tell_is_zero():
    assert Gpus(Nvml({})).sample(0).energy_j == 0


@pytest.mark.parametrize(
    "bits, words",
    [
        (0x00, ()),
        (0x01, ()),  # idle is no throttling
        (0x04, ("power cap",)),
        (0x20 | 0x40, ("software thermal slowdown", "hardware thermal slowdown")),
        (0x80, ("power brake",)),
    ],
)
def test_throttle_reasons_are_told_in_words(bits, words):
    assert Gpus(Nvml({"reasons": bits})).sample(0).throttled == words


def test_a_gpu_that_somebody_computes_on_is_not_free():
    gpus = Gpus(Nvml({"pids": (7, 3)}, {"used": 40 * GIB}, {"used": 1 * GIB}))
    assert gpus.why_not(0) == "in use by pid 3, 7"
    assert "40.0 GiB" in gpus.why_not(1)
    assert gpus.why_not(2) == ""
    assert gpus.why_not(9) == "there is no such GPU"


@pytest.mark.parametrize(
    "visible, indices",
    [
        (None, (0, 1, 2)),
        ("", ()),
        ("2,0", (2, 0)),
        ("GPU-b,0", (1, 0)),
        ("0,7,1", (0,)),
        ("-1", ()),
        ("MIG-0f1e", (0, 1, 2)),
    ],
)
def test_cuda_visible_devices_is_respected(visible, indices):
    gpus = Gpus(Nvml({"uuid": "GPU-a"}, {"uuid": "GPU-b"}, {"uuid": "GPU-c"}))
    assert gpus.visible({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == indices
