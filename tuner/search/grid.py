"""The whole grid in a seeded order: the honest way to try everything. Grids need not fit into memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.samplers import BaseSampler, RandomSampler

from tuner.search.candidates import WHOLE_GRID, Candidates, Refuse, distribution_values
from tuner.search.ledger import read
from tuner.space.space import SearchSpace

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial


class ShuffledGrid(BaseSampler):
    """Every configuration that may be launched, once, in an order that the seed decides; then the first of them again.

    Up to :data:`WHOLE_GRID` combinations the order is a permutation; beyond, combinations are drawn without repeats.
    """

    def __init__(self, space: SearchSpace, seed: int = 0, refuse: Refuse | None = None) -> None:
        self.space, self.seed, self.refuse = space, seed, refuse
        self._whole = Candidates.of(space, seed, refuse=refuse) if space.size() <= WHOLE_GRID else None
        self._independent = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.space.distributions()

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        rows = self._whole or Candidates(self.space, self.refuse)
        done = {rows.key(s.params) for s in read(study, self.space) if s.number != trial.number}
        if self._whole is not None:
            order = np.random.default_rng([self.seed, 3]).permutation(len(rows.params))
            left = [int(i) for i in order if rows.keys[i] not in done]
            return distribution_values(self.space, rows.params[left[0] if left else int(order[0])])
        rng = np.random.default_rng([self.seed, 3, trial.number])
        picked = self.space.default()
        for _ in range(10_000):
            picked = self.space.snap(
                {p.name: p.values[int(rng.integers(len(p.values)))] for p in self.space.parameters}
            )
            if rows.key(picked) not in done and rows.admits(picked):
                break
        return distribution_values(self.space, picked)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        self._independent.reseed_rng()
