"""Pictures of a simulation: throughput against per-user speed, verification budget against load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark.errors import DataError
from dspark.eval.profile_plot import check_plot

__all__ = ["plot_simulation"]

_MARKS = "osD^vPX*"


def plot_simulation(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw a result file's points.

    Args:
        results: As `Sweep.results` makes them.
        path: A file that ends in .svg or .png.

    Raises:
        ConfigError: If matplotlib is missing, or the file has another ending.
        DataError: If the file cannot be written.
    """
    check_plot(path)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    is_open = any(point["rate"] is not None for point in results["points"])
    names = list(dict.fromkeys(point["policy"] for point in results["points"]))
    for number, name in enumerate(names):
        own = [
            p
            for p in results["points"]
            if p["policy"] == name and p["tokens_per_second_per_user"] is not None
        ]
        look = {
            "marker": _MARKS[number % len(_MARKS)],
            "markersize": 4,
            "linewidth": 1.2,
            "color": f"C{number}",
            "label": name,
        }
        users = [point["tokens_per_second_per_user"] for point in own]
        left.plot(users, [point["tokens_per_second"] for point in own], **look)
        if any(point["budget"] for point in own):
            loads = [point["rate"] if is_open else point["concurrency"] for point in own]
            right.plot(loads, [point["budget"] for point in own], **look)
    left.set_xlabel("speed of one user (tokens/s)")
    left.set_ylabel("throughput (tokens/s)")
    left.set_yscale("log")
    left.set_title("throughput against per-user speed", fontsize=10)
    right.set_xlabel("requests per second" if is_open else "concurrency")
    right.set_ylabel("drafted nodes verified per request and round")
    right.set_xscale("log", base=2)
    right.set_ylim(bottom=0)
    right.set_title("verification budget against load", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    try:
        # No date and no random ids, so that the same results make the same file.
        metadata = {"Date": None} if Path(path).suffix.lower() == ".svg" else {}
        with rc_context({"svg.hashsalt": "dspark"}):
            figure.savefig(Path(path).expanduser(), dpi=150, metadata=metadata)
    except OSError as exc:
        raise DataError(f"{path} cannot be written: {exc.strerror}.") from exc
