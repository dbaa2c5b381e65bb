"""A draft from one layout into another, by way of one form (stored.py).

Reading gives settings and tensors; a plan says which layout the reader of the new folder takes and
refuses what it cannot hold; parts of the target are copied in or taken out; the new config.json is
read back before anything is written; the folder appears when all of it is there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from dspark._version import __version__
from dspark.draft import calibration_file
from dspark.draft.dspark_config import DSparkConfig
from dspark.draft.eagle3_config import Layout, read_config
from dspark.draft.eagle3_format import save_tensors
from dspark.draft.eagle3_module import Eagle3Config
from dspark.draft.formats.borrow import Lender, settle_parts
from dspark.draft.formats.deepspec import dump_vocab
from dspark.draft.formats.limits import refuse_changes
from dspark.draft.formats.native import save_native
from dspark.draft.formats.plans import Plan, make_plan
from dspark.draft.formats.programs import ENGINES, Program
from dspark.draft.formats.serve import SCRIPT, engine_notes, readme, serve_script
from dspark.draft.formats.stored import FACTS, StoredDraft, read_draft
from dspark.draft.formats.write_blocks import READERS, write_block_config
from dspark.draft.formats.write_eagle3 import write_unrolled_config
from dspark.errors import CapabilityError, CheckpointError, ConfigError, DataError
from dspark.target import TargetInfo

__all__ = ["DTYPES", "ConvertedDraft", "convert_draft"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""auto: the narrowest that holds every tensor of the draft exactly."""

_WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedDraft:
    """What a conversion wrote.

    Attributes:
        folder: Where to.
        kind: DSpark, DFlash or EAGLE-3.
        source: The layout it was read from.
        layout: The layout it was written in.
        dtype: Of the weights, as text.
        notes: Sentences about what was copied, left out, or is to be known.
        script: Contents of serve.sh, None where there is no server.
    """

    folder: Path
    kind: str
    source: str
    layout: str
    dtype: str
    notes: tuple[str, ...]
    script: str | None


def convert_draft(
    source: Path,
    dest: Path,
    to: Program,
    *,
    info: TargetInfo,
    lender: Lender,
    target: str | None = None,
    dtype: str = "auto",
) -> ConvertedDraft:
    """Write the draft in a folder in the layout of another program.

    Args:
        source: With config.json and safetensors, in any layout that dspark drafts from.
        dest: Where to; must not exist, or be empty. It appears when all is written.
        to: Who will read it.
        info: The target that it is for.
        lender: Loads that target in a dtype; called only if something of it is copied or compared.
        target: What a server calls the target; None is not known.
        dtype: One of DTYPES.

    Raises:
        CheckpointError: If the source cannot be read, `dest` is not empty, or the disk is full.
        ConfigError: If the dtype is unknown, or the draft was made for another target.
        CapabilityError: If the program cannot hold the draft; the message names the field.
    """
    refuse_used(dest)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}.")
    draft = _normal(read_draft(source, info))
    plan = make_plan(draft, to)
    kind = _storage(draft, plan, dtype)
    draft, notes = settle_parts(draft, plan.parts, lender, f"{to} ({plan.layout})")
    raw = _describe(draft, plan, to, info, target)
    draft = replace(draft, tensors=_cast(draft.tensors, kind))
    if to in ENGINES:
        notes += engine_notes(draft.config, to)
    parent = dest.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", dir=parent) as scratch:
            folder = Path(scratch) / "draft"
            _write(folder, draft, plan, raw, kind)
            sts = _take_calibration(source, folder, to, notes)
            script = serve_script(draft.config, to, target, sts) if to in ENGINES else None
            made = ConvertedDraft(
                folder=dest,
                kind=draft.kind,
                source=draft.layout,
                layout=plan.layout,
                dtype=_text(kind),
                notes=tuple(notes),
                script=script,
            )
            _finish(folder, made, draft, to, target)
            if dest.exists():
                dest.rmdir()  # it is empty
            folder.rename(dest)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"{dest} cannot be written: no space left.") from exc
        raise CheckpointError(f"{dest} cannot be written: {exc.strerror or exc}.") from exc
    return made


