"""From the study's word to the executor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tuner.executor.local import LocalExecutor
from tuner.executor.protocol import Executor
from tuner.study.evaluate import Bench


@contextmanager
def executor(bench: Bench) -> Iterator[Executor]:
    """The study's executor. Raises ``EnvironmentFault`` where there is no cluster."""
    if bench.study.executor.kind == "ray":
        from tuner.executor.remote import RayExecutor

        made: Executor = RayExecutor(bench)
    else:
        made = LocalExecutor(bench)
    try:
        yield made
    except KeyboardInterrupt:
        made.close(at_once=True)
        raise
    finally:
        made.close()
