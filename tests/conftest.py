"""For all tests: properties are checked however busy the machine is, and no hub is asked for a model."""

import os

from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

os.environ["HF_HUB_OFFLINE"] = "1"
