"""Result files: versioned JSON with a header that says what was run, on what, and how.

    {"schema": "dspark.eval", "version": 1, "header": {...}, ...}

`dspark eval`, `audit`, `bench` and `report` share the header. Two results compare if their headers
agree in what matters; `created`, `command` and `commit` are for people. No path of the machine goes
into a header but what the user typed as the command.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspark
from dspark.errors import CheckpointError, DataError
from dspark.request import SamplingParams

if TYPE_CHECKING:
    from dspark.engine import Engine
    from dspark.eval.prompts import PromptSet

__all__ = [
    "RunFacts",
    "build_header",
    "code_fingerprint",
    "describe_model",
    "describe_params",
    "describe_prompts",
    "program_facts",
    "read_results",
    "write_results",
]

_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
_SNAPSHOT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})$")
_HEAD_BYTES = 1 << 16
_PACKAGE = Path(dspark.__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a header needs to know that the engine cannot tell.

    Attributes:
        target: The target as the user named it.
        template: "chat" or "raw".
        think: Thinking asked for (True), forbidden (False) or left to the model (None).
        effort: Effort asked for, or None.
        seed: The run's seed; every question's is derived from it.
        batch: Requests in a round at the most.
        warm_ups: Runs before the first that counts.
        repeats: Runs that count.
        drafts: Drafts as the user named them.
        params: Sampling parameters after defaults were resolved, one per kind of run.
        prompts: Prompt sets.
    """

    target: str
    template: str
    drafts: tuple[str, ...] = ()
    params: tuple[SamplingParams, ...] = ()
    prompts: tuple[PromptSet, ...] = ()
    think: bool | None = None
    effort: str | None = None
    seed: int | None = None
    batch: int = 1
    warm_ups: int = 0
    repeats: int = 1


def build_header(engine: Engine, facts: RunFacts) -> dict[str, Any]:
    """What was run, on what, and how.

    Args:
        engine: The engine.
        facts: What the engine cannot tell.

    Returns:
        JSON values; see docs/eval.md for every key.
    """
    import torch

    info = engine.target.info
    return {
        **program_facts(),
        "device": info.device,
        "threads": torch.get_num_threads(),
        "target": {
            **describe_model(facts.target),
            "family": info.family,
            "dtype": info.dtype,
            "quant": info.quant,
            "vocab_size": info.vocab_size,
            "num_layers": info.num_layers,
        },
        "drafts": [describe_model(spec) for spec in facts.drafts],
        "sampling": [describe_params(params) for params in facts.params],
        "prompts": [describe_prompts(prompts) for prompts in facts.prompts],
        "exact": asdict(engine.target.exactness),
        "template": facts.template,
        "think": facts.think,
        "effort": facts.effort,
        "seed": facts.seed,
        "batch": facts.batch,
        "warm_ups": facts.warm_ups,
        "repeats": facts.repeats,
    }


def program_facts() -> dict[str, Any]:
    """The part of a header that says which program ran when, how it was called, and where."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "dspark": dspark.__version__,
        "code": code_fingerprint(),
        **_commit(),
        "libraries": dict(_libraries()),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
    }


def describe_params(params: SamplingParams) -> dict[str, Any]:
    """Sampling parameters after defaults were resolved, with the rule in force."""
    fields = {field.name: getattr(params, field.name) for field in dataclass_fields(params)}
    fields.pop("seed")  # every question has its own
    if fields.pop("grammar") is not None:
        fields["grammar"] = True  # no text of its own says which
    return {**fields, "rule": params.resolved_rule.value}


def describe_prompts(prompts: PromptSet) -> dict[str, Any]:
    """A prompt set's name, size and checksum."""
    counts: dict[str, int] = {}
    for question in prompts.questions:
        counts[question.category] = counts.get(question.category, 0) + 1
    return {
        "name": prompts.name,
        "revision": prompts.revision,
        "count": len(prompts.questions),
        "turns": prompts.num_turns,
        "sha256": prompts.sha256,
        "categories": counts,
    }


