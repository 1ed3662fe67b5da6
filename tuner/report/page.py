"""The report: one HTML file that needs no network, built from the study folder alone."""

from __future__ import annotations

import math
import platform
import shlex
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tuner
from tuner.errors import NothingFeasible
from tuner.export import vllm
from tuner.export.deployment import deployment
from tuner.export.text import dump
from tuner.pareto.choice import Change
from tuner.pareto.recommend import plain
from tuner.pareto.traffic import HOURS
from tuner.record.secrets import HIDDEN, is_secret
from tuner.report import charts, html, tables
from tuner.report.figures import front_svg
from tuner.report.hours import hours
from tuner.report.importance import importance
from tuner.report.modelerror import errors, learnt
from tuner.report.parallel import parallel_chart
from tuner.report.style import Figure
from tuner.report.summary import Summary, label, ms, summarize
from tuner.spec.study import Study
from tuner.study.store import AsWritten, Store, read_json
from tuner.words import figure


def build(store: Store, study: Study, out: Path) -> Path:
    """Writes the report to ``out`` and returns it. Works for any number of trials, feasible or not."""
    s = summarize(store, study)
    figures = _figures(s)
    return html.write(
        out,
        "page.html.j2",
        figures,
        secrets=s.secrets,
        s=s,
        study=study,
        shown=set(figures),
        curves=[(name, figures[name]["title"]) for name in figures if name.startswith("curve")],
        still=front_svg(s) if s.points else "",
        head=_head(s),
        choice=_choice(s),
        config=_config(s, store),
        front=[tables.point_row(s, p) for p in (*s.front, *([s.off_front] if s.off_front and s.front else []))],
        trials=[tables.trial_row(s, t) for t in s.trials],
        phases=tables.phase_names(s),
        failures=tables.failures(s),
        refused=_refused(store),
        hours=hours(s, Store(store.ladder_folder).trials()),
        cut_off=sum(1 for own in (store.folder, store.ladder_folder) for _ in (own / "interrupted").glob("[0-9]*")),
        importance=importance(s),
        unserved=tables.unserved(s),
        errors=errors(s),
        learnt=learnt(s),
        model=s.study.predictor or "an analytic model of the hardware",
        verified=_verified(s, store),
        certified=_certified(store),
        facts=_facts(s),
        frozen=dump(_public(study.frozen)),
        command=f"tuner tune {shlex.quote(study.source)}",
        again=f"tuner report {shlex.quote(str(store.folder))}",
        hours_a_month=HOURS,
        amount=figure,
        label=label,
        ms=ms,
    )


def _refused(store: Store) -> list[tuple[str, int]]:
    """How many combinations each reason refused, the most first: of the whole grid where it was walked, else of the
    proposals."""
    walked: Counter[str] = Counter()
    proposed: Counter[str] = Counter()
    for row in store.refused():
        walked[row["reason"]] += row.get("count", 0)
        proposed[row["reason"]] += not row.get("count", 0)
    return (walked | proposed).most_common()


def _figures(s: Summary) -> dict[str, Figure]:
    found: dict[str, Figure | None] = {"front": charts.front_chart(s)}
    found |= {f"curve{i}": figure for i, figure in enumerate(charts.curve_charts(s))}
    found |= {
        "parallel": parallel_chart(s),
        "importance": charts.importance_chart(importance(s)),
        "errors": charts.error_chart(errors(s)),
    }
    return {name: figure for name, figure in found.items() if figure}


def _head(s: Summary) -> list[tuple[str, str]]:
    study, trials = s.study, s.trials
    noted = next((t.extra for t in trials if t.extra), None) or {}
    version = noted.get("engine_version") or ""
    return [
        ("Model", study.model),
        ("Engine", f"{study.engine.kind} {version}".strip()),
        ("Hardware", s.hardware),
        ("Trace", _trace(s)),
        ("SLOs", ", ".join(map(str, study.objective.slos)) or "none"),
        ("Trials", ", ".join(f"{n} {name}" for name, n in s.kinds().items()) or "none yet"),
        ("Measured", _dates(s)),
        ("Price", s.price),
    ]


def _trace(s: Summary) -> str:
    name = Path(s.study.trace.file).name
    return f"{name}: {s.traffic.measured}" if s.traffic else name


