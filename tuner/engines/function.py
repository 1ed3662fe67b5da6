"""The engine ``function``: bring your own evaluator. A callable instead of a server; the study runs unchanged."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import math
import os
import re
import sys
import threading
import traceback
from asyncio.exceptions import CancelledError
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from tuner.engines.protocol import Cancelled, Endpoint, LaunchFailed, Site, StepPlan, Teardown
from tuner.errors import Infeasible as SaysInfeasible
from tuner.errors import UsageError, encodable
from tuner.space.config import ServingConfig, Value
from tuner.spec.objective import Objective
from tuner.spec.study import Study
from tuner.study.outcome import Boot, Infeasible, Step
from tuner.study.price import COST, GOODPUT, told

_NEVER_NEGATIVE = re.compile(r"(ttft|tpot|itl|e2e|cost)_|error_rate$|.*_per_s$")  # other names are the function's own

Evaluate = Callable[..., Mapping[str, float]]  # of the parameters (a dict) and the load
RAISED = (Exception, SystemExit, GeneratorExit, CancelledError)  # of the user's code: an interrupt is not
FILES = "files"  # in a trial's folder: a callable's own, beside what is ours (a config.json, say)


class FunctionEngine:
    """Implements :class:`tuner.engines.protocol.Engine` over ``target``, ``package.module:callable``.

    The callable gets the serving parameters (a dict, a copy) and the load (a float), and returns a mapping of metrics
    under the names of :class:`tuner.study.outcome.Step` (latencies in seconds: ``tpot_p99_s``), or raises
    ``tuner.Infeasible(reason)``. ``required`` names must be in it, and one of ``output_tokens_per_s``,
    ``goodput_output_tokens_per_s`` and ``cost_usd_per_mtok_output``. Where only the output is given, all of it counts
    as goodput, less the ``error_rate``; an absent ``error_rate`` is 0. A callable with a keyword-only argument
    ``folder``, without a default, gets a folder of the trial's own for what it writes.

    ``folder`` is where the module is looked for first. Any other exception of the callable is that trial's outcome (a
    crash), not the study's end; so is an answer that is none, but for the ``default`` parameters.
    """

    kind = "function"

    def __init__(
        self,
        *,
        target: str,
        folder: str | Path = ".",
        required: tuple[str, ...] = (),
        default: Mapping[str, Value] | None = None,
        emulated: bool = False,
    ) -> None:
        self.target, self.folder, self.required, self.emulated = target, Path(folder), required, bool(emulated)
        self.default = default
        self.home = Path.cwd()  # paths of the study are relative: a callable may go elsewhere, we stay
        self._evaluate: Evaluate | None = None

    @classmethod
    def from_study(cls, study: Study) -> FunctionEngine:
        """The engine of a study; the module is looked for beside the study file, also when the study is resumed."""
        if not isinstance(study.engine.options.get("target"), str):
            raise UsageError(
                "the function engine needs a target",
                where=study.source,
                fix='write engine: {kind: function, options: {target: "module:callable"}}',
            )
        default = study.space.config(study.space.default(), study.model).params
        return cls(folder=beside(study), required=needed(study.objective), default=default, **study.engine.options)

    def version(self) -> str:
        """See the protocol: the target."""
        return self.target

    def flags(self) -> frozenset[str] | None:
        """See the protocol: any. The target is imported here, so that a bad one is refused before the study starts."""
        self.evaluate()
        return None

    def evaluate(self) -> Evaluate:
        """The callable. Raises ``UsageError`` where there is none."""
        if self._evaluate is None:
            self._evaluate = load_target(self.target, self.folder)
        return self._evaluate

    def launch(self, config: ServingConfig, site: Site) -> FunctionServer:
        """See the protocol. Nothing starts."""
        if site.cancel.is_set():
            raise Cancelled
        evaluate = self.evaluate()
        if _takes_folder(evaluate):
            folder = site.folder / FILES
            folder.mkdir(exist_ok=True)
            evaluate = partial(evaluate, folder=folder)
        return FunctionServer(evaluate, config, self)


class FunctionServer:
    """Implements :class:`tuner.engines.protocol.Server`: a step is one call."""

    def __init__(self, evaluate: Evaluate, config: ServingConfig, engine: FunctionEngine) -> None:
        self.endpoint: Endpoint | None = None
        self.boot = Boot()
        self._evaluate, self._config, self._engine = evaluate, config, engine

    def measure(self, plan: StepPlan) -> Step:
        """See the protocol; writes no records. Raises ``UsageError`` where the answer is not a mapping of metrics."""
        if plan.cancel.is_set():
            raise Cancelled
        try:
            with printing_aside():
                answer = self._evaluate(dict(self._config.params), plan.load)
        except SaysInfeasible as error:
            raise LaunchFailed(refused(error)) from None
        except RAISED as error:
            raise LaunchFailed(_crash(error, plan.load)) from error
        finally:
            os.chdir(self._engine.home)
        try:
            metrics = checked(answer, self._engine.target, self._engine.required)
            misses = tuple(miss for slo in plan.slos if (miss := slo.miss(metrics)))
            if not misses and not metrics.get(COST, metrics.get(GOODPUT, 0.0)):
                raise UsageError(f"{self._engine.target} returned no tokens where every SLO is met: there is no cost")
        except UsageError as error:
            if self._engine.default in (None, self._config.params):
                raise  # the study's first launch: nothing will come of it
            raise LaunchFailed(wrong(error)) from error
        return Step(load=plan.load, window=plan.window, metrics=metrics, slo_misses=misses)

    def stop(self) -> Teardown:
        """See the protocol; there is nothing to stop."""
        return Teardown()


_aside_lock = threading.Lock()
_aside: list[Any] = []  # what stdout was, once for each callable that runs, and the file behind it


@contextmanager
def printing_aside() -> Iterator[None]:
    """What is printed within goes to stderr, that of processes which are started there, too: stdout is for data.
    Several threads may be within at once."""
    with _aside_lock:
        _aside.append(_aside[0] if _aside else (sys.stdout, _to_stderr()))
        sys.stdout = sys.stderr
    try:
        yield
    finally:
        with _aside_lock:
            before, file = _aside.pop()
            if not _aside:
                sys.stdout = before
                if file is not None:
                    os.dup2(file, 1)
                    os.close(file)


def _to_stderr() -> int | None:
    """Makes file 1 another name of file 2; returns what it was. None where there is no such file."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        before = os.dup(1)
        with suppress(OSError):
            os.dup2(2, 1)
        return before
    return None


