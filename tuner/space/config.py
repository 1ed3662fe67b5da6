"""A serving config: the exact flags and environment of one server, frozen and hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Value = bool | int | float | str
UNITS = {unit: base**power for base, units in ((1000, "kmgt"), (1024, "KMGT")) for power, unit in enumerate(units, 1)}


def same(a: Value, b: Value) -> bool:
    """Whether two values are one: ``True`` is not 1, though Python has them equal."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def readable(value: object) -> float:
    """A number as vLLM reads one: 2048, "2048", "2k" (2,000), "2K" (2,048). Raises ``ValueError`` for anything else."""
    text = str(value).strip()
    unit = UNITS.get(text[-1:], 1)
    return float(text[:-1] if unit > 1 else text) * unit


def number(value: object) -> float | None:
    """:func:`readable`; None for what is no number, and for what no server can mean."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = readable(value)
    except ValueError:
        return None
    return found if abs(found) < 2**53 else None


@dataclass(frozen=True, slots=True)
class ServingConfig:
    """One server, to the last flag.

    ``params`` are the search space's parameters and their values (what the sampler sees, conditional ones that do not
    apply left out); ``flags`` maps a flag without dashes (``max-num-batched-tokens``) to its value (``None``: a
    switch without a value) in the order in which they are passed; ``env`` are the environment variables that belong
    to the config; ``model_variant`` names a derived model folder (``w8a8-int8``), empty for the model as it is;
    ``gpus`` is how many GPUs one replica takes (0 on a CPU server), ``gpu`` of which type (empty: the study's own).
    """

    model: str
    params: Mapping[str, Value]
    flags: Mapping[str, Value | None]
    env: Mapping[str, str] = field(default_factory=dict)
    model_variant: str = ""
    gpus: int = 1
    gpu: str = ""

    @property
    def hash(self) -> str:
        """Twelve hex digits over all that decides how the server behaves (``params`` do not: their flags do)."""
        names = ("model", "flags", "env", "model_variant", "gpus", *(["gpu"] if self.gpu else []))
        data = {name: getattr(self, name) for name in names}  # asdict would copy everything
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def random_weights(self) -> bool:
        """Whether the server makes its weights up (``load-format: dummy``): good for a measurement, not for answers."""
        return self.flags.get("load-format") == "dummy"

    def args(self) -> list[str]:
        """The flags as command-line words, ``--name value`` (a JSON value is passed as it is)."""
        words: list[str] = []
        for name, value in self.flags.items():
            words.append(f"--{name}")
            if value is not None:
                words.append(str(value))
        return words

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; :meth:`from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ServingConfig:
        """Raises ``TypeError`` or ``ValueError`` for what :meth:`to_dict` does not make."""
        config = cls(**data)
        for name in ("params", "flags", "env"):
            if not isinstance(getattr(config, name), Mapping):
                raise ValueError(f"{name} of a configuration is {getattr(config, name)!r}, no mapping")
        for word in (config.model, config.model_variant, config.gpu, *config.env, *config.env.values()):
            if not isinstance(word, str):
                raise ValueError(f"{word!r} in a configuration is no text")
        if isinstance(config.gpus, bool) or not isinstance(config.gpus, int) or config.gpus < 0:
            raise ValueError(f"a configuration of {config.gpus!r} GPUs")
        return config
