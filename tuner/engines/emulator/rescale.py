"""Records of a replay against an emulator whose time goes faster, back on the emulated clock.

Everything the client saw is stretched by the factor, its own lags included: at a time scale of ten a client that read
half a millisecond late counts as five milliseconds late, and is distrusted for it.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from tuner.engines.protocol import StepPlan
from tuner.spec.slo import Slo
from tuner.study.outcome import Step

_META = b"tuner.replay"


def hastened(plan: StepPlan, scale: float, records: Path) -> StepPlan:
    """The plan as the wall clock has to follow it: ``scale`` times the load, every duration divided by it."""
    slos = tuple(Slo(slo.metric, slo.limit / scale if slo.latency else slo.limit) for slo in plan.slos)
    return replace(
        plan,
        load=plan.load * scale,
        slos=slos,
        records=records,
        warmup_s=plan.warmup_s / scale,
        request_timeout_s=plan.request_timeout_s / scale,
    )


def rescale(source: Path, target: Path, plan: StepPlan, scale: float) -> None:
    """Writes the records in ``source`` to ``target`` with every time multiplied by ``scale``, and with ``plan``'s own
    load, limits and durations among the file's facts."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(source) as file:
        meta = json.loads(file.metadata.metadata[_META])
        table = file.read()
    for index, field in enumerate(table.schema):
        if not field.name.endswith("_ns"):
            continue
        column = table.column(index).combine_chunks()
        if pa.types.is_list(field.type):
            values = _stretched(column.values, scale)
            column = pa.ListArray.from_arrays(column.offsets, values)
        else:
            column = _stretched(column, scale)
        table = table.set_column(index, field, pc.cast(column, field.type))
    client = {name: value * scale if name.endswith("_s") else value for name, value in meta.get("client", {}).items()}
    meta |= {
        "load": plan.load,
        "lasts_s": plan.trace.until_s / plan.load,
        "warmup_s": plan.warmup_s,
        "request_timeout_s": plan.request_timeout_s,
        "slos": {slo.metric: slo.limit for slo in plan.slos},
        "time_scale": scale,
        "client": client,
    }
    half = target.with_name(target.name + ".partial")
    table = table.replace_schema_metadata({_META: json.dumps(meta).encode()})
    pq.write_table(table, half, compression="zstd", write_page_checksum=True)
    os.replace(half, target)


def step_from_records(plan: StepPlan) -> Step:
    """The step that ``plan.records`` shows, as the replay itself would report it."""
    from tuner.load.records import read
    from tuner.load.step import judge

    return judge(read(plan.records), plan.slos, plan.quantiles)


def _stretched(column: object, scale: float) -> object:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.cast(pc.round(pc.multiply(pc.cast(column, pa.float64()), scale)), pa.int64())  # pyright: ignore[reportAttributeAccessIssue]
