"""One HTML file that needs no network: a template with the styles, the scripts and the figures' data inside."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from tuner.errors import replacing
from tuner.record.secrets import hide
from tuner.report.style import Figure
from tuner.report.summary import clean


def write(
    out: Path, template: str, figures: Mapping[str, Figure], *, secrets: Sequence[str] = (), **context: Any
) -> Path:
    """Writes ``template`` (of ``tuner/report/templates``), filled in with ``context`` (``secrets`` hidden), to ``out``,
    atomically; returns ``out``. Plotly is inside where there are ``figures``. Raises OSError where it cannot be
    written."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("tuner.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda x: hide(x, secrets) if isinstance(x, str) and not isinstance(x, Markup) else x,
    )
    folder = files("tuner.report") / "templates"
    text = environment.get_template(template).render(
        css=(folder / "page.css").read_text("utf-8"),
        js=(folder / "page.js").read_text("utf-8"),
        plotly=(files("plotly") / "package_data" / "plotly.min.js").read_text("utf-8") if figures else "",
        figures=script_json(figures),
        **context,
    )
    if out.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as half:
        half.write_text(text, encoding="utf-8")
    return out


def script_json(data: Any) -> str:
    """JSON for a script element: no ``<``, so that nothing in it can end the element."""
    return json.dumps(clean(data), allow_nan=False).replace("<", "\\u003c")