def checked(answer: Any, target: str, required: Sequence[str] = ()) -> dict[str, float]:
    """What the callable ``target`` answered, as metrics that are complete. Raises ``UsageError`` where it is not a
    mapping of numbers, or lacks one of the ``required`` names or a cost; the first of those names ranks."""
    if not isinstance(answer, Mapping):
        raise UsageError(
            f"{target} returned {type(answer).__name__}, not a mapping of metrics",
            fix="return for example {'tpot_p99_s': 0.02, 'output_tokens_per_s': 900.0}",
        )
    try:
        pairs = [(encodable(str(name)), value) for name, value in answer.items()]
    except Exception as error:
        raise UsageError(f"{target} returned a mapping that cannot be read: {raised_in(error)}") from error
    metrics: dict[str, float] = {}
    for name, value in pairs:
        try:
            metrics[name] = float(value)
        except OverflowError:
            raise UsageError(f"{target} returned a {name} that is too large for a number") from None
        except Exception:
            raise UsageError(f"{target} returned {name}={_text(value, repr)}, which is not a number") from None
        if math.isnan(metrics[name]):
            raise UsageError(f"{target} returned {name}=nan", fix="leave out what was not measured")
        if metrics[name] < 0 and _NEVER_NEGATIVE.match(name):
            raise UsageError(f"{target} returned {name}={metrics[name]:g}, which cannot be negative")
        if name in (COST, *required[:1]) and not metrics[name]:
            raise UsageError(f"{target} returned {name}=0: what configurations are ranked by is above zero")
        if name.endswith("_per_s") and math.isinf(metrics[name]):
            raise UsageError(f"{target} returned {name}=inf: only a latency may be endless")
        if name == "error_rate" and metrics[name] > 1:
            raise UsageError(f"{target} returned {name}={metrics[name]:g}, which is a share: 1 at most")
    missing = [name for name in required if name not in metrics]
    if missing:
        raise UsageError(
            f"{target} did not return {', '.join(missing)}, which the objective needs",
            fix=f"it returned {', '.join(sorted(metrics)) or 'nothing'}",
        )
    return told(metrics, target)


