"""The configurations that may be proposed, as integer codes; what makes two of them the same, and their neighbours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tuner.errors import UsageError
from tuner.space.condition import names
from tuner.space.config import Value, same
from tuner.space.space import Parameter, SearchSpace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WHOLE_GRID = 20_000  # combinations up to which every one is a candidate
MENDED, CHANGES = 200, 60  # draws that are made allowed where hardly any is; changes to each
SAMPLE = 3_000  # seeded combinations beyond that
ASKED_GRID = 1_500  # the same where an analytic model is asked of each (a few milliseconds for a ladder)
ASKED_SAMPLE = 1_000
Key = tuple[int, ...]
Refuse = Callable[[Mapping[str, Value]], str]


@dataclass(slots=True)
class Candidates:
    """All candidates of one study, growing by neighbours where the grid is too large to be held whole.

    A candidate's code has one integer per parameter: the index in its grid, -1 where the parameter does not apply.
    ``numbers[i]`` are the parameters that have the snapped configuration ``params[i]``; its key is its code.
    ``refuse`` says why the machine cannot carry a configuration that no rule denies (None: it carries all): one that
    was launched all the same, elsewhere, is a candidate to learn from, and its number is in ``beyond``.
    """

    space: SearchSpace
    refuse: Refuse | None = None
    params: list[dict[str, Value]] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    index: dict[Key, int] = field(default_factory=dict)
    whole: bool = False
    beyond: set[int] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        space: SearchSpace,
        seed: int,
        *,
        asked: bool = False,
        refuse: Refuse | None = None,
        unfit: Refuse | None = None,
    ) -> Candidates:
        """The whole grid where it is small enough, else a seeded sample; what rules deny, or the machine cannot carry,
        is left out. ``asked``: an analytic model will be asked of each. What is ``unfit`` would be refused before a
        launch as things are known now: it is not drawn, if anything else is, and may join later."""
        found = cls(space, refuse)
        if space.size() <= (ASKED_GRID if asked else WHOLE_GRID):
            found.whole = True
            found.add(space.grid())
            if not found.params:
                raise _all_denied(space, refuse)
            return found
        from numpy.random import default_rng

        rng, order = default_rng([seed, 1]), default_rng([seed, 1, 1])
        sample = ASKED_SAMPLE if asked else SAMPLE
        rare = False  # hardly any draw is allowed
        for drawn in range(8 * sample):
            rare = drawn >= sample and len(found.params) < drawn // 200
            if rare or len(found.params) >= sample:
                break
            params = space.snap(found._within_reach(_drawn(space, rng), order))
            if unfit is None or not (space.denied(params) or unfit(params)):
                found.add([params])
        if unfit and not found.params:
            return cls.of(space, seed, asked=asked, refuse=refuse)
        if rare:
            mended = (found._within_reach(_mended(space, rng), order) for _ in range(MENDED))
            found.add([space.snap(space.default()), *mended])
        if not found.params:
            raise _all_denied(space, refuse)
        return found

    def key(self, params: Mapping[str, Value]) -> Key:
        """What makes a configuration itself: two that give the same server have the same key."""
        active = self.space.active(params)
        return tuple(_code(p, active[p.name]) if p.name in active else -1 for p in self.space.parameters)

    def number(self, params: Mapping[str, Value], *, seen: bool = False) -> int | None:
        """The number of a configuration, which becomes a candidate if it was none (None: a rule denies it). One that
        the machine cannot carry has a number only for who asks of what was ``seen``, not of what may be launched."""
        key = self.key(params)
        if key not in self.index:
            self.add([params], seen=seen)
        found = self.index.get(key)
        return found if seen or found not in self.beyond else None

    def add(self, many: Iterable[Mapping[str, Value]], *, seen: bool = False) -> list[int]:
        """Adds configurations that may be launched (or were: ``seen``) and are not there yet; returns the new
        indices."""
        new = []
        for params in many:
            snapped = self.space.snap(params)
            key = self.key(snapped)
            admitted = key not in self.index and self.admits(snapped)
            if key in self.index or (not admitted and (not seen or self.space.denied(snapped))):
                continue
            if not admitted:
                self.beyond.add(len(self.params))
            self.index[key] = len(self.params)
            new.append(len(self.params))
            self.params.append(snapped)
            self.keys.append(key)
        return new

    def admits(self, params: Mapping[str, Value]) -> bool:
        """Whether a snapped configuration may be launched: no rule denies it, and the machine carries it."""
        return not self.space.denied(params) and not (self.refuse and self.refuse(params))

    def _within_reach(self, params: dict[str, Value], rng: Any) -> dict[str, Value]:
        """A draw of which only the machine's size may speak against: what counts GPUs is set to its least, one after
        another in random order, until it is carried. Most draws of several sizes are beyond a small machine."""
        counting = [p for p in self.space.parameters if p.counts_gpus]
        if self.refuse is None or not counting:
            return params
        tried = self.space.snap(params)
        for j in rng.permutation(len(counting)) if self.refuse(tried) else ():
            tried = self.space.snap({**tried, counting[j].name: min(counting[j].values, key=float)})
            if not self.refuse(tried):
                return tried
        return params

    def neighbours(self, params: Mapping[str, Value]) -> list[dict[str, Value]]:
        """Every configuration that differs in one parameter: by one step on a numeric grid, by any other category."""
        active, found = self.space.active(params), []
        for p in self.space.parameters:
            if p.name not in active:
                continue
            here = _code(p, active[p.name])
            others = [here - 1, here + 1] if p.numeric else range(len(p.values))
            found += [
                {**params, p.name: p.values[there]} for there in others if there != here and 0 <= there < len(p.values)
            ]
        return found

    def codes(self, indices: Sequence[int] | None = None) -> NDArray[np.int64]:
        """The codes as an array (candidates, parameters)."""
        import numpy

        rows = self.keys if indices is None else [self.keys[i] for i in indices]
        return numpy.array(rows, dtype=numpy.int64).reshape(len(rows), len(self.space.parameters))


def _drawn(space: SearchSpace, rng: Any) -> dict[str, Value]:
    return {p.name: p.values[int(rng.integers(len(p.values)))] for p in space.parameters}


def _mended(space: SearchSpace, rng: Any) -> dict[str, Value]:
    """A draw that rules speak against, its parameters changed one by one to what the fewest rules deny (min-conflicts:
    Minton et al. 1992, Artif. Intell. 58): a parameter of a rule that denies it, the others as they are. Where that
    leads nowhere, the rules deny it still."""
    params = space.snap(_drawn(space, rng))
    for _ in range(CHANGES):
        broken = next(space.denying(params), None)
        named = [p for p in space.parameters if broken and p.name in names(broken.deny)]
        if not named:
            break
        p = named[int(rng.integers(len(named)))]
        tried = [space.snap({**params, p.name: value}) for value in p.values]
        against = [(sum(1 for _ in space.denying(t)), rng.random()) for t in tried]
        params = tried[against.index(min(against))]
    return params


def _all_denied(space: SearchSpace, refuse: Refuse | None) -> UsageError:
    default = space.snap(space.default())
    reason = space.denied(default)
    if not reason and refuse and (beyond := refuse(default)):
        fix = "Name the GPUs that there are (hardware), or smaller sizes in the space"
        return UsageError(f"no configuration of the space {space.name!r} is within reach: {beyond}", fix=fix)
    return UsageError(
        f"no configuration of the space {space.name!r} was found that its rules allow"
        + (f"; of the default they say: {reason}" if reason else ""),
        fix="Are conditions the wrong way round? A rule denies what it describes",
    )


def correlations(space: SearchSpace) -> list[NDArray[np.float64]]:
    """Per parameter a square table: how alike two of its codes behave, 0 to 1. The last row stands for "does not
    apply" (code -1). Numbers are alike where they are near on their grid, categories only where they are equal."""
    import numpy

    tables = []
    for p in space.parameters:
        size = len(p.values)
        table = numpy.eye(size + 1)
        if p.numeric and size > 1:
            place = numpy.array([p.position(v) for v in p.values])
            apart = numpy.abs(place[:, None] - place[None, :])
            near = math.sqrt(5) * apart / 0.5
            table[:size, :size] = 0.5 * (1 + near + near**2 / 3) * numpy.exp(-near) + 0.5 * numpy.exp(-0.5 * apart**2)
        tables.append(table)
    return tables


