"""What benchmark scripts share: facts about the run, interleaving, medians with spread."""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import dspark
from dspark.models import resolve_model

__all__ = [
    "ALIAS",
    "Stock",
    "code_version",
    "describe",
    "finish",
    "forget_prompts",
    "interleave",
    "milliseconds",
    "ratio",
    "spread",
]

ALIAS = "smollm2-135m"


class Stock:
    """transformers.generate with a stock model, greedy, left-padded batches."""

    def __init__(self, dtype: str) -> None:
        folder = resolve_model(ALIAS)
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        ).eval()

    def run(
        self, prompts: list[list[int]], tokens: int, **options: Any
    ) -> tuple[float, list[list[int]]]:
        """Seconds of one batch, and its texts, padded where one ended before the longest.

        Args:
            prompts: Token ids.
            tokens: New tokens at the most.
            options: For `generate`.
        """
        longest = max(len(p) for p in prompts)
        ids = torch.tensor([[2] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        start = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=2,
                **options,
            )
        seconds = time.perf_counter() - start
        return seconds, out[:, longest:].tolist()


def _git(*args: str) -> str:
    run = subprocess.run(["git", *args], capture_output=True, text=True, check=False)  # noqa: S607
    return run.stdout.strip()


def code_version() -> str:
    """Fingerprint of the package's sources as they are on disk."""
    digest = hashlib.sha256()
    for path in sorted(Path(dspark.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def describe() -> dict[str, Any]:
    """Machine, versions, commit, command."""
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "processor": processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dspark": dspark.__version__,
    }


def interleave(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Call every run in turn, `repeats` times after one warm-up turn.

    Args:
        runs: Name -> a call that returns its figure (tokens per second).
        repeats: Turns that count.

    Returns:
        Figures by name, one a turn.
    """
    figures: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            value = run()
            if turn > 0:
                figures[name].append(value)
        print(
            f"turn {turn}: " + json.dumps({k: v[-1:] for k, v in figures.items()}), file=sys.stderr
        )
    return figures


def forget_prompts(engine: dspark.Engine) -> None:
    """Give up K/V that an engine keeps of ended requests, so that a prompt is read again."""
    engine._cache.forget_kept()


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, least and largest."""
    return {
        "median": round(statistics.median(values), digits),
        "least": round(min(values), digits),
        "largest": round(max(values), digits),
    }


def ratio(upper: Sequence[float], lower: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of the turn-by-turn ratios upper / lower."""
    return spread([a / b for a, b in zip(upper, lower, strict=True)])


def milliseconds(times: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of some seconds, in milliseconds."""
    return spread([1e3 * seconds for seconds in times], 2)


def finish(report: dict[str, Any], out: str | None) -> None:
    """Print the report as one JSON line, and write it to a file if asked."""
    print(json.dumps(report))
    if out:
        Path(out).write_text(json.dumps(report, indent=1) + "\n")
