"""Numbers as readers want them."""

from __future__ import annotations

import math


def figure(value: float, digits: int = 3) -> str:
    """``value`` to so many significant digits, digits before the point never rounded away: ``0.0994``, ``82,240``,
    never ``8.22e+04``."""
    whole = math.isfinite(value) and round(abs(value)) >= 10**digits
    return f"{value:,.0f}" if whole else f"{value:,.{digits}g}"
