"""What a data set must know of its target without loading the weights: tokenizer, template."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dspark.errors import CapabilityError, CheckpointError
from dspark.eval.results import describe_model
from dspark.models.aliases import ALIASES
from dspark.models.resolve import REFERENCE, resolve_model
from dspark.text import TextCodec, load_codec

__all__ = ["describe_target", "load_tokenizer", "template_fingerprint"]

_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "encoding/*"]


def load_tokenizer(
    spec: str, *, think: bool | None = None, effort: str | None = None, is_remote: bool = False
) -> TextCodec:
    """Load a target's text codec alone.

    Args:
        spec: As --target.
        think: Have prompts ask for thinking, or not; None leaves it to the model.
        effort: How hard, for models that know it.
        is_remote: The weights are elsewhere, so only the tokenizer's files are looked for.

    Raises:
        CheckpointError: If the model cannot be found or its tokenizer not be read.
        CapabilityError: If it has no tokenizer, or no such switch in its template.
    """
    name = spec.removeprefix(REFERENCE)
    folder = _remote_folder(name) if is_remote else resolve_model(name)
    codec = _codec(folder)
    if codec is None:
        raise CapabilityError(
            f"{spec} has no tokenizer, so no data can be made with it.",
            hint="name a model folder with tokenizer files, or a hub id",
        )
    return codec if think is None and effort is None else codec.with_reasoning(think, effort)


def _codec(folder: Path) -> TextCodec | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind == "deepseek_v4":
        from dspark.base_model.chat_codec import load_v4_codec

        return load_v4_codec(folder)
    return load_codec(folder)


def _remote_folder(name: str) -> Path:
    """The tokenizer's folder of a model whose weights need not be here."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name in ALIASES or path.is_file() or "/" not in name:
        return resolve_model(name)
    import huggingface_hub
    from huggingface_hub import errors

    repo, _, revision = name.partition("@")
    try:
        found = huggingface_hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=_FILES
        )
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as exc:
        reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0].rstrip(".")
        raise CheckpointError(
            f"the tokenizer of {name!r} cannot be downloaded from the hub ({reason}).",
            hint="check the network connection, or name a local folder with the tokenizer's files",
        ) from exc
    return Path(found)


def describe_target(spec: str, *, is_remote: bool = False) -> dict[str, Any]:
    """Identify a target as far as its files tell; see `describe_model`."""
    name = spec.removeprefix(REFERENCE)
    if is_remote and not (name in ALIASES or Path(name).expanduser().exists()):
        return {"id": name, "revision": None, "source": None, "fingerprint": None}
    return describe_model(name)


def template_fingerprint(codec: TextCodec) -> str | None:
    """Checksum of the chat template, None if there is none.

    Of a template that is no text, such as DeepSeek-V4's encoding: of what it makes of a message.
    """
    if not codec.has_chat_template:
        return None
    source = getattr(codec.tokenizer, "chat_template", None)
    if not source:
        source = codec.encode_chat([{"role": "user", "content": "Hello."}])
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
