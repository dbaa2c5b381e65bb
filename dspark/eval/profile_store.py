"""Where profiles are kept and found again: the user's cache folder, one file per key.

The key is all that a step's time depends on but the machine's load: the target's files, device,
processor, dtype, threads, exact mode, version of torch, and the memory that experts may take.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dspark.engine import Engine
from dspark.errors import DataError
from dspark.eval.profile import Profile, ProfileKey, read_profile
from dspark.eval.results import RunFacts, build_header, write_results
from dspark.target import Target

__all__ = ["describe_target", "keep_profile", "key_of", "load_profile", "profile_path"]


def describe_target(target: Target) -> dict[str, Any]:
    """The header of result files for a target by itself."""
    return build_header(Engine(target), RunFacts(target=target.info.name, template="raw"))


def key_of(
    target: Target,
    *,
    header: Mapping[str, Any] | None = None,
    expert_memory: int | None = None,
) -> ProfileKey:
    """What a profile of this target, as it is loaded, is kept under.

    Args:
        target: The target; its name must be what it was loaded by, so that its files are found.
        header: From `describe_target`, if it is known already.
        expert_memory: Bytes that its routed experts are held to.
    """
    found = describe_target(target) if header is None else header
    model = found["target"]
    return ProfileKey(
        target=model["fingerprint"] or model["id"],
        device=found["device"],
        processor=found["processor"],
        dtype=model["dtype"],
        threads=found["threads"],
        exact=bool(found["exact"]["enabled"]),
        torch=found["libraries"].get("torch", ""),
        expert_memory=expert_memory,
        backend=found["exact"]["backend"],
    )


def profile_path(key: ProfileKey, *, cache: str | Path | None = None) -> Path:
    """The file of a key.

    Args:
        key: The key.
        cache: Cache folder, None for the user's.
    """
    from dspark.models.fetch import cache_root

    text = json.dumps(asdict(key), sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    return cache_root(cache) / "profiles" / f"{name}.json"


def keep_profile(profile: Profile, *, cache: str | Path | None = None) -> Path | None:
    """Keep a profile for `load_profile`; a folder that cannot be written is no error.

    Args:
        profile: The profile.
        cache: Cache folder, None for the user's.

    Returns:
        The file, or None if it could not be written.
    """
    path = profile_path(profile.key, cache=cache)
    with contextlib.suppress(OSError, DataError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_results(path, profile.to_json())
        return path
    return None


def load_profile(
    target: Target, *, expert_memory: int | None = None, cache: str | Path | None = None
) -> Profile | None:
    """Find the profile that was kept for a target as it is loaded now.

    Args:
        target: The target.
        expert_memory: Bytes that its routed experts are held to.
        cache: Cache folder, None for the user's.

    Returns:
        The profile, or None if there is none that can be read.
    """
    key = key_of(target, expert_memory=expert_memory)
    try:
        profile = read_profile(profile_path(key, cache=cache))
    except DataError:
        return None
    return profile if profile.key == key else None