def distribution_values(space: SearchSpace, params: Mapping[str, Value]) -> dict[str, Any]:
    """``params`` as Optuna's flat space takes them: a default that is no value of its grid (a parameter that does not
    apply) is replaced by the nearest value; snapping undoes it."""
    found = {}
    for p in space.parameters:
        value = params[p.name]
        try:
            found[p.name] = p.snap(value)
        except ValueError:
            found[p.name] = p.values[0]
    return found


def spread(
    codes: NDArray[np.int64], tables: Sequence[NDArray[np.float64]], taken: Sequence[int], few: Sequence[int]
) -> int:
    """Which of ``few`` candidates is least like those ``taken`` (indices all)."""
    import numpy

    alike = numpy.zeros(len(codes))
    for other in taken:
        alike = numpy.maximum(
            alike, sum(t[codes[:, j], codes[other, j]] for j, t in enumerate(tables)) / max(len(tables), 1)
        )
    alike[list(taken)] = math.inf
    return min(few, key=lambda i: alike[i])


def pairs(count: int) -> Iterable[tuple[int, int]]:
    """Every unordered pair of parameters."""
    return itertools.combinations(range(count), 2)


def _code(parameter: Parameter, value: Value) -> int:
    for i, known in enumerate(parameter.values):
        if same(known, value):
            return i
    return -1
