"""When a search ends although its budget is not spent: what is still to be gained no longer pays for a launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuner.search.ledger import Seen
from tuner.spec.study import MIN_GAIN


@dataclass(frozen=True, slots=True)
class Stopping:
    """A search ends when ``patience`` proposals in a row each promised less than ``min_gain`` (a share of the front's
    hypervolume; 0: never), but not before ``fewest`` launches: what few launches promise is not to be believed."""

    min_gain: float = MIN_GAIN
    patience: int = 3
    fewest: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.min_gain < 1 or self.patience < 1:
            raise ValueError("min_gain must be at least 0 and below 1, patience at least 1")

    def reason(self, seen: Sequence[Seen], launch_usd: float = 0.0) -> str:
        """Why the next launch no longer pays, with the figures; empty where it does, and where the sampler does not say
        what it expects. ``launch_usd`` is what a launch cost on average (0: not known)."""
        launched = [s for s in seen if not s.free and s.outcome is not None]
        gains = [s.expected_gain for s in launched if s.expected_gain is not None][-self.patience :]
        if len(launched) < self.fewest or len(gains) < self.patience or max(gains) >= self.min_gain:
            return ""
        each = ", ".join(f"{gain:.2%}" for gain in gains)
        price = f" for ${launch_usd:.2f}" if launch_usd >= 0.005 else ""
        return (
            f"the best untried configuration promised {gains[-1]:.2%} more hypervolume of the front{price}"
            f" (the last {self.patience} proposals: {each}); a launch has to promise {self.min_gain:.2%}"
        )
