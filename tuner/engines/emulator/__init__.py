"""An emulated vLLM: a real process with vLLM's API, flags, log and failures, timed by a simulation of a named GPU."""