def beside(study: Study) -> Path:
    """The folder in which a study's callables are looked for first: the study file's, also where it is resumed."""
    return Path(study.frozen.get("frozen", {}).get("beside") or Path(study.source).parent)


def needed(objective: Objective) -> tuple[str, ...]:
    """The metrics that an answer must have: the objective's latency first, and what has an SLO."""
    others = {slo.key for slo in objective.slos} - {"error_rate", objective.latency_key}
    return (objective.latency_key, *sorted(others))


def load_target(target: str, folder: Path) -> Evaluate:
    """The callable that ``package.module:callable`` (or ``file.py:callable``) names, looked for in ``folder`` first.

    Raises ``UsageError``.
    """
    where, _, name = target.partition(":")
    if not where or not name:
        raise UsageError(f"bad target {target!r}", fix="write package.module:callable")
    try:
        with printing_aside():
            module = _from_file(folder / where) if where.endswith(".py") else _from_name(where, folder)
    except UsageError:
        raise
    except RAISED as error:
        why = f"it cannot be imported: {raised_in(error)}"
        if isinstance(error, ModuleNotFoundError) and error.name == where.partition(".")[0]:
            why = f"there is no module {error.name}"
        raise UsageError(f"{target}: {why}", fix=f"looked in {folder} first") from error
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise UsageError(f"{where} has no callable {name!r}", where=str(module.__file__ or ""))
    return found  # type: ignore[return-value]


def _takes_folder(evaluate: Evaluate) -> bool:
    try:
        wanted = inspect.signature(evaluate).parameters.get("folder")
    except (TypeError, ValueError):  # of a callable that has none
        return False
    return wanted is not None and wanted.kind is wanted.KEYWORD_ONLY and wanted.default is wanted.empty


def _from_name(name: str, folder: Path) -> ModuleType:
    """Imports ``name`` with ``folder`` first on the path, where it stays: the callable may import later. A module of
    the same name that came from elsewhere makes way."""
    base = str(folder.resolve())
    if base in sys.path:
        sys.path.remove(base)
    sys.path.insert(0, base)
    first = name.partition(".")[0]
    beside = importlib.machinery.PathFinder.find_spec(first, [base])
    loaded = sys.modules.get(first)
    if beside and loaded and getattr(loaded.__spec__, "origin", None) != beside.origin:
        for other in [m for m in sys.modules if m == first or m.startswith(f"{first}.")]:
            del sys.modules[other]
    importlib.invalidate_caches()
    return importlib.import_module(name)


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tuner_target_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UsageError(f"{path} does not exist")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _crash(error: BaseException, load: float) -> Infeasible:
    return Infeasible(
        "crash",
        encodable(f"the function raised {type(error).__name__}: {_text(error)}"),
        evidence=f"{raised_in(error)} (at load {load:g})",
        fix="correct it (verification asks for loads between the ladder's), or raise tuner.Infeasible(reason)",
        stage="under load",
    )


def refused(error: SaysInfeasible, stage: str = "start-up") -> Infeasible:
    """The outcome of a configuration that the user's code refused."""
    reason = error.reason or "infeasible"
    return Infeasible("infeasible", reason, evidence=f"Infeasible: {reason}", stage=stage)


def wrong(error: UsageError) -> Infeasible:
    """The outcome of a configuration for which the user's code answered what is no answer."""
    return Infeasible("crash", error.message, evidence=error.message, fix=error.fix, stage="under load")


def raised_in(error: BaseException) -> str:
    """``file:line: Kind: text`` of the innermost frame."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    return encodable(f"{at}{type(error).__name__}: {_text(error)}")


def _text(value: object, of: Callable[[object], str] = str) -> str:
    """``value`` as text; it is the user's, and may have none."""
    try:
        return of(value)
    except Exception as error:
        return f"({type(value).__name__} without a text: {type(error).__name__})"
