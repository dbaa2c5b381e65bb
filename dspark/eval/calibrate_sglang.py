"""SGLang's form of sequential temperature scaling, written and read.

    {"temperatures": [1.2, 0.9, ...], "dataset": "dspark", "num_samples": 4000,
     "ece_before": [...], "ece_after": [...]}

Its confidence of position k is sigmoid(confidence logit / temperatures[k]), one temperature for
each drafted token of the block; only `temperatures` must be there. A file with any other field is
refused, since what it means is not known.

**Source:** SGLang 0.5.23, `speculative/dspark_components/dspark_sts.py` and
`benchmark/dspark_sts_fit.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dspark.draft.calibration import SurvivalMap
from dspark.errors import DataError
from dspark.eval.results import write_results

__all__ = ["map_of", "read_sglang", "write_sglang"]

_FIELDS = ("temperatures", "dataset", "num_samples", "ece_before", "ece_after")


def write_sglang(path: str | Path, scaling: Mapping[str, Any]) -> None:
    """Write a file for SGLang's `--speculative-dspark-confidence-sts-path`.

    Args:
        path: The file.
        scaling: The `sts` of a calibration's entry.

    Raises:
        DataError: If it cannot be written.
    """
    write_results(path, {name: scaling[name] for name in _FIELDS})


def read_sglang(path: str | Path, *, depth: int) -> dict[str, Any]:
    """Read a file of this form.

    Args:
        path: The file.
        depth: Tokens that the draft's block predicts.

    Returns:
        The fields, missing ones empty, as an entry's `sts` has them.

    Raises:
        DataError: If it cannot be read, is something else, or was made for another block.
    """
    try:
        data = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror}.") from exc
    except ValueError as exc:
        raise DataError(f"{path} is not JSON: {exc}") from exc
    if not isinstance(data, dict) or "temperatures" not in data:
        raise DataError(f"{path} is no STS file of SGLang: it has no temperatures.")
    strange = sorted(data.keys() - set(_FIELDS))
    if strange:
        raise DataError(
            f"{path} has the field {strange[0]}, whose meaning in an STS file is not known.",
            hint=f"known fields: {', '.join(_FIELDS)}",
        )
    found = {
        "temperatures": _numbers(data, "temperatures", path),
        "dataset": str(data.get("dataset", "")),
        "num_samples": data.get("num_samples", 0),
        "ece_before": _numbers(data, "ece_before", path),
        "ece_after": _numbers(data, "ece_after", path),
    }
    if type(found["num_samples"]) is not int or found["num_samples"] < 0:
        raise DataError(f"{path}: num_samples is {found['num_samples']!r}, but must be >= 0.")
    if min(found["temperatures"], default=0.0) <= 0:
        raise DataError(f"{path}: temperatures must be numbers > 0, one a position.")
    if len(found["temperatures"]) != depth:
        raise DataError(
            f"{path} has {len(found['temperatures'])} temperatures, but the draft's block "
            f"predicts {depth} tokens."
        )
    return found


def map_of(temperatures: list[float]) -> SurvivalMap:
    """The survival map of temperatures alone: what the confidence head says, scaled."""
    zero, one = np.zeros(1), np.ones(1)
    return SurvivalMap(
        bias=zero,
        share=zero,
        confidence=one,
        depth=np.zeros(len(temperatures)),
        temperature=np.array(temperatures, dtype=np.float64),
    )


def _numbers(data: Mapping[str, Any], name: str, path: str | Path) -> list[float]:
    values = data.get(name, [])
    is_list = isinstance(values, list)
    if not is_list or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
        raise DataError(f"{path}: {name} must be a list of numbers.")
    return [float(value) for value in values]
