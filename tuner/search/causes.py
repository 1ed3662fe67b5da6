"""Why servers crash, cause by cause: conditions on serving parameters that the crashes with one message have in common.

An engine refuses or dies where a few conditions meet ("fp8 KV cache and more than two drafted tokens", "tensor times
data parallel size above eight"), and says so with one message for each. For every crash all conjunctions of up to
three conditions that hold there are weighed (Bayesian averaging over a version space: Mitchell 1982, Artif. Intell.
18(2); Tenenbaum 1999): conditions on what the message names, or where it names nothing on what rules of thumb fear,
count more beforehand; a conjunction that holds for a server that works loses weight; one that holds for other crashes
with the same message gains. Where all of them lose, it was chance. The probability that a configuration crashes of it
is the weight of the conjunctions that hold for it. One message may stand for several conditions, so every crash has
conjunctions of its own, and the most certain one counts.
A configuration serves where no message's crash comes to it, and none that was not met yet (:meth:`Causes._novelty`).
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuner.search.candidates import Candidates
from tuner.search.expert import World, effects, meant
from tuner.search.reading import cause
from tuner.search.surrogate import Array, Codes
from tuner.space.config import Value
from tuner.space.space import Parameter, SearchSpace
from tuner.study.outcome import Infeasible, Measured, Outcome

Holds = NDArray[np.bool_]
# log prior of a conjunction of one, two, three conditions, over that of its conditions: together about 1 : 3 : 4
LENGTH = (0.0, 2.0, 3.5)
OF_TWO = -2.0  # log prior of a condition on a product or a ratio of two numbers, over one on a single parameter
INNER = -2.0  # of one number alone that is neither the least nor the most: mostly what is too much or too little fails
NAMED, NAMED_VALUE = 1.5, 2.5  # log prior of a condition whose parameter, or whose value, the message names
SERVED = math.log(0.05)  # log likelihood of a server that works although a condition of crashes holds
OTHERS = -math.log(0.2)  # log likelihood of a further crash with the same message that the conjunction explains
# rate of crashes by a value, or a pair of values, that no working server had; rules of thumb fear some values more,
# which then are suspected sooner, by as much
UNSEEN, UNSEEN_PAIR = 0.02, 0.005
TOO_MANY_GPUS = 1.5  # crashes expected of a server that takes more GPUs than there seem to be
THRESHOLDS = 12  # of a product or a ratio, at most
EXTENDED = 300  # best conjunctions that get one condition more
CHANCE = 0.01  # prior of a crash that no condition explains, over that of all conditions
KEPT = 600  # conjunctions that are remembered of a crash
BLOCK = 1000  # configurations that are looked at at a time
# what messages call a parameter by another word than its name has; a size of parallelism shards weights
CALLED: Sequence[tuple[str, str]] = (
    (r"_(tp|tensor_parallel)_", "divisible partition shard sharded rank ranks world gpus nccl"),
    (r"_(dp|pp|data_parallel|pipeline_parallel)_", "rank ranks world gpus nccl"),
    (r"_(block|page)_size_|_per_(block|page)_", "page pages paged pagesize numtokensperpage"),
    (r"specul|draft|_mtp_", "speculative speculation draft drafter eagle mtp verification"),
    (r"memory|_mem_|batched_tokens|num_tokens|seqs|batch_size|running", "memory oom outofmemoryerror"),
    (r"attention|attn", "attention flashattention"),
)
# words of names that say nothing: a message about "the number of GPUs" names no max_num_seqs
PLAIN = frozenset(
    re.findall(r"\w+", "max num number size of the a and or for on no is in to auto none full true false enable")
)


@dataclass(frozen=True, slots=True)
class Test:
    """One condition: ``table[code of first, code of second]`` says where it holds (the last code: does not apply)."""

    first: int
    second: int
    table: Holds
    words: str
    names: frozenset[str] = frozenset()  # words by which a message would name the parameter
    value: frozenset[str] = frozenset()  # or this very value
    inner: bool = False  # one number alone, between others

    def weight(self, said: frozenset[str]) -> float:
        """What the words of a message add to the log prior (of a test of two numbers: nothing)."""
        return NAMED_VALUE if self.value & said else NAMED if self.names & said else 0.0

    @property
    def of_two(self) -> bool:
        return self.first != self.second


@dataclass(frozen=True, slots=True)
class Suspects:
    """Conjunctions that may explain one crash: numbers of tests (n, 3), filled up with the one that always holds, and
    their weights (n,), which sum to at most one."""

    tests: Codes
    weights: Array

    def crash(self, holds: Holds) -> Array:
        """Probability of this crash, by what holds (tests, configurations)."""
        return np.minimum(self.weights @ _all_hold(holds, self.tests), 1.0)  # rounding


class Causes:
    """Learns from the launches of one space; ``words`` says what is suspected. ``rules`` and ``world``: what rules of
    thumb say (by the names of the space, where they are not given)."""

    def __init__(self, space: SearchSpace, rules: Sequence[Array] = (), world: World | None = None) -> None:
        self.tests = [*_tests(space)]
        self._about = np.zeros((len(self.tests) + 1, len(space.parameters)), np.int64)  # tests, parameters
        for row, test in zip(self._about, self.tests, strict=False):
            row[[test.first, test.second]] = 1
        self._unseen = [UNSEEN + table[:, 2] for table in rules or effects(space)]
        self._shape = np.array([OF_TWO * test.of_two + INNER * test.inner for test in self.tests])
        self._prior = self._shape + [self._feared(test) for test in self.tests]
        self._world = world or World.of(space)
        self._served: Codes = np.zeros((0, len(space.parameters)), np.int64)
        self._suspects: dict[str, list[Suspects]] = {}

    def learn(self, codes: Codes, messages: Sequence[str | None]) -> None:
        """``codes`` (launches, parameters) of what was launched and with which message it crashed (None: it served)."""
        served = np.array([m is None for m in messages], bool)
        self._served = np.unique(codes[served], axis=0)
        self._suspects = {}
        holds = self._holds(codes)
        for message in dict.fromkeys(m for m in messages if m is not None):
            same = np.array([m == message for m in messages], bool)
            first: dict[tuple[int, ...], int] = {}
            for i in np.nonzero(same)[0]:
                first.setdefault(tuple(codes[i].tolist()), int(i))
            said = frozenset(_words(message))
            found = [self._suspect(holds[:, i], holds[:, served], holds[:, same], said) for i in first.values()]
            self._suspects[message] = found

    def works(self, codes: Codes) -> Array:
        """Probability of serving (configurations,)."""
        found = np.exp(-self._novelty(codes))
        for start in range(0, len(codes), BLOCK):
            block = slice(start, start + BLOCK)
            holds = self._holds(codes[block])
            for suspects in self._suspects.values():
                found[block] *= 1 - np.max([s.crash(holds) for s in suspects], axis=0)
        return found

    def words(self) -> dict[str, tuple[str, float]]:
        """Per message the conjunction that has most of the weight of all its crashes, and that share of it."""
        found = {}
        for message, suspects in self._suspects.items():
            total: Counter[tuple[int, ...]] = Counter()
            for s in suspects:
                total.update(dict(zip(map(tuple, s.tests.tolist()), (s.weights / len(suspects)).tolist(), strict=True)))
            if total:
                best, weight = total.most_common(1)[0]
                found[message] = " and ".join(self.tests[t].words for t in best if t < len(self.tests)), weight
        return found

    def _holds(self, codes: Codes) -> Holds:
        """Which test holds for which configuration: (tests + 1, configurations), the last one always."""
        found = np.ones((len(self.tests) + 1, len(codes)), bool)
        for row, test in zip(found, self.tests, strict=False):
            row[:] = test.table[codes[:, test.first], codes[:, test.second]]
        return found

    def _suspect(self, here: Holds, served: Holds, same: Holds, said: frozenset[str]) -> Suspects:
        """The conjunctions that hold ``here``, weighed by where else they hold: best ones of one condition and of two
        get another one."""
        true = np.nonzero(here[:-1])[0]
        prior = np.zeros(len(here))
        count = Counter((self.tests[t].first, self.tests[t].second) for t in true)
        kinds = Counter(one != other for one, other in count)
        named = any(self.tests[t].weight(said) for t in true)  # then nothing is feared: the message says it better
        for t in true:
            test = self.tests[t]
            share = -math.log(count[test.first, test.second] * kinds[test.of_two])
            prior[t] = share + (self._shape[t] if named else self._prior[t]) + test.weight(said)
        expected: list[Array] = []

        def score(tests: Codes, length: int) -> Array:
            against, explained = (_all_hold(h, tests).sum(1) for h in (served, same))
            expected.append(prior[tests].sum(1) + LENGTH[length])
            return expected[-1] + SERVED * against + OTHERS * (explained - 1)

        single = true[self._about[true].sum(1) == 1]
        found = np.column_stack([true, np.full((len(true), 2), len(self.tests))])
        tests, scores = [found], [score(found, 0)]
        for length in (1, 2):
            best = found[np.argsort(-scores[-1], kind="stable")[:EXTENDED]]
            found = self._extended(best, single, length)
            tests.append(found)
            scores.append(score(found, length))
        every, worth = np.concatenate(tests), np.concatenate(scores)
        if not len(every):  # nothing of it varies
            return Suspects(every, worth)
        kept = np.argsort(-worth, kind="stable")[:KEPT]
        chance = math.log(CHANCE) + np.logaddexp.reduce(np.concatenate(expected))
        return Suspects(every[kept], np.exp(worth[kept] - np.logaddexp(np.logaddexp.reduce(worth), chance)))

    def _feared(self, test: Test) -> float:
        """Log prior of a condition by what rules of thumb fear of its values, over one of which they fear nothing."""
        if test.of_two:
            return 0.0
        return math.log(self._unseen[test.first][np.diagonal(test.table)].mean() / UNSEEN)

    def _extended(self, tests: Codes, by: Codes, length: int) -> Codes:
        """``tests`` of ``length`` conditions with one more of ``by``, on another parameter; each conjunction once."""
        about = self._about[tests].sum(1)
        row, column = np.nonzero(about @ self._about[by].T == 0)
        found = tests[row]
        found[:, length] = by[column]
        found = np.sort(found, axis=1)
        keys = found @ (len(self._about) ** np.array([2, 1, 0]))  # one number for each conjunction: faster to sort
        return found[np.unique(keys, return_index=True)[1]]

    def _novelty(self, codes: Codes) -> Array:
        """Crashes expected of causes not met yet: by values and pairs of values that no working server had, and by the
        number of GPUs."""
        count = codes.shape[1]
        most = max([self._world.most, *self._world.log_gpus(self._served)])
        found = np.where(self._world.log_gpus(codes) > most + 1e-9, TOO_MANY_GPUS, 0.0)
        same = [codes[:, j, None] == self._served[None, :, j] for j in range(count)]
        for j in range(count):
            found += self._unseen[j][codes[:, j]] * ~same[j].any(1)
            for i in range(j):
                found += UNSEEN_PAIR * ~(same[i] & same[j]).any(1)
        return found


def suspected(
    space: SearchSpace, launches: Iterable[tuple[Mapping[str, Value], Outcome]]
) -> dict[str, tuple[str, float]]:
    """:meth:`Causes.words` of launches as they were recorded; what the space no longer knows is left out."""
    candidates, codes, causes = Candidates(space), [], []
    for params, outcome in launches:
        if not isinstance(outcome, Measured | Infeasible) or (isinstance(outcome, Infeasible) and outcome.transient):
            continue
        try:
            snapped = space.snap(params)
        except ValueError:
            continue
        values = [(p, params[p.name]) for p in space.parameters if p.name in params]
        if any(p.snap(v) != v != p.default for p, v in values):
            continue  # a number that the grid no longer has
        codes.append(candidates.key(snapped))
        causes.append(cause(outcome) if isinstance(outcome, Infeasible) else None)
    found = Causes(space)
    if codes:
        found.learn(np.array(codes, np.int64), causes)
    return found.words()


def _all_hold(holds: Holds, tests: Codes) -> Holds:
    """Where conjunctions hold: (conjunctions, configurations)."""
    return holds[tests[:, 0]] & holds[tests[:, 1]] & holds[tests[:, 2]]


def _tests(space: SearchSpace) -> Iterator[Test]:
    """Every condition that is looked at: a value; above or below a number; a product or a ratio of two numbers."""
    varied = [(j, p) for j, p in enumerate(space.parameters) if len(p.values) > 1]
    known = meant(space).parameters
    for j, p in varied:
        yield from _single(j, p, known[j].name)
    numbers = [(j, p) for j, p in varied if p.numeric and min(p.values) > 0]  # type: ignore[type-var]
    for (i, one), (j, other) in itertools.combinations(numbers, 2):
        yield from _of_two(i, one, j, other)


def _single(j: int, p: Parameter, known: str) -> Iterator[Test]:
    plain = f"_{'_'.join(_words(known))}_"
    called = {word for has, words in CALLED if re.search(has, plain) for word in words.split()}
    names = frozenset(w for text in (p.name, known, *_flags(p)) for w in _words(text)) - PLAIN | called
    for value in p.values:
        conditions = [(f"{p.name} = {value}", [v == value for v in p.values])]
        if p.numeric:
            number = float(value)
            above, below = [float(v) >= number for v in p.values], [float(v) <= number for v in p.values]
            conditions = [c for c in conditions if not (sum(above) == 1 or sum(below) == 1)]  # the ends are said below
            conditions += [(f"{p.name} >= {value}", above), (f"{p.name} <= {value}", below)]
        for words, where in conditions:
            if not all(where):
                said = frozenset() if p.numeric else frozenset(_words(str(value))) - PLAIN
                table = np.zeros((len(where) + 1,) * 2, bool)
                table[np.arange(len(where)), np.arange(len(where))] = where
                inner = p.numeric and sum(where) == 1 and not (where[0] or where[-1])
                yield Test(j, j, table, words, names, said, inner)


def _of_two(i: int, one: Parameter, j: int, other: Parameter) -> Iterator[Test]:
    rows, columns = (np.log([float(v) for v in p.values]) for p in (one, other))
    for sign, made in (("x", rows[:, None] + columns), ("/", rows[:, None] - columns)):
        values = np.unique(made.round(9))
        if len(values) < 3:
            continue
        for limits, above in ((values[1:][-THRESHOLDS:], True), (values[:-1][:THRESHOLDS], False)):
            for limit in limits:
                table = np.zeros((len(rows) + 1, len(columns) + 1), bool)
                table[:-1, :-1] = made >= limit - 1e-8 if above else made <= limit + 1e-8
                words = f"{one.name} {sign} {other.name} {'>=' if above else '<='} {math.exp(limit):g}"
                yield Test(i, j, table, words)


def _flags(p: Parameter) -> Iterator[str]:
    return (flag for emission in p.emissions for flag in emission.flags)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+\d*", text.lower())
