"""Constraints written by hand, targets and drafters of few tokens, and the law they must have."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import transformers
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import dspark
from dspark.draft.base import DraftContext, Drafter
from dspark.draft.combined import CombinedDrafter
from dspark.draft.grow import GrowthConfig
from dspark.draft.lookup import LookupDrafter
from dspark.draft.model import ModelDrafter
from dspark.request import SamplingParams
from dspark.target import TargetOutput
from dspark.text import TextCodec
from tests.draft.law_check import processed
from tests.eval.toys import VOCAB, ToyCache, ToyTarget, toy_pair

END = 0
PROMPT = (2, 2, 4, 6, 7, 3, 7, 2, 4, 7, 2, 2)
FORCED = (4, 5, 6)
"""What must follow token 1 in `AUTOMATON`."""

AUTOMATON: dict[str, dict[int, str]] = {
    "start": {1: "f1", 2: "loop", 3: "choice"},
    "f1": {4: "f2"},
    "f2": {5: "f3"},
    "f3": {6: "choice"},
    "loop": {2: "loop", 4: "six", END: ""},
    "six": {6: "choice", 7: "loop"},
    "choice": {7: "start", 8: "loop", 9: "f1", 4: "six", END: ""},
}
"""State -> {token: state after it}; an end token is allowed where the text may end."""

ENDLESS = {
    state: {token: to for token, to in row.items() if token != END}
    for state, row in AUTOMATON.items()
}
"""The same without an end."""

Text = tuple[int, ...]


class Automaton:
    """A constraint by a table, as anybody could write one through the protocol."""

    end_tokens = frozenset({END})

    def __init__(
        self, table: Mapping[str, Mapping[int, str]] = AUTOMATON, vocab_size: int = VOCAB
    ) -> None:
        self.table = table
        self.vocab_size = vocab_size
        self.asked: list[Text] = []

    def start(self) -> AutomatonState:
        return AutomatonState(self)

    def after(self, state: str, text: Sequence[int]) -> str:
        for token in text:
            state = self.table.get(state, {}).get(token, "lost")
        return state

    def mask(self, state: str) -> np.ndarray:
        mask = np.zeros(self.vocab_size, dtype=np.bool_)
        mask[list(self.table.get(state, {END: ""}))] = True
        return mask


class AutomatonState:
    def __init__(self, own: Automaton) -> None:
        self._own = own
        self._state = "start"

    def allowed(self, path: Sequence[int]) -> np.ndarray:
        self._own.asked.append(tuple(path))
        return self._own.mask(self._own.after(self._state, path))

    def advance(self, token: int) -> None:
        self._state = self._own.after(self._state, [token])


class Unaware:
    """A drafter that draws as if there were no grammar."""

    capture = ()

    def __init__(self, inner: Drafter) -> None:
        self._inner = inner
        self.name = inner.name
        self.release = inner.release

    def propose(self, contexts: Sequence[DraftContext]) -> list[dspark.Proposal]:
        return self._inner.propose([replace(context, allowed=None) for context in contexts])


class AnchorBound:
    """A drafter that says it needs hidden states, so that it is asked at the anchor."""

    capture = (0,)

    def __init__(self, inner: Drafter) -> None:
        self._inner = inner
        self.name = inner.name
        self.release = inner.release
        self.propose = inner.propose


@functools.cache
def toy_target() -> ToyTarget:
    """The toy target with an end token."""
    return ending(toy_pair()[0])


def ending(target: ToyTarget) -> ToyTarget:
    target.info = replace(target.info, eos_token_ids=(END,))
    return target


def drafter_of(kind: str) -> Drafter | None:
    """A drafter for the toy target by its kind, without any state."""
    model = ModelDrafter(toy_pair()[1], vocab_size=VOCAB, config=GrowthConfig(min_survival=0.0))
    return {
        "none": lambda: None,
        "lookup": lambda: LookupDrafter(),
        "model": lambda: model,
        "combined": lambda: CombinedDrafter(LookupDrafter(), model),
        "anchor-bound": lambda: AnchorBound(model),
        "anchor-bound combined": lambda: AnchorBound(CombinedDrafter(LookupDrafter(), model)),
        "unaware": lambda: Unaware(model),
        "stubborn": lambda: Unaware(
            ModelDrafter(_always((2, 4, 7, 13)), vocab_size=VOCAB, config=GrowthConfig())
        ),
    }[kind]()


def _always(tokens: Sequence[int]) -> ToyTarget:
    """Each of these tokens with the same chance, whatever came before."""
    row = torch.full((VOCAB,), -1e9)
    row[list(tokens)] = 0.0
    return ToyTarget(row.expand(VOCAB * VOCAB, VOCAB))


DRAFTERS = ("none", "lookup", "model", "combined", "anchor-bound", "anchor-bound combined")


def engine_of(drafter: Drafter | None, target: ToyTarget | None = None, **config) -> dspark.Engine:
    values = {"max_batch": 64, "auto_off": False, "schedule": "off", **config}
    return dspark.Engine(
        toy_target() if target is None else target,
        drafter=drafter,
        config=dspark.EngineConfig(**values),
    )


def laws_of(params: SamplingParams, grammar: Automaton) -> dict[Text, float]:
    """The chance of every text, by the target's table and the masks alone."""
    table = toy_target().table.double().numpy()
    found: dict[Text, float] = {}

    def go_on(text: Text, chance: float) -> None:
        mask = grammar.mask(grammar.after("start", text))
        before = (*PROMPT, *text)[-2:]
        logits = np.where(mask, table[before[0] * VOCAB + before[1]], -np.inf)
        for token, own in enumerate(processed(logits, params)):
            longer = (*text, token)
            if own > 0 and (token == END or len(longer) == params.max_tokens):
                found[longer] = found.get(longer, 0.0) + chance * own
            elif own > 0:
                go_on(longer, chance * own)

    go_on((), 1.0)
    return found


