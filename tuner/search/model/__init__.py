"""The analytic model: from a config.json, a GPU's data sheet and a trace to memory, times and queueing."""
