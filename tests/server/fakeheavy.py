"""What a stand-in engine imports: it takes long, says so, and reads the environment as modules do."""

import os
import time

time.sleep(0.5)
print(f"imported in {os.getpid()}", flush=True)
HEAVY = os.environ.get("HEAVY", "")
