"""What a study file and an objective file may hold: the schema at the text edge."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator

from tuner.spec.text import NUMERIC, TEXT, Strict

Number = Annotated[float, NUMERIC]
Whole = Annotated[int, NUMERIC]
Duration = Annotated[str | float, NUMERIC]
Limit = Annotated[str | float | int, NUMERIC]


class EngineFile(Strict):
    kind: Literal["vllm", "sglang", "command", "attach", "function", "emulator", "own"] = "vllm"
    command: list[str] | str | None = None
    python: str = ""
    args: dict[str, bool | int | float | str] = {}
    env: dict[str, Annotated[str | int | float, TEXT]] = {}
    trust_remote_code: bool = False
    target: str = ""  # of the function engine, and of one of the user's own
    url: str = ""  # of attach
    gpu: str = ""  # of the emulator
    options: dict[str, Any] = {}


class ExecutorFile(Strict):
    kind: Literal["local", "ray"] = "local"
    address: str = "auto"
    store: str = ""  # any fsspec path: where large records go on their way home
    cpus: Number = 1.0  # CPUs that a trial asks Ray for beside its GPUs


class HardwareFile(Strict):
    gpu: str = "auto"
    table: str = ""  # a file of rows like those of tuner/search/gpus.yaml, which win over them
    gpus: Annotated[int | Literal["auto"], NUMERIC] = "auto"


class TraceFile(Strict):
    file: str
    format: str = "auto"
    window: Duration = "60s"
    search_windows: Whole = 1
    heldout_windows: Annotated[int | Literal["auto"], NUMERIC] = "auto"
    fill_cache: Duration = "auto"  # a duration or auto
    max_input_tokens: Whole | None = None
    max_output_tokens: Whole | None = None
    output: Literal["forced", "free"] = "forced"


class LoadFile(Strict):
    ladder: list[Number] | Literal["auto"] = "auto"
    warmup: Duration = "5s"
    request_timeout: Duration = "10min"
    early_stop: bool = True

    @field_validator("ladder")
    @classmethod
    def _rising(cls, loads: list[float] | str) -> list[float] | str:
        if isinstance(loads, str):
            return loads
        if not loads or any(not math.isfinite(x) or x <= 0 for x in loads) or sorted(set(loads)) != loads:
            raise ValueError(f"the ladder is a rising list of loads above zero, not {loads}")
        return loads


class BudgetFile(Strict):
    launches: Whole | None = None
    hours: Number | None = None
    usd: Number | None = None
    verify_share: Number = 0.3
    min_gain: Limit = "0.3%"


class StorageFile(Strict):
    url: str
    heartbeat: Duration = "30s"
    grace: Duration = "2min"


class QualityFile(Strict):
    kl_max: Number | None = None
    top1_min: Number | None = None
    greedy_min: Number | None = None


class ObjectiveFile(Strict):
    name: str = ""
    latency: str
    slo: dict[str, Limit]
    price_usd_per_gpu_hour: Number | None = None
    quality: QualityFile = QualityFile()


class FrozenHardware(Strict):
    name: str
    gpus: Whole
    memory_bytes: Whole = 0
    rows: list[dict[str, Any]] = []


class FrozenFile(BaseModel):
    """What every version writes and reads, and more of some of them."""

    beside: str
    facts: dict[str, Any]
    hardware: FrozenHardware


class StudyFile(Strict):
    name: str = ""
    model: str = ""
    draft_model: str = ""
    eagle_model: str = ""
    engine: EngineFile = EngineFile()
    hardware: HardwareFile = HardwareFile()
    search_space: str | dict[str, Any] = ""
    parameters: dict[str, Any] = {}
    objective: str | dict[str, Any] = "chat"
    slo: dict[str, Limit] = {}
    price_usd_per_gpu_hour: Annotated[float | dict[str, Number] | None, NUMERIC] = None
    trace: TraceFile | str = ""
    load: LoadFile = LoadFile()
    budget: Annotated[BudgetFile | str | int, NUMERIC] = BudgetFile()
    predictor: str = ""  # package.module:callable: a model of one's own in place of the analytic one
    sampler: Literal["auto", "gp", "tpe", "nsga2", "random", "grid"] = "auto"
    seed: Whole = Field(0, ge=0, lt=2**32)
    parallel: Annotated[int | Literal["auto"] | None, NUMERIC] = None  # None: 1 here, as many as fit on a cluster
    executor: ExecutorFile | Literal["local", "ray"] = ExecutorFile()
    warm_start: list[str] = []
    reports: str = "reports"
    tracking_uri: str = ""
    storage: StorageFile | str = ""
    frozen: FrozenFile | None = None  # what was resolved when the study began; only in a study folder
