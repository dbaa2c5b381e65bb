"""Entry points of installed packages, looked for once.

Looking for them reads the metadata of every package on the path, which takes as long as loading a
small model does, and loading one asks twice.
"""

from __future__ import annotations

import importlib.metadata
import sys
from functools import cache
from importlib.metadata import EntryPoint

__all__ = ["entry_points"]


def entry_points(*, group: str) -> tuple[EntryPoint, ...]:
    """Installed entry points of a group; looked for again if `sys.path` has changed.

    Args:
        group: For example "dspark.targets".
    """
    return _found(group, tuple(sys.path))


@cache
def _found(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=group))
