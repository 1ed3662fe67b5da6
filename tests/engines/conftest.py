"""A model folder, a runtime folder of its own per test, and the emulator as everybody starts it here."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tuner.engines.protocol import Site, StepPlan
from tuner.load.trace import Trace
from tuner.space.config import ServingConfig
from tuner.spec.slo import Slo, parse

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model folder with Llama 3.1 8B's sizes and nothing else."""
    folder = tmp_path / "llama-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(folder)


@pytest.fixture
def config(model: str) -> ServingConfig:
    return ServingConfig(model, {}, {"max-model-len": 4096})


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime folder (leases, ownership) that nobody else uses; its path is short, for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        monkeypatch.setenv("TUNER_RUNTIME_DIR", folder)
        yield Path(folder)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    folder = tmp_path / "0001"
    folder.mkdir()
    return Site(folder, (), threading.Event(), lambda _name, _data: None)


def trace(n: int = 12, rate: float = 8.0, inputs: int = 40, outputs: int = 10) -> Trace:
    """``n`` equal requests at ``rate`` per second."""
    none = np.zeros(0, dtype=np.int64)
    offsets = np.zeros(n + 1, dtype=np.int64)
    return Trace("steady", np.arange(n) / rate, np.full(n, inputs), np.full(n, outputs), 0, none, offsets)


def plan(site: Site, load: float = 1.0, of: Trace | None = None, **more: object) -> StepPlan:
    slos: tuple[Slo, ...] = (parse("ttft_p99=10s"), parse("tpot_p99=1s"), parse("error_rate=1%"))
    records = site.folder / f"records-{load:g}.parquet"
    more = {"request_timeout_s": 20.0, **more}
    return StepPlan(load, of or trace(), "w0", slos, records, **more)  # type: ignore[arg-type]