def _dates(s: Summary) -> str:
    if not s.trials:
        return "-"
    first, last = (_minute(at_s) for at_s in (min(t.started_s for t in s.trials), max(t.ended_s for t in s.trials)))
    return f"{first} to {last[11:] if first[:10] == last[:10] else last} UTC"


def _minute(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M")


def _choice(s: Summary) -> dict[str, Any]:
    """The recommendation's figures and words."""
    choice, point = s.choice, s.choice.point
    # ablation's text is a list: a paragraph each
    paragraphs = [part.strip().removeprefix("- ") for part in choice.text.split("\n") if part.strip()]
    if point is None:
        return {"point": None, "paragraphs": paragraphs, "flags": []}
    return {
        "point": point,
        "paragraphs": paragraphs,
        "cost": figure(point.cost),
        "cost_range": _range(point.cost_interval),
        "cost_change": _change(choice.cost_change),
        "latency": ms(point.latency),
        "latency_range": _range(point.latency_interval, 1e3),
        "latency_change": _change(choice.latency_change),
        "load": figure(point.load),
        "flags": s.flags(point.config),
    }


def _range(interval: tuple[float, float] | None, scale: float = 1.0) -> str:
    if interval is None:
        return ""
    low, high = (figure(x * scale) for x in interval)
    return f"{low} to {high}" if math.isfinite(interval[1]) else f"≥ {low}"


def _change(change: Change | None) -> dict[str, Any] | None:
    if change is None:
        return None
    return {
        "value": f"{change.value * 100:+.1f} %".replace("-", "−"),
        "range": change.range.replace("-", "−"),
        "kind": "unsure" if not change.proven else "better" if change.value < 0 else "worse",
    }


def _config(s: Summary, store: Store) -> tuple[str, tuple[str, ...]]:
    """The exported file's settings, without its comments, and the commands that serve it."""
    try:
        what = deployment(store, s.study, s.choice, s.trials)
    except NothingFeasible:
        return "", ()
    return dump(vllm.settings(what)), vllm.start(what)


def _verified(s: Summary, store: Store) -> dict[str, Any] | None:
    """``verify.json`` as a paragraph list and a table, whatever columns it has; what its launches measured so far where
    it was not finished."""
    path = store.folder / "verify.json"
    data = read_json(path) if path.exists() else None
    launches = [t for t in s.trials if t.role == "verify" and not t.again]  # what was broken off is made again
    each = tables.folded(tables.windows(s, launches)) if launches else None
    if not isinstance(data, Mapping):
        many = f"{len(launches)} launch{'es' if len(launches) > 1 else ''}"
        words = f"Not finished: {many} so far, and nothing is concluded from them. "
        words += "The same tuner tune goes on."
        return {"paragraphs": [words], "table": None, "launches": each} if launches else None
    with AsWritten(path):
        rows = [row for row in data.get("rows", ()) if isinstance(row, Mapping)]
        return {
            "paragraphs": [part.strip() for part in plain(str(data.get("text", ""))).split("\n\n") if part],
            "table": tables.folded(tables.verdict_rows(rows)),
            "tested": any(row.get("p_not_better") is not None for row in rows),
            "launches": each,
        }


def _certified(store: Store) -> list[tuple[str, str, list[str]]]:
    """What ``tuner verify`` found, newest first: when, its verdict, and each line after it."""
    found = []
    for event in reversed(Store(store.folder / "certify").events()):
        if event["event"] == "certified":
            verdict, *lines = plain(event["text"]).splitlines()
            found.append((f"{_minute(event['at_s'])} UTC", verdict, [line.removeprefix("- ") for line in lines]))
    return found


def _facts(s: Summary) -> list[tuple[str, str]]:
    found: dict[str, Any] = {"tuner": tuner.__version__, "report made on Python": platform.python_version()}
    found |= dict(s.study.space.facts)
    noted = next((t.extra for t in reversed(s.trials) if t.extra), None) or {}
    found |= {k: v for k, v in noted.items() if k in ("engine_version", "device", "driver", "cuda", "host")}
    found |= {"sampler": s.study.sampler, "seed": s.study.seed, "search space": s.study.space.name}
    return [
        (name.replace("_", " "), f"{value:g}" if isinstance(value, float) else str(value))
        for name, value in found.items()
    ]


def _public(data: Any) -> Any:
    """The frozen study without the values of secrets."""
    if isinstance(data, Mapping):
        return {k: HIDDEN if is_secret(str(k)) and isinstance(v, str) else _public(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [_public(value) for value in data]
    return data
