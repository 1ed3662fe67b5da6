"""Bar 3: is damage to the log-probabilities refused, and its absence accepted? Emulated, so that the truth is known.

python -m benchmarks.verify.quality
"""

from __future__ import annotations

import json

from benchmarks.verify.language import divergence, language, serve
from tuner.spec.objective import QualityFloor
from tuner.verify.quality import check, profile

FLOOR = QualityFloor(kl_max=0.05, top1_min=0.9)


def main() -> None:
    for sharpness in (3.0, 1.0):
        baseline = language(0.0, sharpness=sharpness)
        with serve(baseline) as endpoint:
            base = profile(endpoint, seed=1)
        places = [token for sequence in base.sequences for token in sequence.tokens[:-1]]
        for damage in (0.0, 0.02, 0.1, 0.2, 0.3, 0.5, 1.0):
            model = language(damage, sharpness=sharpness)
            with serve(model) as endpoint:
                found = check(endpoint, base, FLOOR)
            row = {
                "sharpness": sharpness,
                "damage": damage,
                "kl_exact": round(divergence(baseline, model, places), 5),
                "kl_bound": round(found.kl, 5),
                "covered": round(found.covered, 3),
                "kl_drawn": round(found.kl_drawn, 4),
                "kl_drawn_error": round(found.kl_drawn_error, 4),
                "top1": round(found.top1, 3),
                "greedy": round(found.greedy, 3),
                "verdict": found.verdict,
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
