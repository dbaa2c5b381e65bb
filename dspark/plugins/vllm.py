"""A proposer for vLLM's `method: custom_class`: lookup in each request's own text.

    vllm serve MODEL --speculative-config '{"method": "custom_class",
        "model": "dspark.plugins.vllm.LookupProposer", "num_speculative_tokens": 8}'

**The contract**, as read in vLLM 0.33.0 (v1/spec_decode/custom_class_proposer.py, whole;
v1/worker/gpu_model_runner.py, lines 610-613 and 4744-4751): the class that `model` names is made
with the engine's config alone, and `propose` is called once a step, after the sampled tokens were
written down, with the tokens that each row of the batch was given in this step (none for a prompt
that is not finished), the length of every row's text, the ids of all rows, and `slot_mappings` by
name. It returns a list of drafts per row, of any length up to `num_speculative_tokens`. vLLM calls
the interface experimental; what differs from this is refused in one sentence.

No request ids come along, and rows change places when requests come and go. A row is therefore
recognised by its text: its beginning, and the tokens before where it ended when it was last seen.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dspark.errors import CapabilityError
from dspark.plugins.chains import ChainLookup, ChainSettings

__all__ = ["READ_IN", "LookupProposer"]

READ_IN = "0.33"
"""The release of vLLM whose contract this is."""

IntArray = NDArray[np.integer]

_ENDS = 16  # tokens compared at the beginning and at the former end of a text
_SPARE = 64  # texts kept that are in no row now: preempted requests, conversations that go on


@dataclass(slots=True)
class _Known:
    """A text as it was when it was last in a row."""

    size: int
    head: IntArray
    tail: IntArray

    @classmethod
    def of(cls, tokens: IntArray) -> _Known:
        size = len(tokens)
        return cls(size, np.array(tokens[:_ENDS]), np.array(tokens[max(0, size - _ENDS) :]))

    def goes_on_in(self, tokens: IntArray) -> bool:
        """Whether a text is this one, or continues it; a wrong yes costs speed alone."""
        if len(tokens) < self.size:
            return False
        start = self.size - len(self.tail)
        return bool(
            np.array_equal(tokens[start : self.size], self.tail)
            and np.array_equal(tokens[: len(self.head)], self.head)
        )


class LookupProposer:
    """Drafts by lookup for the requests of a vLLM engine.

    Settings are those of the class, because vLLM hands over nothing but its own config; derive a
    class of your own to change them, and name that one as `model`.

    Args:
        vllm_config: vLLM's config; its `speculative_config.num_speculative_tokens` and
            `model_config.max_model_len` are read.

    Attributes:
        settings: Lengths and limits; `max_tokens` is vLLM's `num_speculative_tokens`.
        corpus: Further texts (token ids of the target) to draft from.

    Raises:
        CapabilityError: If the config has another form than vLLM 0.33's.
    """

    settings: ClassVar[ChainSettings] = ChainSettings(row_cost=0.05)
    corpus: ClassVar[Sequence[Sequence[int]]] = ()

    def __init__(self, vllm_config: Any) -> None:
        self._most = _number(vllm_config, "speculative_config", "num_speculative_tokens")
        self._longest = _number(vllm_config, "model_config", "max_model_len")
        self._chains = ChainLookup(
            replace(self.settings, max_tokens=self._most), corpus=self.corpus
        )
        self._known: OrderedDict[int, _Known] = OrderedDict()  # by id, the oldest first
        self._rows: list[int] = []  # id of each row in the last step, -1 for none
        self._next = 0

    @property
    def num_texts(self) -> int:
        """Texts kept: those of the rows, and of some requests that left them."""
        return len(self._known)

    def load_model(self, target: Any = None, **later: Any) -> None:
        """Load nothing: vLLM's runner for CPUs asks every proposer, with its target."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: IntArray,
        token_ids_cpu: IntArray,
        slot_mappings: Any = None,
        **later: Any,
    ) -> list[list[int]]:
        """Draft for the rows of a batch.

        Args:
            sampled_token_ids: Tokens that each row was given in this step.
            num_tokens_no_spec: int [rows or more], length of each row's text with these.
            token_ids_cpu: int [rows or more, longest text], the texts.
            slot_mappings: Not looked at.
            later: What later versions may add; not looked at.

        Returns:
            Drafted ids per row; empty where nothing was sampled or nothing is to be offered.

        Raises:
            CapabilityError: If the arguments have another form than vLLM 0.33's.
        """
        lengths, texts = np.asarray(num_tokens_no_spec), np.asarray(token_ids_cpu)
        _check_call(sampled_token_ids, lengths, texts)
        rows: list[int] = []
        drafts: list[list[int]] = []
        for row, sampled in enumerate(sampled_token_ids):
            size = int(lengths[row])
            room = self._longest - size - 1
            if not sampled or room < 1:
                rows.append(-1)
                drafts.append([])
                continue
            tokens = texts[row, :size]
            text_id = self._recognise(row, tokens, rows)
            rows.append(text_id)
            drafts.append(self._chains.draft(text_id, tokens, room=room).tokens)
        self._rows = rows
        self._forget(sum(text_id >= 0 for text_id in rows))
        return drafts

    def _recognise(self, row: int, tokens: IntArray, taken: Sequence[int]) -> int:
        """Id of a row's text; a new one if it was not seen before."""
        before = self._rows[row] if row < len(self._rows) else -1
        if before not in self._known or before in taken:
            before = -1
        if before < 0 or not self._known[before].goes_on_in(tokens):
            fits = (
                text_id
                for text_id in reversed(self._known)
                if text_id not in taken and self._known[text_id].goes_on_in(tokens)
            )
            before = next(fits, -1)
        if before < 0:
            before = self._next
            self._next += 1
        self._known[before] = _Known.of(tokens)
        self._known.move_to_end(before)
        return before

    def _forget(self, in_rows: int) -> None:
        while len(self._known) > in_rows + _SPARE:
            text_id, _ = self._known.popitem(last=False)
            self._chains.release(text_id)


def _version() -> str:
    return str(getattr(sys.modules.get("vllm"), "__version__", "of unknown version"))


def _refuse(what: str) -> CapabilityError:
    return CapabilityError(
        f"vLLM {_version()} {what}, unlike vLLM {READ_IN}, whose custom proposers dspark knows.",
        hint='use vLLM\'s own {"method": "ngram"} or "suffix", or another release of either',
    )


def _number(config: Any, part: str, name: str) -> int:
    value = getattr(getattr(config, part, None), name, None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _refuse(f"gives a custom proposer {value!r} as {part}.{name}")
    return value


def _check_call(sampled: Any, lengths: IntArray, texts: IntArray) -> None:
    if not isinstance(sampled, list) or not all(isinstance(row, list) for row in sampled):
        raise _refuse(f"calls a custom proposer with sampled tokens of type {type(sampled)}")
    are_ints = np.issubdtype(lengths.dtype, np.integer) and np.issubdtype(texts.dtype, np.integer)
    if not are_ints or lengths.ndim != 1 or texts.ndim != 2:
        raise _refuse(
            f"calls a custom proposer with lengths of shape {lengths.shape} and texts of shape "
            f"{texts.shape}"
        )
    if len(sampled) > min(len(lengths), len(texts)):
        raise _refuse(
            f"calls a custom proposer with {len(sampled)} rows, but only "
            f"{min(len(lengths), len(texts))} texts"
        )
