"""calibration.json: the survival maps that lie beside a draft's weights.

    {"schema": "dspark.calibration", "version": 1,
     "draft": {"fingerprint"}, "target": {"name", "fingerprint"},
     "maps": [{"rule", "temperature", "shape": "chain" or "tree",
               "map": {"bias", "share", "confidence", "depth", "temperature", "chances"},
               "sts": null or {"temperatures", ...}, ...}]}

`map` is what the engine reads (`calibration.SurvivalMap`); the rest of an entry says where it came
from. Keys may be added within a version; unknown ones are passed over.

A map of other weights would be wrong and nothing would show it, so the file names the weights it
was fitted for by a fingerprint, which reads a sample of each file: weight files are large, and a
training step changes all of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark.draft.calibration import Calibration, CalibrationKey, SurvivalMap
from dspark.errors import DataError
from dspark.request import Rule

__all__ = [
    "FILE_NAME",
    "SCHEMA",
    "VERSION",
    "calibration_beside",
    "fingerprint",
    "key_of",
    "read_calibration",
    "read_maps",
]

FILE_NAME = "calibration.json"
SCHEMA = "dspark.calibration"
VERSION = 1

_SAMPLES = 16  # places of a weight file that are looked at
_SAMPLE_BYTES = 1 << 16
_SHAPES = {"chain": True, "tree": False}

logger = logging.getLogger(__name__)


def fingerprint(folder: Path, *, has_config: bool = True) -> str:
    """SHA-256 of the weights in a folder, as far as samples tell.

    Args:
        folder: Of a draft or a target.
        has_config: Whether config.json counts. A target's does not: where its weights were
            converted, the same weights may come with another spelling of it.

    Returns:
        Digest over config.json and, of every *.safetensors file, its name, its size and 16 pieces
        of 64 KiB spread evenly over it, the first and the last bytes among them.

    Raises:
        OSError: If a file cannot be read.
    """
    digest = hashlib.sha256()
    config = folder / "config.json"
    if has_config and config.exists():
        digest.update(config.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        last = max(0, size - _SAMPLE_BYTES)
        with path.open("rb") as file:
            for piece in range(_SAMPLES):
                file.seek(last * piece // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def key_of(entry: Mapping[str, Any]) -> CalibrationKey:
    """What an entry of `maps` was fitted for.

    Raises:
        DataError: If rule, temperature or shape is missing or unknown.
    """
    rule, temperature, shape = (entry.get(name) for name in ("rule", "temperature", "shape"))
    if rule not in [item.value for item in Rule]:
        raise DataError(f"a survival map has rule {rule!r}, which is unknown.")
    is_number = type(temperature) in (int, float)
    if not is_number or not 0 <= float(temperature or 0) < math.inf:
        raise DataError(f"a survival map has temperature {temperature!r}, but must be >= 0.")
    if shape not in _SHAPES:
        raise DataError(f"a survival map has shape {shape!r}, but must be chain or tree.")
    return CalibrationKey(
        rule=Rule(rule), temperature=float(temperature or 0), is_chain=_SHAPES[str(shape)]
    )


def read_calibration(path: Path) -> dict[str, Any]:
    """Read a file's contents.

    Args:
        path: The file.

    Returns:
        Its JSON object, of a known version.

    Raises:
        DataError: If it cannot be read, or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror}.") from exc
    except ValueError as exc:
        raise DataError(f"{path} is not JSON: {exc}.") from exc
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise DataError(f"{path} is no file of {SCHEMA}.")
    if found.get("version") != VERSION:
        raise DataError(
            f"{path} is version {found.get('version')!r} of {SCHEMA}, but this dspark reads "
            f"{VERSION}."
        )
    return found


def read_maps(document: Mapping[str, Any]) -> Calibration:
    """The maps of a file's contents.

    Raises:
        DataError: If one is malformed, or two were fitted for the same.
    """
    entries = document.get("maps")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError("maps of a calibration must be a list of objects.")
    maps: dict[CalibrationKey, SurvivalMap] = {}
    for entry in entries:
        key, found = key_of(entry), entry.get("map")
        if key in maps:
            raise DataError(f"a calibration has two maps for {key.name}.")
        if not isinstance(found, dict):
            raise DataError(f"the map for {key.name} must be an object.")
        maps[key] = SurvivalMap.from_json(found)
    return Calibration(maps)


def calibration_beside(folder: Path, target: Path) -> Calibration | None:
    """The maps that lie beside a draft, if they are its own.

    A file that cannot be read, or was made for another draft or another target, is passed over
    with a warning: without it survival is the draft's own estimate, and the text is the same.

    Args:
        folder: The draft's.
        target: The target's.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        document = read_calibration(path)
        for name, place in (("draft", folder), ("target", target)):
            stated = document.get(name)
            known = stated.get("fingerprint") if isinstance(stated, dict) else None
            if known != fingerprint(place, has_config=name == "draft"):
                raise DataError(f"{path} was made for another {name}.")
        return read_maps(document)
    except DataError as exc:
        reason = exc.message
    except OSError as exc:
        reason = f"{path} cannot be checked: {exc.strerror}."
    logger.warning("%s It is not used; dspark calibrate makes it anew.", reason)
    return None
