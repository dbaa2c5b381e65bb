"""A draft model for llama-cpp-python: lookup in the text, in a corpus, and by a smaller model.

    llm = Llama("model.gguf", logits_all=True)
    draft = LookupDraft.attach(llm, corpus="notes.txt")
    llm("...", temperature=0.0)
    print(draft.stats)

llama-cpp-python calls its `draft_model` with the ids of the whole text so far before every forward
but the first, evaluates what it returns together with the last token, samples at one position after
the other with its own sampler, and stops at the first token that differs. So a draft changes
neither the law of the text nor, for a given seed, the random numbers that are used.

The class has the shape of `llama_cpp.llama_speculative.LlamaDraftModel` without inheriting from it,
so that this module needs no llama-cpp-python. Read in its version 0.3.36.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dspark.draft.base import Drafter
from dspark.errors import CapabilityError, ConfigError, DataError
from dspark.plugins.chains import Chain, ChainLookup, ChainSettings

__all__ = ["DraftStats", "Llama", "LookupDraft"]

_TEXT = 0  # a Llama object has one sequence


class Llama(Protocol):
    """What `LookupDraft.attach` uses of `llama_cpp.Llama`."""

    draft_model: Any
    n_batch: int
    input_ids: NDArray[np.intc]  # room for the longest text

    def n_vocab(self) -> int:
        """Size of the vocabulary."""
        ...

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of a text."""
        ...


@dataclass(frozen=True, slots=True)
class DraftStats:
    """What the calls so far came to.

    Attributes:
        calls: Calls; each is followed by one forward of the target.
        drafted: Tokens offered.
        accepted: Tokens offered that are in the text. What the last call of a text offered is
            counted when the next call shows that text or one that goes on from it.
    """

    calls: int = 0
    drafted: int = 0
    accepted: int = 0


class LookupDraft:
    """A draft model for `llama_cpp.Llama(draft_model=...)`.

    Args:
        settings: Lengths and limits.
        corpus: Further texts (token ids of the target) to draft from.
        vocab_size: Ids from here on are never offered; needed with `corpus` or `second`, because
            llama.cpp ends with an error on an id that it does not have.
        second: A drafter that is asked where lookup is not sure, see `load_draft_model`.

    Raises:
        ConfigError: If `vocab_size` is missing, or another setting is out of range.
    """

    def __init__(
        self,
        settings: ChainSettings | None = None,
        *,
        corpus: Sequence[Sequence[int]] = (),
        vocab_size: int | None = None,
        second: Drafter | None = None,
    ) -> None:
        if vocab_size is None and (corpus or second is not None):
            raise ConfigError(
                "vocab_size is missing, but ids of a corpus or a draft model must be checked.",
                hint="give vocab_size=llm.n_vocab(), or use LookupDraft.attach(llm, ...)",
            )
        self._chains = ChainLookup(settings, corpus=corpus, vocab_size=vocab_size, second=second)
        self._last: tuple[int, Chain] = (0, Chain([], []))
        self._stats = DraftStats()

    @classmethod
    def attach(
        cls,
        llm: Llama,
        *,
        corpus: str | Path | None = None,
        model: str | None = None,
        settings: ChainSettings | None = None,
    ) -> LookupDraft:
        """Make a draft model for an opened target and set it.

        Args:
            llm: A `llama_cpp.Llama` made with `logits_all=True`; its `draft_model` is replaced.
            corpus: A UTF-8 text file that texts may be continued from, read with the target's
                tokenizer.
            model: A smaller model that dspark can load, with the target's vocabulary.
            settings: Lengths and limits.

        Returns:
            The draft model.

        Raises:
            ConfigError: If the target was not made with `logits_all=True`, has a batch too small
                for a chain, or another vocabulary than the draft model.
            DataError: If the corpus cannot be read.
        """
        settings = settings or ChainSettings()
        _check_target(llm, settings)
        texts = [] if corpus is None else [llm.tokenize(_read(corpus), add_bos=False)]
        second = None if model is None else load_draft_model(model, vocab_size=llm.n_vocab())
        draft = cls(settings, corpus=texts, vocab_size=llm.n_vocab(), second=second)
        llm.draft_model = draft
        return draft

    @property
    def stats(self) -> DraftStats:
        """What the calls so far came to."""
        return self._stats

    def __call__(self, input_ids: NDArray[np.intc], /, **kwargs: Any) -> NDArray[np.intc]:
        """Draft what may follow a text.

        Args:
            input_ids: int [n], the whole text so far; a view of the engine's own buffer.
            kwargs: What later versions may add; not looked at.

        Returns:
            int [k] drafted ids, k >= 0.
        """
        self._count(input_ids)
        chain = self._chains.draft(_TEXT, input_ids)
        self._last = (len(input_ids), chain)
        self._stats = replace(
            self._stats,
            calls=self._stats.calls + 1,
            drafted=self._stats.drafted + len(chain.tokens),
        )
        return np.array(chain.tokens, dtype=np.intc)

    def _count(self, tokens: NDArray[np.intc]) -> None:
        """See how much of the last chain is in the text."""
        size, chain = self._last
        accepted = 0
        if len(tokens) > size and self._chains.shows(_TEXT, tokens[:size]):
            for offered, token in zip(chain.tokens, tokens[size:].tolist(), strict=False):
                if offered != token:
                    break
                accepted += 1
        self._stats = replace(self._stats, accepted=self._stats.accepted + accepted)


def load_draft_model(spec: str, *, vocab_size: int) -> Drafter:
    """Load a smaller model as a second drafter.

    Args:
        spec: A model as in `dspark generate --target`.
        vocab_size: Size of the target's vocabulary. That the ids mean the same cannot be seen
            from here; where they do not, nothing is accepted.

    Returns:
        The drafter.

    Raises:
        ConfigError: If the vocabularies differ in size.
        CapabilityError: If the model cannot draft.
        CheckpointError: If it cannot be found or read.
    """
    from dspark.draft.model import ModelDrafter
    from dspark.models.resolve import resolve_model
    from dspark.registry import LoadOptions, load_target

    target = load_target(resolve_model(spec), LoadOptions(name=spec)).target
    return ModelDrafter(target, vocab_size=vocab_size)


def _check_target(llm: Llama, settings: ChainSettings) -> None:
    rows, texts = getattr(llm, "scores", None), getattr(llm, "input_ids", None)
    if rows is None or texts is None or not hasattr(llm, "draft_model"):
        raise CapabilityError(
            "this llama-cpp-python has no draft models of the form that dspark knows (0.3.36)."
        )
    if not getattr(llm, "_logits_all", False) or len(rows) < len(texts):
        raise ConfigError(
            f"the target keeps logits of {len(rows)} positions, but drafts need all {len(texts)}.",
            hint="open it with Llama(..., logits_all=True)",
        )
    if llm.n_batch <= settings.max_tokens:
        raise ConfigError(
            f"n_batch is {llm.n_batch}, but must be above max_tokens, which is "
            f"{settings.max_tokens}: logits of one batch are read."
        )


def _read(path: str | Path) -> bytes:
    try:
        data = Path(path).read_bytes()
        data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise DataError(f"the lookup corpus {path} is not UTF-8 text.") from exc
    except OSError as exc:
        raise DataError(f"the lookup corpus {path} cannot be read: {exc.strerror}.") from exc
    return data
