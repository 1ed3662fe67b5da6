"""What the tests of several tuners measure: a function, deterministic in its parameters, that can be held."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def measure(params: dict[str, Any], load: float) -> dict[str, float]:
    """Larger batches serve more and answer later. The colour ``MEASURE_HOLD`` (``all``: any) waits for the file
    ``MEASURE_GO``."""
    held = os.environ.get("MEASURE_HOLD", "")
    while held in ("all", params["colour"]) and not Path(os.environ["MEASURE_GO"]).exists():
        time.sleep(0.02)
    batch = float(params["batch"])
    colour = {"red": 1.0, "green": 1.1}[params["colour"]]
    return {"tpot_p99_s": (0.005 + batch / 20_000) * load, "output_tokens_per_s": batch * colour * load}
