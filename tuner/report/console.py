"""Where tables and sentences are printed."""

from __future__ import annotations

from rich.console import Console


def printer(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: what a user, a server or a function says may have brackets and colons in
    it, which are neither markup nor emoji."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)
