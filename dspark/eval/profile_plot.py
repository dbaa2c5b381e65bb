"""A picture of a profile: steps per second against rows, a line for each context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dspark.errors import ConfigError, DataError
from dspark.eval.profile import Profile

__all__ = ["check_plot", "plot_profile"]

_KINDS = (".svg", ".png")


def check_plot(path: str | Path) -> None:
    """Refuse a picture that cannot be made, before anything is measured.

    Raises:
        ConfigError: If matplotlib is missing, or the file's name ends in neither .svg nor .png.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _KINDS:
        raise ConfigError(f"--plot is {str(path)!r}, but must end in .svg or .png.")
    try:
        import matplotlib as _  # noqa: F401 - only whether it is there
    except ImportError as exc:
        raise ConfigError(
            "a plot needs matplotlib, which is not installed.",
            hint="pip install 'dspark[report]'",
        ) from exc


def plot_profile(profile: Profile, path: str | Path) -> None:
    """Draw a profile; bars reach from the lower to the upper quartile.

    Args:
        profile: The profile.
        path: A file that ends in .svg or .png.

    Raises:
        ConfigError: As `check_plot`.
        DataError: If the file cannot be written.
    """
    check_plot(path)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    for context in profile.contexts:
        points = profile.curve(context)
        speeds = [1 / point.median for point in points]
        # The slow quartile of seconds is the low end of speed.
        below = [speed - 1 / p.high for speed, p in zip(speeds, points, strict=True)]
        above = [1 / p.low - speed for speed, p in zip(speeds, points, strict=True)]
        axes.errorbar(
            [point.rows for point in points],
            speeds,
            yerr=[below, above],
            marker="o",
            markersize=3.5,
            linewidth=1.2,
            capsize=2,
            label=_label(context),
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(profile.rows, [str(rows) for rows in profile.rows])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows of a step (anchors and drafted nodes, all requests)")
    axes.set_ylabel("steps per second")
    axes.set_title(_title(profile), fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    try:
        # No date and no random ids, so that the same profile makes the same file.
        metadata = {"Date": None} if Path(path).suffix.lower() == ".svg" else {}
        with rc_context({"svg.hashsalt": "dspark"}):
            figure.savefig(Path(path).expanduser(), dpi=150, metadata=metadata)
    except OSError as exc:
        raise DataError(f"{path} cannot be written: {exc.strerror}.") from exc


def _label(context: int) -> str:
    return f"context {context}" if context else "context not stated"


def _title(profile: Profile) -> str:
    key = profile.key
    target = profile.header.get("target", {})
    name = target.get("id", "imported table") if isinstance(target, dict) else "imported table"
    if not key.threads:
        return str(name)
    exact = "exact" if key.exact else "not exact"
    threads = f"{key.threads} thread{'s' if key.threads > 1 else ''}"
    return f"{name}, {key.dtype}, {key.device}, {threads}, {exact}"