def describe_model(spec: str) -> dict[str, Any]:
    """Identify a model, or a draft that is none, as far as its files tell.

    Args:
        spec: What the user wrote for --target or --draft.

    Returns:
        `id`, and for a model `revision` (hub snapshots), `source` (built-in models: checksum of
        what they were made from) and `fingerprint`: SHA-256 of every weight file's name, size and
        first 64 KiB (names, shapes and places of all tensors) and of config.json; of a lookup
        corpus, of the file. `calibration`, only where survival maps lie beside the weights, is the
        checksum of their file. `parts` holds the halves of a combined draft. Values are None where
        there is nothing to tell.
    """
    described = {"id": _name(spec), "revision": None, "source": None, "fingerprint": None}
    halves = _halves(spec)
    if halves is not None:
        return {**described, "parts": [describe_model(half) for half in halves]}
    kind, _, corpus = spec.partition(":")
    if kind == "lookup" and corpus:
        with contextlib.suppress(OSError):
            data = Path(corpus).read_bytes()
            described["fingerprint"] = hashlib.sha256(data).hexdigest()
    if kind in ("auto", "none", "lookup"):
        return described
    from dspark.draft.calibration_file import FILE_NAME
    from dspark.models.resolve import resolve_model

    try:
        folder = resolve_model(spec, progress=False)
    except CheckpointError:
        return described
    found = _SNAPSHOT.search(str(folder))
    facts = {"source": _source(folder), "fingerprint": _fingerprint(folder)}
    maps = folder / FILE_NAME
    if maps.is_file():  # it decides which nodes a draft offers
        facts["calibration"] = hashlib.sha256(maps.read_bytes()).hexdigest()
    return {**described, **facts, "revision": found[1] if found else None}


def _halves(spec: str) -> tuple[str, str] | None:
    """The two drafts of a combined one; a folder may have a + in its name."""
    head, plus, rest = spec.partition("+")
    return (head, rest) if plus and not Path(spec).expanduser().exists() else None


def _name(spec: str) -> str:
    """The model's name without the path to it."""
    halves = _halves(spec)
    if halves is not None:
        return "+".join(_name(half) for half in halves)
    kind, colon, path = spec.partition(":")
    if colon and kind in ("lookup", "hf"):
        return f"{kind}:{_name(path)}"
    path_to = Path(spec).expanduser()
    return path_to.resolve().name if path_to.exists() else spec


def _source(folder: Path) -> dict[str, Any] | None:
    from dspark.models.store import MARKER

    try:
        source = json.loads((folder / MARKER).read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return source if isinstance(source, dict) else None


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with contextlib.suppress(OSError), path.open("rb") as file:
            digest.update(f"{path.name}:{path.stat().st_size}:".encode())
            digest.update(file.read(_HEAD_BYTES))
    return digest.hexdigest()


@cache
def code_fingerprint() -> str:
    """Fingerprint of the package's sources as they are on disk."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_PACKAGE), *arguments]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)  # noqa: S603 - a fixed command
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


@cache
def _commit() -> dict[str, Any]:
    """Commit and whether files differ from it; None outside a checkout of dspark itself."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != _PACKAGE.parent.resolve():
        return {"commit": None, "dirty": None}
    status = _git("status", "--porcelain")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


@cache
def _libraries() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@cache
def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    """Write a result file at once: a reader sees the old one or the new one.

    Raises:
        DataError: If it cannot be written.
    """
    file = Path(path).expanduser()
    temporary = file.parent / f".{file.name}.{os.getpid()}.tmp"
    text = json.dumps(results, ensure_ascii=False, allow_nan=False, indent=1)
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(file)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written: {exc.strerror}.") from exc


def read_results(path: str | Path, schema: str, version: int) -> dict[str, Any]:
    """Read a result file.

    Args:
        path: The file.
        schema: What it must be, such as "dspark.eval".
        version: The newest version the caller knows.

    Returns:
        Its contents.

    Raises:
        DataError: If it cannot be read, or is something else.
    """
    try:
        results = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror}.") from exc
    except ValueError as exc:
        raise DataError(f"{path} is not JSON: {exc}") from exc
    found = results.get("schema") if isinstance(results, dict) else None
    if found != schema:
        raise DataError(f"{path} has schema {found!r}, but must have {schema!r}.")
    if not isinstance(results.get("version"), int) or not 1 <= results["version"] <= version:
        raise DataError(
            f"{path} is version {results.get('version')!r} of {schema}, but this dspark reads 1 to "
            f"{version}."
        )
    return dict(results)
