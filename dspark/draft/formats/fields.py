"""Fields of a config.json, read by name and type, and the tensors beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dspark.errors import CheckpointError, ConfigError

__all__ = ["Fields", "read_config", "read_tensors", "reading"]

_INDEX = "model.safetensors.index.json"


@contextmanager
def reading(where: Path | str) -> Iterator[None]:
    """Turn a ConfigError about a value that was read into a CheckpointError naming the file."""
    try:
        yield
    except ConfigError as exc:
        raise CheckpointError(f"{where}: {exc.message}", hint=exc.hint) from exc


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
        CheckpointError: If it is missing or no JSON object.
    """
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise CheckpointError(f"there is no {path}.") from exc
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path} cannot be read as JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    return value


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a folder's safetensors files.

    Raises:
        CheckpointError: If there are none, or one is damaged.
    """
    index = folder / _INDEX
    if index.exists():
        weight_map = Fields(_read_json(index), index).mapping("weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index} names files outside its folder.")
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise CheckpointError(
            f"{folder} holds no .safetensors file.", hint="other weight files are not read"
        )
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as exc:
            raise CheckpointError(
                f"{folder / name} cannot be read: {exc}.", hint="fetch the file again"
            ) from exc
    return tensors


class Fields:
    """Typed look-up by name; a missing or wrong field is an error that names it.

    Args:
        values: The fields.
        where: What errors call the file.
    """

    def __init__(self, values: Mapping[str, Any], where: Path | str) -> None:
        self.values = values
        self.where = where

    def has(self, name: str) -> bool:
        """True if the field is there and not null."""
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, value, "an integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, value, "a number")
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers."""
        value = self._get(name, None)
        if not isinstance(value, list) or any(
            isinstance(item, bool) or not isinstance(item, int) for item in value
        ):
            raise self._wrong(name, value, "a list of integers")
        return tuple(value)

    def mapping(self, name: str) -> Mapping[str, Any]:
        """An object."""
        value = self._get(name, None)
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return value

    def names(self, name: str, default: Sequence[str]) -> list[str]:
        """A list of strings."""
        value = self._get(name, list(default))
        if not isinstance(value, list) or any(not isinstance(item, str) for item in value):
            raise self._wrong(name, value, "a list of strings")
        return value

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.where} has no field {name}.")
        return value

    def _wrong(self, name: str, value: object, kind: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name} is {value!r}, but must be {kind}.")
