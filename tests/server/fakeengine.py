"""A stand-in for an engine that is run as a module and imports for long."""

import os
import runpy
import sys
from pathlib import Path

from fakeheavy import HEAVY  # type: ignore[import-not-found]

print(f"serving from {os.getpid()} with {HEAVY}", flush=True)
if "--fail" in sys.argv:
    raise ValueError("max_num_batched_tokens is too small")
if "--leave" in sys.argv:
    sys.exit("api_server.py: error: unrecognized arguments: --leave")
runpy.run_path(str(Path(__file__).with_name("fakeserver.py")), run_name="__main__")
