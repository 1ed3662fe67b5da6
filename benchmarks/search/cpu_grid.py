"""The search on a real server's own exhaustive grid: every configuration of a small space was measured once on a CPU
vLLM, and searches are replayed on that table.

    tuner tune benchmarks/search/cpu_grid.yaml                  # ``sampler: grid``: twenty minutes
    python -m benchmarks.search.cpu_grid table STUDY_FOLDER
    python -m benchmarks.search.cpu_grid replay --seeds 20      # regret after 6 launches, ours and TPE

The table (``cpu_grid.json``) holds the space, the objective, and per configuration the steps of its ladder, the seconds
of its launch and what the analytic model had predicted before it (the study's records hold that). A replayed launch
answers with what was measured then: the table has one measurement per configuration, so its noise is part of its truth,
and a search differs from another by its seed alone. Ours is replayed with those predictions, with the model itself,
whose constants the launches then correct (the study above, on this machine: its row of the hardware table), and with
neither. Regret is counted against the table's own front, in logarithms, the reference being its worst cost and worst
latency within SLO.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.search.table import middle
from tuner.errors import UsageError
from tuner.pareto.volume import hypervolume
from tuner.search import choose, ledger
from tuner.search.ledger import COST_KEY
from tuner.search.prediction import Prediction
from tuner.space.config import ServingConfig
from tuner.space.space import Emission, Parameter, SearchSpace
from tuner.spec.objective import Objective
from tuner.spec.slo import Slo
from tuner.spec.study import Study
from tuner.study.outcome import Boot, Measured, Step
from tuner.study.store import Store

TABLE = Path(__file__).parent / "cpu_grid.json"
EARLY, LAUNCHES = 4, 6


def make(folder: Path) -> dict[str, Any]:
    """The table of one finished study; verification and repeated launches are left out."""
    from tuner.spec.studyfile import load

    study = load(Store(folder).study_file)
    objective = study.objective
    keys = [COST_KEY, objective.latency_key, *(s.key for s in objective.slos)]
    rows = []
    for trial in Store(folder).launched("search"):
        steps = trial.outcome.steps if isinstance(trial.outcome, Measured) else ()
        rows.append(
            {
                "params": dict(trial.params),
                "seconds": round(trial.ended_s - trial.started_s, 1),
                "start_s": round(trial.outcome.boot.total_s, 1) if isinstance(trial.outcome, Measured) else 0.0,
                "steps": [
                    [s.load, {k: _short(s.metrics[k]) for k in dict.fromkeys(keys) if k in s.metrics}] for s in steps
                ],
                "predicted": [
                    [float(load), {k: _short(of[k]) for k in dict.fromkeys(keys) if k in of}]
                    for load, of in (trial.extra or {}).get("predicted", {}).items()
                ],
            }
        )
    return {
        "space": [
            {"name": p.name, "values": list(p.values), "default": p.default, "numeric": p.numeric}
            for p in study.space.parameters
        ],
        "latency": objective.latency,
        "slos": [[s.metric, s.limit] for s in objective.slos],
        "price_usd_per_gpu_hour": objective.price_usd_per_gpu_hour,
        "rows": rows,
    }


def _short(value: float) -> float | None:
    """Five figures; None for what never came."""
    return float(f"{value:.5g}") if np.isfinite(value) else None


class Predicted:
    """What the analytic model had said of each configuration of the table."""

    def __init__(self, table: Mapping[str, Any], space: SearchSpace) -> None:
        self.space = space
        self.known = {tuple(space.snap(r["params"]).values()): dict(map(tuple, r["predicted"])) for r in table["rows"]}

    def predict(self, config: ServingConfig, load: float) -> Prediction:
        metrics = self.known[tuple(self.space.snap(config.params).values())][load]
        return Prediction(True, {k: float("inf") if v is None else v for k, v in metrics.items()})


class Modelled:
    """The analytic model of the study, asked for configurations of the table."""

    def __init__(self, study: Study, model: Any) -> None:
        self.study, self.model = study, model

    def predict(self, config: ServingConfig, load: float) -> Prediction:
        space = self.study.space
        return self.model.predict(space.config(space.snap(config.params), self.study.model), load)

    def doubts(self) -> Mapping[str, float]:
        return self.model.doubts()

    def scaled(self, factors: Mapping[str, float]) -> Modelled:
        return Modelled(self.study, self.model.scaled(factors))


def modelled() -> Modelled:
    """The model of ``cpu_grid.yaml`` on this machine; raises UsageError where its model folder is missing."""
    from tuner.spec.studyfile import load
    from tuner.study import session, workload

    study = load(TABLE.with_suffix(".yaml"))
    model, why = session.model_of(study, workload.read(study))
    if model is None:
        raise UsageError(why)
    return Modelled(study, model)


def replay(
    table: Mapping[str, Any],
    method: str,
    ladder: bool,
    seed: int,
    launches: int = LAUNCHES,
    predictor: Any = None,
) -> list[float]:
    """Regret after each launch of one search on the table."""
    import optuna
    from optuna.distributions import IntDistribution

    space, objective = space_of(table), objective_of(table)
    loads = tuple(sorted({step[0] for row in table["rows"] for step in row["steps"]}))
    known = {tuple(space.snap(row["params"]).values()): row for row in table["rows"]}
    name = "auto" if method == "ours" else method
    sampler = choose.sampler(name, space, objective, loads, predictor=predictor, seed=seed)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    distributions = space.distributions()
    if not ladder:
        distributions["load"] = IntDistribution(0, len(loads) - 1)
    reached: list[tuple[float, float]] = []
    launched: set[tuple] = set()
    curve: list[float] = []
    clock = 1.0
    for _ in range(200):  # repeats and what nobody measured cost nothing, and end somewhere
        if len(curve) >= launches:
            break
        trial = study.ask(distributions)
        params = space.snap({k: v for k, v in trial.params.items() if k != "load"})
        trial.set_user_attr("params", params)
        proposal = getattr(sampler, "proposal", lambda _n: None)(trial.number)
        if proposal is not None and proposal.remeasure_of is not None:
            trial.set_user_attr("remeasure_of", proposal.remeasure_of)
        key = tuple(params.values())
        place = None if ladder else trial.params["load"]
        outcome = _outcome(known[key], objective, None if place is None else loads[place])
        repeated = (key, place) in launched and (proposal is None or proposal.remeasure_of is None)
        launched.add((key, place))
        seconds = known[key]["seconds"]
        ledger.tell(study, trial, space, objective, outcome, started_s=clock, ended_s=clock + seconds, free=repeated)
        clock += seconds
        if not repeated:
            reached += [(s.metrics[COST_KEY], s.metrics[objective.latency_key]) for s in outcome.steps if s.ok]
            curve.append(regret(table, reached))
    return curve


def _outcome(row: Mapping[str, Any], objective: Objective, load: float | None) -> Measured:
    """What was measured: the whole ladder, or one of its loads. A load beyond the first miss was not measured then:
    its launch gives the step of that miss."""
    steps = []
    for at, metrics in row["steps"]:
        values = {k: float("inf") if v is None else v for k, v in metrics.items()}
        misses = tuple(text for slo in objective.slos if (text := slo.miss(values)))
        steps.append(Step(at, "search-0", values, slo_misses=misses))
    if load is not None:
        steps = [next((s for s in steps if s.load >= load), steps[-1])]
    return Measured(tuple(steps), Boot(row["start_s"]))


def regret(table: Mapping[str, Any], points: list[tuple[float, float]]) -> float:
    """1 - the points' share of the whole table's hypervolume."""
    objective = objective_of(table)
    every = [
        (s.metrics[COST_KEY], s.metrics[objective.latency_key])
        for row in table["rows"]
        for s in _outcome(row, objective, None).steps
        if s.ok
    ]
    reference = (max(p[0] for p in every), max(p[1] for p in every))
    return 1 - hypervolume(points, reference, log=True) / hypervolume(every, reference, log=True)


def space_of(table: Mapping[str, Any]) -> SearchSpace:
    made = []
    for p in table["space"]:
        flags = tuple(Emission({p["name"].replace("_", "-"): v}) for v in p["values"])
        numeric = bool(p["numeric"])
        made.append(Parameter(p["name"], tuple(p["values"]), flags, p["default"], numeric=numeric, log=numeric))
    return SearchSpace("cpu-grid", "table", tuple(made))


def objective_of(table: Mapping[str, Any]) -> Objective:
    slos = tuple(Slo(metric, limit) for metric, limit in table["slos"])
    return Objective("cpu-grid", table["latency"], slos, table["price_usd_per_gpu_hour"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("table").add_argument("folder", type=Path)
    verbs.add_parser("replay").add_argument("--seeds", type=int, default=20)
    args = parser.parse_args()
    if args.verb == "table":
        found = make(args.folder)
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items() if k != "rows"]
        rows = ",\n".join(json.dumps(row) for row in found["rows"])
        TABLE.write_text("{" + ",\n".join([*lines, f'"rows": [\n{rows}\n]']) + "}\n")
        print(f"{len(found['rows'])} configurations in {TABLE.name}")
        return
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", module="optuna")
    table = json.loads(TABLE.read_text())
    print(f"{len(table['rows'])} configurations; regret over {args.seeds} seeds, median (quartiles)\n")
    print(f"| method | after {EARLY} launches | after {LAUNCHES} launches | mean of these |\n|---|---|---|---|")
    known = Predicted(table, space_of(table))
    for method, ladder, predictor, with_what in (
        ("ours", True, modelled(), "ladder, the model corrected by launches"),
        ("ours", True, known, "ladder, the model as it was"),
        ("ours", True, None, "ladder, no model"),
        ("tpe", True, None, "ladder"),
        ("tpe", False, None, "one load"),
        ("random", True, None, "ladder"),
    ):
        curves = np.array([replay(table, method, ladder, seed, predictor=predictor) for seed in range(args.seeds)])
        early, last = curves[:, EARLY - 1], curves[:, -1]
        print(f"| {method}, {with_what} | {middle(early)} | {middle(last)} | {last.mean():.3f} |", flush=True)


if __name__ == "__main__":
    main()
