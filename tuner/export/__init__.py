"""The chosen configuration as files that deploy it."""

from tuner.export.formats import FORMATS, best_config, export, write

__all__ = ["FORMATS", "best_config", "export", "write"]
