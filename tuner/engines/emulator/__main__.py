"""``python -m tuner.engines.emulator --model DIR --port N ...``: an emulated vLLM server."""

import sys

from tuner.engines.emulator.process import main

sys.exit(main())
