"""The tokenizer of a small V4, and texts as one array of tokens.

Byte-level BPE with the special tokens of V4's chat encoding. A document becomes BOS, its tokens,
EOS; a chat brings its own. All documents of a split and kind stand behind one another:

    <folder>/tokenizer.json, tokenizer_config.json
    <folder>/tokens.<split>.<kind>.npy   uint16 or int32 [tokens]
    <folder>/starts.<split>.<kind>.npy   int64 [documents + 1]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dspark.base_model.chat import (
    ASSISTANT,
    BOS,
    DSML,
    EOS,
    REMINDER,
    THINK_BEGIN,
    THINK_END,
    USER,
    Task,
)
from dspark.errors import DataError
from dspark.training.pretrain.text import KINDS, Document

__all__ = ["NOISE", "SPECIAL", "TokenStream", "Tokens", "save_tokenizer", "train_tokenizer"]

PAD = "<｜▁pad▁｜>"
NOISE = "<｜place▁holder▁no▁0｜>"
"""What fills the slots of a DSpark block behind the anchor."""

SPECIAL = (
    BOS,
    EOS,
    PAD,
    USER,
    ASSISTANT,
    THINK_BEGIN,
    THINK_END,
    DSML,
    REMINDER,
    *(task.token for task in Task),
    NOISE,
)
"""In the order of their ids, from 0; those of BOS, EOS and PAD are V4's."""

_TEXT_TOKENS = (THINK_BEGIN, THINK_END, DSML)  # decoded with the text, as in V4's tokenizer
# Words with the mark or space before them, up to three digits, runs of marks, line ends, spaces.
_PIECES = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Array = NDArray[np.int64]


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train the tokenizer.

    Args:
        texts: Without special tokens.
        vocabulary: Tokens, special ones included.

    Raises:
        DataError: If the texts do not give so many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(t, special=t not in _TEXT_TOKENS) for t in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise DataError(
            f"the text gives {tokenizer.get_vocab_size()} tokens, but {vocabulary} are wanted."
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_positions: int) -> None:
    """Write the two files that loaders read."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.encode_special_tokens = False
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": max_positions,
        "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class TokenStream:
    """Documents of one split and kind.

    Attributes:
        tokens: Ids, documents behind one another.
        starts: int64 [documents + 1], where each begins, and the end.
    """

    tokens: NDArray[np.generic]
    starts: Array

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self.starts) - 1

    def document(self, index: int) -> Array:
        """Tokens of one document, int64."""
        return self.tokens[self.starts[index] : self.starts[index + 1]].astype(np.int64)


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenised collection.

    Attributes:
        streams: By split and kind; kinds without documents are left out.
    """

    streams: dict[tuple[str, str], TokenStream]

    @staticmethod
    def encode(documents: Sequence[Document], tokenizer: Tokenizer) -> Tokens:
        """Tokenise documents."""
        bos, eos = SPECIAL.index(BOS), SPECIAL.index(EOS)
        found: dict[tuple[str, str], list[list[int]]] = {}
        for document in documents:
            # In a source file "<think>" is six characters, in a chat it is the token.
            is_chat = document.kind == "chat"
            tokenizer.encode_special_tokens = not is_chat
            ids = tokenizer.encode(document.text, add_special_tokens=False).ids
            if not is_chat:
                ids = [bos, *ids, eos]
            found.setdefault((document.split, document.kind), []).append(ids)
        tokenizer.encode_special_tokens = False
        dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.int32
        return Tokens(
            {
                key: TokenStream(
                    np.concatenate([np.asarray(part, dtype=dtype) for part in parts]),
                    np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64),
                )
                for key, parts in sorted(found.items())
            }
        )

    def save(self, folder: Path) -> None:
        """Write the arrays."""
        for name, array in self._arrays():
            np.save(folder / name, array, allow_pickle=False)

    @staticmethod
    def load(folder: Path) -> Tokens:
        """Read the arrays.

        Raises:
            DataError: If there are none, or one cannot be read.
        """
        streams = {}
        for split in ("train", "held-out"):
            for kind in KINDS:
                path = folder / f"tokens.{split}.{kind}.npy"
                if not path.exists():
                    continue
                try:
                    tokens = np.load(path, allow_pickle=False)
                    starts = np.load(folder / f"starts.{split}.{kind}.npy", allow_pickle=False)
                except (OSError, ValueError) as exc:
                    raise DataError(f"{path} cannot be read: {exc}.") from exc
                streams[split, kind] = TokenStream(tokens, starts)
        if not any(split == "train" for split, _ in streams):
            raise DataError(f"{folder} holds no tokens to train on.")
        return Tokens(streams)

    def kinds(self, split: str) -> list[str]:
        """Kinds that a split has documents of."""
        return [kind for kind in KINDS if (split, kind) in self.streams]

    def count(self, split: str) -> int:
        """Tokens of a split."""
        return sum(len(s.tokens) for (part, _), s in self.streams.items() if part == split)

    def fingerprint(self) -> str:
        """SHA-256 of all arrays."""
        digest = hashlib.sha256()
        for name, array in self._arrays():
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _arrays(self) -> Iterator[tuple[str, NDArray[np.generic]]]:
        for (split, kind), stream in sorted(self.streams.items()):
            yield f"tokens.{split}.{kind}.npy", stream.tokens
            yield f"starts.{split}.{kind}.npy", stream.starts
