"""What the tests of several tuners measure: a function with a little to do, deterministic in its parameters."""

from __future__ import annotations

import os
import time
from typing import Any


def measure(params: dict[str, Any], load: float) -> dict[str, float]:
    """Larger batches serve more and answer later; takes ``MEASURE_S`` seconds."""
    time.sleep(float(os.environ.get("MEASURE_S", "0.3")))
    batch = float(params["batch"])
    colour = {"red": 1.0, "green": 1.1, "blue": 0.9}[params["colour"]]
    return {"tpot_p99_s": (0.005 + batch / 20_000) * load, "output_tokens_per_s": batch * colour * load}
