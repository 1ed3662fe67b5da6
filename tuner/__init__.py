"""tuner: find the cheapest way to serve your model fast enough."""

from tuner.errors import Infeasible

__all__ = ["Infeasible", "__version__"]
__version__ = "0.1.0"
