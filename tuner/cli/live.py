"""The live view of a running study on stderr: a few lines that change, or plain lines where it is no terminal."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tuner.errors import alike, printable
from tuner.pareto.changes import describe
from tuner.record.secrets import hide, secrets
from tuner.report.console import printer
from tuner.spec.study import USERS
from tuner.study.outcome import Aborted, Infeasible, Measured, Step, held
from tuner.study.price import COST
from tuner.words import figure

if TYPE_CHECKING:
    from tuner.spec.study import Study
    from tuner.study.session import Prepared

Trial = int | str  # a trial's number, or ``ladder``: the launch that settles the loads


class View:
    """Takes the loop's events from any thread; draws about four times a second, or prints one line per event."""

    def __init__(self, study: Study, plain: bool) -> None:
        self.study = study
        self.plain = plain
        self.secrets = secrets(study, ())
        self.default = study.space.config(study.space.default(), study.model)
        self.console = printer(stderr=True)
        self.began_s = time.monotonic()
        self.running: dict[Trial, dict[str, Any]] = {}
        self.points: list[tuple[int, float, float, float]] = []
        self.failures: Counter[str] = Counter()
        self.not_passed: set[str] = set()
        self.nodes: list[dict[str, Any]] = []
        self.refused = ""
        self.budget = ""
        self.done = 0
        self.live: Live | None = None

    def __enter__(self) -> View:
        if not self.plain:
            self.live = live = Live(self, console=self.console, refresh_per_second=4, transient=True)
            live.start()
        if self.study.engine.kind == "emulator":
            self.say(f"EMULATED: a model of the hardware answers, nothing is measured{_slow(self.study)}.")
        if self.study.hardware.gpus == 0 and self.study.engine.kind in ("vllm", "sglang", *USERS):
            from tuner.search.hardware import strangers

            if here := strangers():
                self.say(f"This machine has {here}, which tuner cannot tune: all is measured as a CPU server's.")
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        text = hide(text, self.secrets)
        if self.plain:
            print(f"{printable(text)}\n", end="", file=sys.stderr, flush=True)  # one write: threads say things too
        else:
            self.console.print(text)

    def stopping(self) -> None:
        """What an interrupt ends, and what it waits for."""
        waits = {
            "function": " when the function has answered",
            "attach": ": the running replay is ended first",
        }.get(self.study.engine.kind, ": the running server is shut down first")
        self.say(f"Stopping{waits if self.running else ''}. Again to leave at once.")

    def begin(self, ready: Prepared) -> None:
        from tuner.executor.cluster import device
        from tuner.study.budget import shared_out

        study, rps = self.study, ready.traffic.rps
        on = device(study, study.space.gpu)
        self.say(
            f"Study {study.name}: {study.engine.kind} {ready.engine.version()} on {on}, "
            f"{len(study.space.parameters)} parameters, ladder {', '.join(f'{x:g}' for x in study.load.ladder)}"
            + ("" if study.engine.kind == "function" else f" with up to {len(ready.traffic.search[0])} requests each")
            + (f"; load 1 is {figure(rps)} requests/s" if rps else "")
        )
        self.say(f"Budget: {shared_out(study.budget)}.")
        for note in ready.traffic.notes:
            self.say(f"Trace: {note}")
        if ready.no_model:
            self.say(f"No analytic model: {ready.no_model}. The search works without one.")
        for said in filter(None, (ready.cramped(), ready.idle(), ready.untried(), ready.unread())):
            self.say(said)

    def on_event(self, name: str, data: Any) -> None:
        """One of the loop's or the engine's events."""
        handler = getattr(self, f"_on_{name}", None)
        if handler:
            handler(data.get("trial", -1), data)

    def _on_refused(self, _: int, data: Any) -> None:
        reasons = data["reasons"]
        self.refused = f"{sum(reasons.values())} of {data['of']} combinations refused before any launch"
        if reasons:
            self.say(self.refused)
            for reason, count in alike(reasons).items():
                self.say(f"  {count} x {reason}")

    def _on_say(self, _: int, data: Any) -> None:
        self.say(data["text"])

    def _on_not_passed(self, _: int, data: Any) -> None:
        new = [name for name in data["variables"] if name not in self.not_passed]
        self.not_passed.update(new)
        if new:
            self.say(f"Not handed on to servers from your shell: {', '.join(new)}. engine.env in the study does.")

    def _on_budget(self, _: int, data: Any) -> None:
        self.budget = data["left"]

    def _on_launch(self, trial: Trial, data: Any) -> None:
        flags = describe(data["config"], self.default)
        self.running[trial] = {"since_s": time.monotonic(), "phase": "starting", "flags": flags, "why": data["why"]}
        if self.plain:
            on = f" on {data['node']}" if data.get("node") else ""
            self.say(f"[{trial}] launching{on} ({data['why']}): {flags}")

    def _on_nodes(self, _: int, data: Any) -> None:
        before = {node["name"]: node["alive"] for node in self.nodes}
        self.nodes = data["nodes"]
        for node in self.nodes:
            if node["alive"] != before.get(node["name"], False):
                self.say(f"node {node['name']}: {_gpus(node) if node['alive'] else 'gone'}")

    def _on_lost(self, trial: Trial, data: Any) -> None:
        self.running.pop(trial, None)
        self.say(f"[{trial}] back to the queue, once: {data['why']}")

    def _on_waiting(self, trial: Trial, data: Any) -> None:
        self.running.get(trial, {}).update(phase="waiting")
        self.say(f"[{trial}] waiting: {data['for']}")

    def _on_phase(self, trial: Trial, data: Any) -> None:
        if trial in self.running:
            self.running[trial]["phase"] = data.get("name", "")
            self.running[trial].pop("progress", None)

    def _on_step(self, trial: Trial, data: Any) -> None:
        place = f"{data['index']}/{data['of']} " if data["of"] else ""
        phase = f"replaying {place}at load {figure(data['load'])}"
        self.running.get(trial, {}).update(phase=phase, step=phase)
        if self.plain:
            self.say(f"[{trial}] {phase}")

    def _on_progress(self, trial: Trial, data: Any) -> None:
        state = self.running.get(trial, {})
        state.update(progress=data, phase=state.get("step", state.get("phase")))  # what came before it is over

    def _on_measured(self, trial: Trial, data: Any) -> None:
        if self.plain:
            bad = [*data["misses"], *data["untrusted"]]
            self.say(f"[{trial}] load {figure(data['load'])}: {'; '.join(bad) if bad else 'within SLO'}")

    def _on_trial(self, trial: Trial, data: Any) -> None:
        self.running.pop(trial, None)
        outcome = data["outcome"]
        good = [step for step in outcome.steps if step.ok]
        key = self.study.objective.latency_key
        if isinstance(trial, int):
            self.done += 1
        if isinstance(trial, int) and data["role"] == "search":
            self.points += [
                (trial, step.load, step.metrics.get(COST, float("inf")), step.metrics.get(key, 0.0)) for step in good
            ]
        where = f" (another tuner, on {data['elsewhere']})" if data.get("elsewhere") else ""
        self.say(f"[{trial}] {self._told(outcome, good)}{where}")

    def _told(self, outcome: Any, good: list[Step]) -> str:
        if isinstance(outcome, Infeasible):
            self.failures[outcome.cause] += 1
            proof = f" ({outcome.evidence})" if outcome.evidence and outcome.cause == "crash" else ""
            return f"cannot serve ({outcome.cause}): {outcome.message}{proof}"
        if not isinstance(outcome, Measured) and not good:
            words = getattr(outcome, "reason", "") or "; ".join(getattr(outcome, "reasons", ()))
            self.failures[type(outcome).__name__.lower()] += 1
            return f"{type(outcome).__name__.lower()}: {words}"
        if not good:
            self.failures["slo missed"] += 1
            return f"no load within SLO: {'; '.join(outcome.steps[-1].slo_misses)}"
        windows = held(outcome.steps)
        loads = sorted(step.load for step in windows.values() if step)
        if len(windows) > 1:  # each was measured at loads of its own
            nowhere = f", at none on {len(windows) - len(loads)}" if len(loads) < len(windows) else ""
            return f"held up to load {_ends(loads)} on {len(windows)} windows{nowhere}"
        best = min(good, key=lambda step: step.metrics.get(COST, float("inf")))
        latency = best.metrics.get(self.study.objective.latency_key, float("nan"))
        cost = best.metrics.get(COST, float("nan"))
        stopped = isinstance(outcome, Aborted)
        return (f"stopped ({outcome.reason}); held up to load " if stopped else "capacity ") + (
            f"{figure(loads[-1])}, {figure(cost)} USD/M output tokens, "
            f"{self.study.objective.latency} {latency * 1e3:.1f} ms"
        )

    def __rich__(self) -> Group:
        parts: list[Any] = []
        elapsed = time.monotonic() - self.began_s
        emulated = "  EMULATED" if self.study.engine.kind == "emulator" else ""
        head = f"{self.study.name}{emulated}  {self.done} trial{'s' * (self.done != 1)} done, {_clock(elapsed)}"
        parts.append(Text(head + (f", left: {self.budget}" if self.budget else ""), style="bold"))
        for node in self.nodes:
            runs = f"trial {', '.join(map(str, node['trials']))}" if node["trials"] else "idle"
            text = f"  node {node['name']}  {_gpus(node)}  {runs if node['alive'] else 'gone'}"
            parts.append(Text(text, style="" if node["alive"] else "yellow"))
        if not self.running and self.done:
            parts.append(Text("  working out what comes next", style="dim"))
        for number, state in sorted(self.running.items()):
            progress = state.get("progress") or {}
            share = f"  {progress['done']}/{progress['total']} requests" if progress.get("total") else ""
            remaining = f", {_clock(progress['remaining_s'])} left" if progress.get("remaining_s") else ""
            age = _clock(time.monotonic() - state["since_s"])
            name = f"trial {number}" if isinstance(number, int) else number
            parts.append(Text(f"  {name}  {state['phase']}{share}{remaining}  ({age})"))
            what = f"    {state['flags']} ({state['why']})"  # a narrow terminal cuts the end off: not what is launched
            parts.append(Text(what, style="dim", overflow="ellipsis", no_wrap=True))
        front = self._front()
        if front:
            table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
            for title in ("trial", "load", "USD/M output tokens", f"{self.study.objective.latency} ms"):
                table.add_column(title, justify="right")
            parts.append(Text("  front of the search", style="dim"))
            for trial, load, cost, latency in front:
                table.add_row(str(trial), figure(load), figure(cost), f"{latency * 1e3:.1f}")
            parts.append(table)
        if self.failures:
            parts.append(
                Text("  failed: " + ", ".join(f"{n} x {why}" for why, n in self.failures.most_common()), style="yellow")
            )
        return Group(*parts)

    def _front(self) -> list[tuple[int, float, float, float]]:
        """The non-dominated points so far, cheapest first."""
        best: list[tuple[int, float, float, float]] = []
        for point in sorted(self.points, key=lambda p: (p[2], p[3])):
            if not best or point[3] < best[-1][3]:
                best.append(point)
        return best[:8]


def _ends(loads: list[float]) -> str:
    low, high = (figure(loads[i]) for i in (0, -1))
    return low if low == high else f"{low} to {high}"


def _slow(study: Study) -> str:
    """What an emulated study may be told of its clock; empty where it does not wait."""
    if study.engine.options.get("clock", "wall") == "virtual":
        return ""
    return (
        ", in as much time as a real study takes (without waiting: clock: virtual in engine.options, in a study file)"
    )


def _gpus(node: dict[str, Any]) -> str:
    if not node["gpus"]:
        return "no GPU"
    return f"{node['gpus']} x {node['device']}" if node["device"] else f"{node['gpus']} GPUs"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
