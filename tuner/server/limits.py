"""How long each phase of a start-up may take on this machine: generous at first, then learnt from what it has shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tuner.errors import replacing
from tuner.study.outcome import PHASES, Boot

_ENOUGH = 3  # start-ups after which history counts
_FACTOR = 4.0  # a phase may take this many times the longest seen
_KEEP = 20
_UNSEEN_S = 900.0
_FIRST_S: Mapping[str, float] = {"weights": 3600.0, "compile": 1800.0, "graphs": 1800.0}


#: The names of what has a limit; ``start`` is all phases where nothing is known of the log.
LIMITED = ("start", *PHASES)
#: What a study says about phases: one limit in seconds for all of them, or one each by name; None: learnt.
PhaseLimit = float | Mapping[str, float] | None


def fixed(limit: PhaseLimit) -> dict[str, float]:
    """``Limits.fixed_s`` of what a study says."""
    if limit is None:
        return {}
    return {name: float(seconds) for name, seconds in limit.items()} if isinstance(limit, Mapping) else {"*": limit}


@dataclass(frozen=True, slots=True)
class Limits:
    """``total_s`` ends a start-up however busy it is; a phase's limit ends it once its log has been still for
    ``silent_s`` too (a long load that still reports progress is not a hang). ``fixed_s`` overrides single phases,
    ``"*"`` all. ``seen_s`` is this machine's history: phase -> seconds of earlier start-ups."""

    total_s: float = 3600.0
    silent_s: float = 60.0
    floor_s: float = 180.0
    fixed_s: Mapping[str, float] = field(default_factory=dict)
    seen_s: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def phase_s(self, phase: str) -> float:
        """The limit of one phase in seconds: never below ``floor_s`` or above what an unknown machine is allowed."""
        fixed = self.fixed_s.get(phase, self.fixed_s.get("*"))
        if fixed is not None:
            return fixed
        most = _FIRST_S.get(phase, _UNSEEN_S)
        seen = self.seen_s.get(phase, ())
        if len(seen) < _ENOUGH:
            return most
        return min(most, max(self.floor_s, _FACTOR * max(seen)))

    def expected_s(self) -> float | None:
        """How long a start-up takes here (the median of each phase, summed); None before the first."""
        if not self.seen_s:
            return None
        return sum(sorted(times)[len(times) // 2] for times in self.seen_s.values() if times)


class History:
    """Start-up times per key (engine, version, model) in one JSON file; a file that cannot be used is as none."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def seen_s(self) -> dict[str, tuple[float, ...]]:
        entry = self._read().get(self.key)
        try:
            return {str(name): tuple(map(float, times)) for name, times in entry.items()}  # type: ignore[union-attr]
        except (AttributeError, TypeError, ValueError, OverflowError):
            return {}

    def add(self, boot: Boot) -> None:
        """Remembers a start-up that succeeded."""
        data = self._read()
        entry = {name: list(times) for name, times in self.seen_s().items()}
        for name, seconds in boot.phases_s.items():
            entry[name] = [*entry.get(name, []), round(seconds, 2)][-_KEEP:]
        data[self.key] = entry
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as half:
                half.write_text(json.dumps(data), encoding="utf-8")
        except OSError:
            return

    def _read(self) -> dict[str, object]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return data if isinstance(data, dict) else {}