def refuse_used(folder: Path) -> None:
    """Refuse to write where something is.

    Raises:
        CheckpointError: If the folder exists and is not empty, or is a file.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise CheckpointError(
            f"{folder} exists and is not an empty folder.", hint="choose a folder that is new"
        )


def _normal(draft: StoredDraft) -> StoredDraft:
    """The same draft without settings of heads that it has not got."""
    config = draft.config
    if isinstance(config, DSparkConfig):
        if not config.markov_rank:
            config = replace(config, markov_head_type="vanilla")
        if not config.enable_confidence_head:
            config = replace(config, confidence_head_with_markov=False)
    return replace(draft, config=config)


def _storage(draft: StoredDraft, plan: Plan, dtype: str) -> torch.dtype:
    kind = draft.dtype if dtype == "auto" else getattr(torch, dtype)
    if plan.layout == "dspark" and kind is torch.float16:
        if dtype != "auto":
            raise CapabilityError("dtype is float16, but dspark stores float32 or bfloat16.")
        kind = torch.float32
    return cast(torch.dtype, kind)


def _text(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _cast(tensors: Mapping[str, Tensor], kind: torch.dtype) -> dict[str, Tensor]:
    """The tensors in a type, each with memory of its own, as safetensors wants them."""
    ready: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        cast_one = tensor.detach().to(kind) if tensor.is_floating_point() else tensor.detach()
        if cast_one.data_ptr() in places:  # a head tied to the embedding
            cast_one = cast_one.clone()
        places.add(cast_one.data_ptr())
        ready[name] = cast_one.contiguous()
    return ready


def _describe(
    draft: StoredDraft, plan: Plan, to: Program, info: TargetInfo, target: str | None
) -> dict[str, Any]:
    """The new config.json, checked by reading it back; empty for dspark's own."""
    config, where = draft.config, f"the {plan.layout} layout"
    if isinstance(config, Eagle3Config):
        layout = cast(Layout, plan.layout)
        try:
            raw = write_unrolled_config(
                config,
                layout,
                to=to,
                num_target_layers=draft.num_target_layers,
                verifier=target,
            )
        except ConfigError as exc:
            raise CapabilityError(exc.message) from exc
        read_back: Any = read_config(raw, info, has_embedding=draft.has_embedding)
    elif plan.layout == "dspark":
        return {}
    else:
        raw = write_block_config(config, plan.layout, verifier=target, is_flat=plan.is_flat)
        reader = READERS[plan.layout]
        read_back = reader(raw, Path("config.json"), info, draft.tensors)
    refuse_changes(config, read_back, where)
    if draft.target or draft.training:
        raw[FACTS] = {"target": dict(draft.target), "training": dict(draft.training)}
    return raw


def _write(
    folder: Path, draft: StoredDraft, plan: Plan, raw: dict[str, Any], kind: torch.dtype
) -> None:
    config = draft.config
    if isinstance(config, Eagle3Config):
        raw["dtype"] = _text(kind)
        save_tensors(folder, config, draft.tensors, raw, layout=cast(Layout, plan.layout))
        return
    if plan.layout == "dspark":
        save_native(
            folder,
            config,
            draft.tensors,
            vocab_ids=draft.vocab.ids,
            storage=_text(kind),
            target=draft.target,
            training=draft.training,
        )
        return
    raw["dtype"] = _text(kind)
    folder.mkdir(parents=True)
    tensors = {**draft.tensors, **dump_vocab(draft.vocab)}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


# -- what goes with it ------------------------------------------------------------------------


def _take_calibration(source: Path, folder: Path, to: Program, notes: list[str]) -> str | None:
    """Carry over survival maps: as they are, or as SGLang's temperatures.

    Returns:
        The file of temperatures that the server is given, None for none.
    """
    path = source / calibration_file.FILE_NAME
    if not path.is_file():
        return None
    try:
        document = calibration_file.read_calibration(path)
        calibration_file.read_maps(document)
    except DataError as exc:
        notes.append(f"no survival maps: {exc.message}")
        return None
    stated = document.get("draft")
    known = stated.get("fingerprint") if isinstance(stated, dict) else None
    if known != calibration_file.fingerprint(source):
        notes.append(f"{path.name} was made for another draft and was left out.")
        return None
    if to is Program.DSPARK:
        document["draft"] = {"fingerprint": calibration_file.fingerprint(folder)}
        text = json.dumps(document, ensure_ascii=False, indent=1)
        (folder / path.name).write_text(text + "\n", encoding="utf-8")
        notes.append(f"{path.name} was carried over.")
        return None
    if to is Program.SGLANG:
        return _write_temperatures(document, folder, notes)
    notes.append(f"{path.name} is dspark's and was left out.")
    return None


def _write_temperatures(document: Mapping[str, Any], folder: Path, notes: list[str]) -> str | None:
    first = None
    for entry in document["maps"]:
        if entry["shape"] != "chain" or not entry.get("sts"):
            continue
        name = f"sts-{entry['rule']}-{entry['temperature']:g}.json"
        (folder / name).write_text(json.dumps(entry["sts"], indent=1) + "\n", encoding="utf-8")
        notes.append(f"{name} has temperatures of the confidence head for {entry['rule']}.")
        first = first or name
    if first is None:
        notes.append("calibration.json has no temperatures of a confidence head for chains.")
    return first


def _finish(
    folder: Path, made: ConvertedDraft, draft: StoredDraft, to: Program, target: str | None
) -> None:
    """Write serve.sh and README.md."""
    if made.script is not None:
        path = folder / SCRIPT
        path.write_text(made.script, encoding="utf-8")
        path.chmod(0o755)
    rows = [
        ("target", target or "not known"),
        ("made by", f"dspark {__version__}, from the layout {made.source}"),
        ("layout", f"{made.layout}, {made.dtype}"),
    ]
    steps = draft.training.get("steps")
    if isinstance(steps, int):
        rows.append(("trained", f"{steps} steps"))
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
        rows.append((file.name, f"{file.stat().st_size} bytes, SHA-256 {digest}"))
    body = made.script or ""
    title = f"{made.kind} draft for {to}"
    (folder / "README.md").write_text(readme(title, rows, made.notes, body), encoding="utf-8")
