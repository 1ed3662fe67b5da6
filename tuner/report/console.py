"""Where tables and sentences are printed."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from tuner.errors import printable


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # as from print: whoever reads has read enough

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def printer(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: what a user, a server or a function says may have brackets and colons in
    it, which are neither markup nor emoji. Control characters are left out."""
    return _Console(stderr=stderr, markup=False, emoji=False, highlight=False)
