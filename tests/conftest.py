"""For all tests: properties are checked however busy the machine is, and no hub is asked for a model."""

import os

from hypothesis import settings

# The examples of properties are the same at every run: which change broke one is seen. Others, to look for what nobody
# thought of: pytest --hypothesis-profile=others
settings.register_profile("others", deadline=None)
settings.register_profile("patient", deadline=None, derandomize=True)
settings.load_profile("patient")

os.environ["HF_HUB_OFFLINE"] = "1"
