"""The questions of the bench in the README, picked from six prompt sets.

    python benchmarks/pick_prompts.py FOLDER eval12.jsonl
    python benchmarks/pick_prompts.py FOLDER eval24.jsonl 4      # questions of each set

FOLDER holds humaneval.jsonl, mbpp.jsonl, gsm8k.jsonl, math500.jsonl, mt-bench.jsonl and
arena-hard.jsonl, lines of {"turns": [...]}. First turns of two questions of each set are taken, the
first and the one a third of the set further on; of more, spaced alike. Code, math or chat is their
category.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SETS = {
    "humaneval": "code",
    "mbpp": "code",
    "gsm8k": "math",
    "math500": "math",
    "mt-bench": "chat",
    "arena-hard": "chat",
}


def pick(folder: Path, each: int = 2) -> list[dict[str, Any]]:
    """First turns of so many questions of each set, spaced alike over it."""
    picked = []
    for name, category in SETS.items():
        # Not splitlines: it parts lines at characters that JSON strings may hold.
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        for place, row in enumerate(rows[:: max(1, len(rows) // (each + 1))][:each]):
            question = {"question_id": f"{name}-{place}", "category": category}
            picked.append({**question, "turns": row["turns"][:1]})
    return picked


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("each", type=int, nargs="?", default=2, help="questions of each set")
    args = parser.parse_args()
    rows = pick(args.folder, args.each)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
