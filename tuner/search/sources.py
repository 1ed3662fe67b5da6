"""Prior means of cost, latency and capacity: the analytic model, rules of thumb, numbers of GPUs, earlier studies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tuner.search.candidates import Candidates
from tuner.search.expert import World, by_looks, effects, sizes_told
from tuner.search.foresight import Foresight, Source
from tuner.search.surrogate import Array, Codes
from tuner.search.warmstart import Earlier

QUANTITIES = ("capacity", "cost", "latency")
JUDGED = ("capacity", "latency")  # by how well their launches are explained; loads are seen by the capacity
CENTRE_ON = 400  # candidates over which prior means are centred
OF_A_MODEL = (1.0, 0.4)  # a source's weight and its standard deviation
OF_A_MODEL_THAT_LOST = (0.0, 0.3)  # launches may still find that some of it is right
OF_RULES = (1.0, 0.4)
BY_LOOKS = 0.7  # of an effect, where what a parameter is was guessed by its values
# before the names of quantities: with the constants that launches gave the model; of parameters that it leaves out
LEARNT, LEFT_OUT = "learnt ", "left out "


@dataclass(slots=True)
class Sources:
    """The prior means at any candidates. The model is what is expected, but of the quantities that it ``lost``: there
    rules of thumb and the number of GPUs are, as where there is no model (launches decide: :meth:`Beliefs.learn`). Of
    parameters that a model leaves out, rules of thumb say what is expected.
    ``learnt`` is what the same model expects with the constants that launches gave it, and ``share`` the prior mean and
    standard deviation of how much of what they change is so."""

    candidates: Candidates
    foresight: Foresight
    earlier: Sequence[Earlier] = ()
    lost: frozenset[str] = frozenset()
    learnt: Foresight | None = None
    share: tuple[float, float] = (0.0, 0.0)
    rules: list[Array] = field(default_factory=list)
    centres: dict[str, Array] = field(default_factory=dict)
    world: World = field(init=False)
    told: bool = field(init=False)  # whether rules tell what each of several numbers of GPUs does
    guessed: bool = field(init=False)  # whether rules go by what values look like: names say nothing, nor anything else
    named: NDArray[np.bool_] = field(init=False)  # parameters of which rules know an effect
    _silent: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        space = self.candidates.space
        known = self.earlier or self.foresight.predictor is not None
        looks = None if known else by_looks(space)
        self.guessed, self.world, self.told = looks is not None, World.of(looks or space), sizes_told(space)
        self.rules = [BY_LOOKS * table for table in effects(looks)] if looks else effects(space)
        self.named = np.array([table[:, :2].any() for table in self.rules], dtype=bool)

    def teach(self, learnt: Foresight) -> None:
        """Takes other constants of the model; :attr:`share` says what they are worth."""
        self.learnt = learnt
        self.centres = {kind: centre for kind, centre in self.centres.items() if not kind.startswith(LEARNT)}

    def modelled(self, name: str) -> bool:
        """Whether the analytic model is there and believed of this quantity."""
        return self.foresight.predictor is not None and name not in self.lost

    @property
    def ruled(self) -> bool:
        """Whether rules of thumb know parameters of this space (an earlier study knows better)."""
        return not self.earlier and any(table.any() for table in self.rules)

    @property
    def words(self) -> str:
        """What the predicted front is predicted by, for a proposal's reason."""
        modelled = [self.modelled(name) for name in JUDGED]
        if all(modelled):
            return "the model's predicted front"
        others = "rules of thumb, by what the values look like," if self.guessed else "rules of thumb"
        others = "earlier studies" if self.earlier else others
        return f"what {'the model and ' if any(modelled) else ''}{others} predict"

    def of(self, name: str, indices: Sequence[int]) -> list[Source]:
        """The prior means of one quantity at these candidates, centred so that a weight changes the shape alone."""
        found: list[Source] = []
        at = np.array(indices, dtype=np.int64)
        has_model = self.foresight.predictor is not None
        modelled = self.modelled(name)
        weight, sd = OF_A_MODEL if modelled else OF_A_MODEL_THAT_LOST
        width = len(self.foresight.loads) if name in ("cost", "latency") else 1
        if name == "room":
            return [Source("model", self._modelled(name, at), 0.0, 0.3)] if has_model else []
        if name == "cost":
            found.append(Source("price x GPUs / load", self._structure(at), 1.0, 0.2))
        else:
            if not modelled and not self.world.sizes and not self.told:  # else rules say more of them
                gpus = np.repeat(np.log(self.foresight.gpus[at])[:, None], width, axis=1)
                found.append(Source("number of GPUs", gpus, -0.4 if name == "latency" else 0.7, 0.3))
            if self.ruled and (not modelled or self.left_out().any()):
                kind = f"rules {LEFT_OUT if modelled else ''}{name}"
                values = self._by_rules(kind, indices) - self._centre(kind)
                found.append(Source("rules of thumb", np.repeat(values[:, None], width, axis=1), *OF_RULES))
        kind = "model cost" if name == "cost" else name
        if has_model:
            predicted = self._modelled(kind, at)
            found.append(Source("model", predicted, weight, sd))
            if self.learnt is not None and modelled:
                change = self._modelled(LEARNT + kind, at) - predicted
                found.append(Source("its constants, learnt", change, *self.share))
        for study in self.earlier:
            values = study.values(name, self.candidates.codes(indices), len(self.foresight.loads))
            found.append(Source(study.name, values, 0.0 if modelled else 0.7 / len(self.earlier), 0.4))
        return found

    def mean(self, name: str) -> float:
        """The model's own level of a quantity."""
        return float(self._centre("model cost" if name == "cost" else name)[0])

    def effects(self, name: str) -> Array:
        """Variance between the values of each parameter in the model's predictions, in squared log units; nothing where
        the model is not believed."""
        count = len(self.candidates.space.parameters)
        if not self.modelled(name):
            return np.zeros(count)
        key = f"effects on {name}"
        if key not in self.centres:
            found = np.zeros(count)
            some = np.arange(min(CENTRE_ON, len(self.candidates.params)))
            raw = self._raw("model cost" if name == "cost" else name, some).mean(1)
            some = some[np.isfinite(raw)]
            codes, raw = self.candidates.codes(some.tolist()), raw[np.isfinite(raw)]
            for j in range(count):
                levels = [raw[codes[:, j] == c].mean() for c in np.unique(codes[:, j]) if c >= 0]
                found[j] = np.var(levels) if levels else 0.0
            self.centres[key] = found
        return self.centres[key]

    def left_out(self) -> NDArray[np.bool_]:
        """Parameters that rules know and the model does not: its answers are the same for all their values."""
        return self.named & self._left_by_model()

    def unknown(self) -> NDArray[np.bool_]:
        """Parameters of which neither the model nor a rule knows anything, and that count no GPUs (an earlier study
        knows of all)."""
        known = [bool(self.earlier) or p.counts_gpus for p in self.candidates.space.parameters]
        return ~self.named & self._left_by_model() & ~np.array(known, dtype=bool)

    def _left_by_model(self) -> NDArray[np.bool_]:
        if self._silent is None:
            self._silent = np.array([self.foresight.silent_on(j) for j in range(len(self.rules))], dtype=bool)
        return self._silent

    def _by_rules(self, kind: str, indices: Sequence[int]) -> Array:
        codes, column = self.candidates.codes(indices), 0 if kind.endswith("latency") else 1
        found = np.zeros(len(codes))
        for j, table in enumerate(self.rules):
            values = table[:, column]
            if LEFT_OUT in kind:  # whether the parameter applies is no news to the model
                values = np.append(values[:-1] - values[:-1].mean(), 0.0) * self.left_out()[j]
            found += values[codes[:, j]]
        return found

    def _structure(self, at: Codes) -> Array:
        gpus = np.log(self.foresight.gpus[at]) + self.world.log_gpus(self.candidates.codes(at.tolist()))
        return gpus[:, None] - np.log(np.array(self.foresight.loads))[None, :]

    def _modelled(self, kind: str, at: Codes) -> Array:
        """The model's values (candidates, loads), the centre taken off; refused ones lie at the centre."""
        raw, centre = self._raw(kind, at), self._centre(kind)
        return np.where(np.isfinite(raw), raw - centre, 0.0)

    def _raw(self, kind: str, at: Codes) -> Array:
        if kind.startswith("rules "):
            return self._by_rules(kind, at.tolist())
        foresight = self.foresight
        if self.learnt is not None and kind.startswith(LEARNT):
            foresight, kind = self.learnt, kind.removeprefix(LEARNT)
            foresight.look()
        if kind == "latency":
            return foresight.latency[at]
        if kind == "model cost":
            return foresight.cost[at] - self._structure(at)
        return (foresight.capacity if kind == "capacity" else foresight.kv_tokens)[at][:, None]

    def _centre(self, kind: str) -> Array:
        if kind not in self.centres:
            raw = self._raw(kind, np.arange(min(CENTRE_ON, len(self.candidates.params))))
            self.centres[kind] = np.array([np.nanmean(raw) if np.isfinite(raw).any() else 0.0])
        return self.centres[kind]
