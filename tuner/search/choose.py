"""The sampler by one word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tuner.errors import UsageError
from tuner.search.prediction import Predictor
from tuner.space.space import SearchSpace
from tuner.spec.objective import Objective
from tuner.spec.study import MIN_GAIN

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from tuner.search.acquisition import LaunchCost
    from tuner.search.candidates import Refuse
    from tuner.search.warmstart import Earlier

NAMES = ("auto", "gp", "tpe", "nsga2", "random", "grid")


def sampler(
    name: str,
    space: SearchSpace,
    objective: Objective,
    loads: Sequence[float],
    *,
    predictor: Predictor | None = None,
    model: str = "",
    seed: int = 0,
    cost: LaunchCost | None = None,
    earlier: Sequence[Earlier] = (),
    refuse: Refuse | None = None,
    unfit: Refuse | None = None,
    min_gain: float = MIN_GAIN,
) -> BaseSampler:
    """The sampler called ``name``: ``auto`` is :class:`tuner.search.sampler.TunerSampler`, the others are Optuna's,
    which see a trial's two values and its constraint. ``grid`` goes through the whole grid in a seeded order. These two
    never propose what ``refuse`` says the machine cannot carry; what is ``unfit`` ``auto`` does not begin with.

    Raises :class:`UsageError` for another name, and where a sampler cannot work on this space.
    """
    if name not in NAMES:
        raise UsageError(f"unknown sampler {name!r}", fix=f"Write one of {', '.join(NAMES)}.")
    if name == "auto":
        from tuner.search.sampler import Options, TunerSampler

        options = Options(min_gain=min_gain)
        return TunerSampler(space, objective, loads, predictor, model, seed, cost, earlier, options, refuse, unfit)
    from optuna import samplers

    if name == "gp":
        try:
            import torch
        except ImportError as error:
            raise UsageError("the sampler gp needs torch", fix="pip install torch, or write sampler: auto.") from error
        torch.set_num_threads(1)
        return samplers.GPSampler(seed=seed)
    if name == "tpe":
        return samplers.TPESampler(seed=seed)
    if name == "nsga2":
        return samplers.NSGAIISampler(seed=seed, population_size=20)
    if name == "random":
        return samplers.RandomSampler(seed=seed)
    from tuner.search.grid import ShuffledGrid

    return ShuffledGrid(space, seed, refuse)
