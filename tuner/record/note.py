"""The parent run's page in MLflow: the choice, the front, how to deploy it. Markdown."""

from __future__ import annotations

import re

from tuner.export import vllm
from tuner.export.deployment import deployment
from tuner.pareto.changes import baseline_of, describe
from tuner.pareto.front import front, points, searched
from tuner.pareto.recommend import recommended
from tuner.pareto.traffic import traffic
from tuner.spec.study import Study
from tuner.study.store import Store
from tuner.words import figure

CHARACTERS = 4500  # MLflow shows a note of at most 5,000


def markdown(store: Store, study: Study) -> str:
    """The note of a study, from its folder alone."""
    trials = store.trials()
    objective = study.objective
    default = baseline_of(trials)
    choice = recommended(store, study, trials)
    lines = [f"# {study.name}", ""]
    if any(t.emulated for t in trials):
        lines += ["**EMULATED: these numbers come from a model of the hardware, nothing was measured.**", ""]
    served = traffic(trials, objective, choice.point, choice.cost_change)
    lines += [_plain(choice.text), "", *([str(served), ""] if served else [])]
    lines += [f"SLOs: {', '.join(map(str, objective.slos)) or 'none'}.", ""]
    if choice.point:
        lines += ["## Deploy", ""]
        lines += [
            "`best-config.yaml` and `best-config.env` are among this run's artifacts and in the study folder.",
            "",
        ]
        if start := vllm.start(deployment(store, study, choice, trials)):
            lines += ["```sh", *start, "```", ""]
            lines += [f"As a deployment: `tuner export {store.folder} --format compose` (or `k8s`, `helm`).", ""]
    best = front(points(searched(trials), objective))
    rows, off = [], choice.off(best)
    for p in [*([off] if off else []), *best]:
        name = _code(describe(p.config, default.config if default else None))
        name += " **recommended**" if choice.marks(p, best) else ""
        rows.append(f"| {figure(p.cost)} | {figure(p.latency * 1e3, 4)} | {figure(p.load)} | {p.trial} | {name} |")
    if rows:
        lines += [
            "## Front",
            "",
            f"| $ per M output tokens | {objective.latency} (ms) | load | trial | configuration |",
        ]
        lines.append("|---:|---:|---:|---:|---|")
    for index, row in enumerate(rows):
        if sum(map(len, lines)) + len(row) > CHARACTERS:
            lines += ["", f"{len(rows) - index} more points are in the report."]
            break
        lines.append(row)
    return "\n".join(lines)


def _plain(text: str) -> str:
    """``text`` in which no value of a parameter is an element of the page."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


def _code(text: str) -> str:
    """``text`` as code in a row of a table, whatever characters it has."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    room = " " if "`" in text else ""
    return f"{fence}{room}{' '.join(text.split())}{room}{fence}".replace("|", "\\|")
