"""Reads a measured serving table (columns of aiconfigurator's silicon_sample.csv) into what the model is asked for."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, replace
from pathlib import Path

from tuner.search import hardware as hardware_table
from tuner.search.hardware import Hardware
from tuner.search.model import precision as precisions
from tuner.search.model.closed_loop import Parallelism
from tuner.search.model.precision import Precision
from tuner.search.model.shape import ModelShape

# Same architecture under another name.
_ALIASES = {"deepseek-v3": "deepseek-r1", "kimi-k2.5": "kimi-k2", "llama-3.1-70b": "llama-3.3-70b"}


@dataclass(frozen=True, slots=True)
class Row:
    """One measured row and how it was measured. ``relabelled``: its id contradicts its columns, and was believed."""

    model: str
    shape: ModelShape
    system: str
    hardware: Hardware
    engine: str
    parallelism: Parallelism
    precision: Precision
    isl: int
    osl: int
    concurrency: int
    length_spread: float
    ttft_s: float
    tpot_s: float
    relabelled: bool

    @property
    def group(self) -> str:
        return f"{self.model}/{self.engine}"

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for copies of one measurement (the source holds some rows two or three times)."""
        return (
            self.shape, self.system, self.engine, self.isl, self.osl, self.concurrency,
            round(self.ttft_s, 3), round(self.tpot_s, 4),
        )  # fmt: skip

    @property
    def throughput_per_gpu(self) -> float:
        """Output tokens per second and GPU, by the table's own formula."""
        request_s = self.tpot_s * (self.osl - 1) + self.ttft_s
        return self.concurrency / request_s * self.osl / self.parallelism.gpus

    @property
    def arithmetic_share(self) -> float:
        """Share of the data sheet's dense peak that this row's throughput needs, were every prompt computed."""
        operations = 2 * self.shape.active * (self.isl + self.osl)
        rate = self.throughput_per_gpu / self.osl * operations
        return rate / self.hardware.rate(self.precision.compute)


def read(path: Path, shapes: Path, gpus: Path | None = None) -> tuple[list[Row], dict[str, int]]:
    """All rows that can be predicted, and how many of what were left out."""
    known = {file.stem: ModelShape.from_folder(file) for file in sorted(shapes.glob("*.json"))}
    rows, left_out = [], {}
    table = hardware_table.table(hardware_table.written(gpus) if gpus else ())
    for record in csv.DictReader(path.open(newline="", encoding="utf-8")):
        name = record["model_path"].rsplit("/", 1)[-1]
        shape = _shape(name, known)
        hardware = hardware_table.lookup(record["system"], table)
        reason = f"model {name}" if shape is None else f"system {record['system']}" if hardware is None else ""
        if record.get("mode", "agg") not in ("agg", ""):
            reason = f"mode {record['mode']}"
        if shape is None or hardware is None or reason:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        rows.append(_row(record, name, shape, hardware))
    spread: dict[tuple[object, ...], float] = {}
    for row in rows:  # copies of a measurement under another file's name keep its protocol
        spread[row.key] = max(row.length_spread, spread.get(row.key, 0.0))
    return [replace(row, length_spread=spread[row.key]) for row in rows], left_out


def _row(record: dict[str, str], name: str, shape: ModelShape, hardware: Hardware) -> Row:
    def number(key: str, default: int = 1) -> int:
        return int(float(record.get(key) or default))

    source = record.get("silicon_data_source", "")
    labelled = Parallelism(number("tp_size"), number("pp_size"), number("attention_dp_size"), number("moe_ep_size") > 1)
    concurrency = number("batch_size") * labelled.dp
    # The id and the source keep the launch as it was; some rows' columns were multiplied (tp 64 for tp 8 x ep 8), with
    # times equal to the millisecond to the row that was not.
    parallelism, by_id = labelled, re.search(r"_tp(\d+)(?:_0)?_ep(none|\d+)", record.get("id", ""))
    if by_id and int(by_id.group(1)) > 0 and labelled.gpus != int(by_id.group(1)):
        parallelism = Parallelism(int(by_id.group(1)), 1, 1, by_id.group(2) not in ("none", "0", "1"))
    stated = re.search(r"silicon_concurrency=(\d+)", source)
    if stated:
        concurrency = int(stated.group(1))
    dated = bool(re.search(r"db-dump|source_file=20\d\d-", source))
    return Row(
        model=name,
        shape=shape,
        system=record["system"],
        hardware=hardware,
        engine=record["backend"],
        parallelism=parallelism,
        precision=_precision(record.get("precision", ""), shape),
        isl=number("isl"),
        osl=number("osl"),
        concurrency=concurrency,
        # InferenceX draws lengths from [0.8, 1] of the nominal one: relative standard deviation 0.2 / sqrt(12).
        length_spread=0.06 if dated else 0.0,
        ttft_s=float(record["silicon_ttft_ms"]) / 1e3,
        tpot_s=float(record["silicon_tpot_ms"]) / 1e3,
        relabelled=parallelism != labelled,
    )


def doubts(rows: list[Row]) -> dict[str, str]:
    """Groups of rows that contradict themselves, by group: a group some of whose rows need more than 90 % of the data
    sheet's arithmetic had its prompts cached (no kernel reaches that)."""
    found: dict[str, str] = {}
    for row in rows:
        if row.arithmetic_share > 0.9:
            found[row.group] = f"needs {row.arithmetic_share:.0%} of peak arithmetic: its prompts must have been cached"
    return found


def _precision(name: str, shape: ModelShape) -> Precision:
    if shape.precision.quantized or not name or name in ("bf16", "fp16"):
        return shape.precision
    method = "nvfp4" if "fp4" in name else precisions.method_of(name)
    return precisions.apply(shape.precision, method) if method else shape.precision


def _shape(name: str, known: dict[str, ModelShape]) -> ModelShape | None:
    plain = name.lower()
    for alias, real in _ALIASES.items():
        if plain.startswith(alias):
            plain = real + plain[len(alias) :]
    return next((known[stem] for stem in sorted(known, key=len, reverse=True) if plain.startswith(stem)), None)
