"""From the vocabulary in a GGUF file to tokenizer.json, by way of transformers.

transformers rebuilds the tokenizer; three rules of llama.cpp that it leaves out are added here:
how some vocabularies split text (SmolLM2 splits digits), which merge rules give way to whole words
(Llama 3), and which vocabularies begin with BOS although the file does not say so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.errors import CapabilityError, CheckpointError
from dspark.models.gguf_reader import GGUFFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["save_tokenizer"]

# Source: llama.cpp, src/llama-vocab.cpp, llama_vocab::impl::load (names of pre-tokenizers).
_DIGITS_THEN_GPT2 = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell"})
_PLAIN_GPT2 = frozenset({"gpt-2", "phi-2", "jina-es", "jina-de", "mpt", "olmo", "trillion"})
_WORDS_FIRST = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"})
_BEGINS_WITH_BOS = _WORDS_FIRST
_SAVED_CLASS = "PreTrainedTokenizerFast"  # loads tokenizer.json as it is, whatever the model type


def save_tokenizer(file: GGUFFile, folder: Path) -> bool:
    """Write tokenizer.json, tokenizer_config.json and the chat template.

    Args:
        file: Header of the GGUF file.
        folder: Folder to write to.

    Returns:
        False if the file holds no tokenizer.

    Raises:
        CapabilityError: If the vocabulary is of a kind that cannot be rebuilt faithfully.
        CheckpointError: If the vocabulary contradicts itself.
    """
    kind = file.metadata.get("tokenizer.ggml.model", "none")
    if kind == "none":
        return False
    pre = str(file.metadata.get("tokenizer.ggml.pre", "default"))
    _check_kind(file, kind, pre)
    tokenizer = _rebuild(file, pre)
    if kind == "gpt2":
        _mend_byte_level(file, tokenizer, pre)
    tokenizer.save_pretrained(folder)
    _tidy(folder / "tokenizer_config.json")
    return True


def _check_kind(file: GGUFFile, kind: str, pre: str) -> None:
    if kind not in ("gpt2", "llama"):
        raise CapabilityError(
            f"{file.path} has a tokenizer of kind {kind!r}, but only gpt2 and llama are supported."
        )
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    known = _DIGITS_THEN_GPT2 | _PLAIN_GPT2 | set(GGUF_PRE_TOKENIZER_SPLITS)
    if kind == "gpt2" and pre not in known:
        raise CapabilityError(
            f"{file.path} splits text by the rule {pre!r}, which is not known.",
            hint="use the safetensors weights and tokenizer of the same model",
        )


def _rebuild(file: GGUFFile, pre: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    # What the file says goes before this.
    rule: dict[str, Any] = {"add_bos_token": True} if pre in _BEGINS_WITH_BOS else {}

    try:
        made: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            str(file.path.parent), gguf_file=file.path.name, **rule
        )
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError) as exc:
        raise CheckpointError(f"the tokenizer in {file.path} cannot be read ({exc}).") from exc
    return made


def _mend_byte_level(file: GGUFFile, tokenizer: PreTrainedTokenizerFast, pre: str) -> None:
    from tokenizers import pre_tokenizers

    backend: Any = tokenizer.backend_tokenizer
    if pre in _DIGITS_THEN_GPT2:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if pre in _WORDS_FIRST:
        backend.model.ignore_merges = True


def _tidy(path: Path) -> None:
    """Drop what describes this machine and name a class that every transformers version knows."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "backend", "name_or_path"):
        config.pop(key, None)
    config["tokenizer_class"] = _SAVED_CLASS
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
