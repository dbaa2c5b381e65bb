"""A report as one HTML page that needs nothing else: no network, no other file.

Every text is escaped by the template engine; the only markup let through is a chart's own SVG and
the page's own style sheet and script. A content security policy forbids the page to load anything
and to run any script but that one.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

from dspark.errors import ConfigError
from dspark.eval.report.page import Page, printable

__all__ = ["render_html"]

_TEMPLATES = "templates"


def render_html(page: Page) -> str:
    """The page as HTML, the result files embedded.

    Raises:
        ConfigError: If Jinja, or matplotlib for its charts, is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as exc:
        raise ConfigError(
            "a report needs jinja2, which is not installed.", hint="pip install 'dspark[report]'"
        ) from exc

    def shown(value: Any) -> Any:
        """What an expression puts on the page; markup is our own, and stays as it is."""
        if isinstance(value, str) and not isinstance(value, Markup):
            return printable(value)
        return value

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # as the files have it
    script = _read("report.js")
    template = environment.from_string(_read("report.html.jinja"))
    return template.render(
        page=page,
        style=Markup(_read("report.css")),  # noqa: S704 - a file of this package
        script=Markup(script),  # noqa: S704 - a file of this package
        script_hash=_hash_of(script),
        svg=Markup,
    )


def _read(name: str) -> str:
    """A file of this package."""
    file = resources.files("dspark.eval.report").joinpath(_TEMPLATES, name)
    return file.read_text(encoding="utf-8").strip()


def _hash_of(script: str) -> str:
    """A script's hash as a content security policy wants it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