def p_value(texts: Sequence[Text], law: Mapping[Text, float]) -> float:
    """Pearson's test of whole texts, those that expect less than five together."""
    if any(text not in law for text in texts):
        return 0.0
    counts = Counter(texts)
    cells, rest = [], np.zeros(2)
    for text, chance in law.items():
        pair = np.array([counts[text], len(texts) * chance])
        if pair[1] >= 5:
            cells.append(pair)
        else:
            rest += pair
    if rest[1] >= 5:
        cells.append(rest)
    seen, expected = np.array(cells).T
    statistic = float(((seen - expected) ** 2 / expected).sum())
    return float(stats.chi2.sf(statistic, max(len(cells) - 1, 1)))


# -- a tokenizer and targets of its size -----------------------------------------------------------

SAMPLE = (
    '{"name": "Anna", "age": 31, "tags": ["a", "b"], "kind": "alphabet", "done": true}\n'
    '{"orderId": "x", "orderName": null, "size": [1.5, -2], "child": {"name": "Bo"}}\n'
)


@functools.cache
def toy_codec() -> TextCodec:
    """A byte-level tokenizer with some longer tokens, as real ones are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>", "<turn>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE] * 3, trainer)
    names = {"eos_token": "<end>"}
    return TextCodec(transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names))


class BigramTarget(ToyTarget):
    """Logits by the last token, for any vocabulary; its own tokens go on behind the tokenizer's.

    Args:
        seed: Of its table.
        padding: Rows of the head that no token of the tokenizer has.
    """

    def __init__(self, seed: int, *, padding: int = 5) -> None:
        codec = toy_codec()
        size = len(codec.vocabulary()) + padding
        rng = np.random.default_rng(seed)
        table = 2.0 * rng.normal(size=(size, size))
        for before, after in zip(
            (ids := codec.encode_plain(SAMPLE)), [*ids[1:], ids[0]], strict=True
        ):
            table[before, after] += 6.0
        super().__init__(torch.from_numpy(table).float())
        ends = (codec.vocabulary()["<end>"], codec.vocabulary()["<turn>"])
        self.info = replace(self.info, vocab_size=size, eos_token_ids=ends)

    def forward(self, batch, cache: ToyCache, *, capture=()):
        for span in batch.spans:
            parents = batch.parent[span.start : span.stop]
            local = np.where(parents < 0, -1, parents - span.start).tolist()
            cache.last[span.slot] = (batch.token_ids[span.start : span.stop].tolist(), local)
        rows = batch.token_ids[batch.output_rows]
        return TargetOutput(self.table[torch.from_numpy(rows)])
