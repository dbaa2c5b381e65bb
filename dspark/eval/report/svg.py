"""Matplotlib figures as SVG that belongs to a page.

Colours become CSS variables of the page, so a chart follows light, dark and print. Texts stay texts
in the page's font. Ids get a prefix, since matplotlib gives every figure the same ones; its own
style sheet, which would act on the whole page, and its metadata are dropped.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dspark.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLORS", "FAINT", "INK", "PAPER", "SOFT", "STYLES", "new_figure", "svg_of"]

INK = "#010101"
"""Colour of texts and axes."""
FAINT = "#020202"
"""Colour of the grid."""
SOFT = "#040404"
"""Colour of reference lines."""
PAPER = "#030303"
"""The page's own colour."""
COLORS = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006")
"""Colours of series."""

STYLES: tuple[tuple[str, Any], ...] = (
    ("o", "-"),
    ("s", (0, (5, 2))),
    ("^", (0, (1.5, 1.5))),
    ("D", (0, (7, 2, 1.5, 2))),
    ("v", (0, (3, 1.5))),
    ("P", (0, (9, 3))),
)
"""Marker and dash of series, so that colour is never all that tells them apart."""

_WIDTH = 400.0  # of a chart, in pixels of a page at normal size
_VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--rule)",
    SOFT: "var(--soft)",
    PAPER: "var(--paper)",
    **{color: f"var(--series-{at + 1})" for at, color in enumerate(COLORS)},
}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dspark",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.family": "DejaVu Sans",  # comes with matplotlib; the page's font takes its place
    "font.size": 12,
    "axes.labelsize": 12,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
}
_COLOR = re.compile(r"#[0-9a-f]{6}")
_REFERENCE = re.compile(r"url\(#([^)]*)\)")
_LONG_NUMBER = re.compile(r"(\d\.\d\d)\d+")  # a hundredth of a pixel is enough
_FONT_FAMILY = re.compile(r"font-family:[^;]*;?")
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"


@contextmanager
def new_figure(height: float) -> Iterator[Figure]:
    """A figure of a chart's width.

    Args:
        height: In pixels of a page at normal size.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise ConfigError(
            "a report needs matplotlib, which is not installed.",
            hint="pip install 'dspark[report]'",
        ) from exc
    # A glyph that matplotlib's font lacks is no trouble: the page's font draws it.
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield Figure(figsize=(_WIDTH / 72, height / 72), dpi=72, layout="constrained")


def svg_of(figure: Figure, *, prefix: str, title: str) -> str:
    """A figure as an SVG element to stand inside HTML.

    Args:
        figure: Made by `new_figure`, inside its context.
        prefix: What its ids begin with; one for each chart of a page.
        title: What it shows, for those who cannot see it.
    """
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314 - matplotlib wrote it just now
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    names = {old: f"{prefix}-{at}" for at, old in enumerate(_referenced(root))}
    for item in root.iter():
        _adapt(item, names)
    label = ElementTree.Element("title")
    label.text = title
    root.insert(0, label)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("class", "chart")
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _referenced(root: ElementTree.Element) -> list[str]:
    """Ids that something in the figure points to, in order; nobody needs the others."""
    found: dict[str, None] = {}
    for item in root.iter():
        for name, value in item.attrib.items():
            if name == _HREF:
                found[value.removeprefix("#")] = None
            found.update(dict.fromkeys(_REFERENCE.findall(value)))
    return list(found)


def _adapt(item: ElementTree.Element, names: dict[str, str]) -> None:
    """Give an element the page's colours, font and ids."""
    item.tag = item.tag.removeprefix(_SVG)  # HTML knows SVG without its namespace
    old = item.attrib.pop("id", None)
    if old in names:
        item.set("id", names[old])
    for name, value in list(item.attrib.items()):
        if name == _HREF:
            del item.attrib[name]
            item.set("href", "#" + names[value.removeprefix("#")])
        elif name != "id":
            value = _COLOR.sub(lambda m: _VARIABLES.get(m[0], m[0]), value)
            value = _REFERENCE.sub(lambda m: f"url(#{names[m[1]]})", value)
            value = _LONG_NUMBER.sub(lambda m: m[1], value)
            item.set(name, _FONT_FAMILY.sub("", value))
