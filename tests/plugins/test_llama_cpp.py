"""The draft model for llama-cpp-python, by a double of what calls it, and by the real one."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dspark.draft.model import ModelDrafter
from dspark.errors import ConfigError, DataError
from dspark.plugins.chains import ChainSettings, paying_length
from dspark.plugins.llama_cpp import LookupDraft
from dspark.target import BatchPart, TokenBatch
from tests.conftest import random_target

FAR = ChainSettings(row_cost=0.0)


def next_token(text):
    """A target: the first seven tokens again and again, but every 20th token is another."""
    place = len(text)
    return 900 + place if place % 20 == 19 else int(text[place % 7])


class Engine:
    """Calls a draft model as llama-cpp-python 0.3.36 does (llama.py, `generate`).

    The draft is shown a view of the buffer that holds the text and the last token, its answer is
    evaluated with that token, positions are compared one after the other, and what was evaluated
    after the first difference stays in the buffer until it is overwritten.
    """

    def __init__(self, context=4096, batch=512):
        self.draft_model = None
        self.n_batch = batch
        self.scores = np.zeros((context, 1))
        self._logits_all = True
        self.input_ids = np.zeros(context, dtype=np.intc)
        self.forwards = 0
        self.seen = []

    def n_vocab(self):
        return 1000

    def tokenize(self, text, add_bos=True, special=False):
        return [1] * add_bos + list(text)

    def generate(self, prompt, count):
        text, pending, made = list(prompt), [], []
        while True:
            self.forwards += 1
            place = len(text)
            self.input_ids[place : place + len(pending)] = pending
            while len(made) < count:
                token = next_token(text)
                text.append(token)
                made.append(token)
                if not pending or pending.pop(0) != token:
                    break
            if len(made) >= count:
                return made
            pending = []
            if self.draft_model is not None:
                self.input_ids[: len(text)] = text
                view = self.input_ids[: len(text)]
                self.seen.append(len(view))
                drafted = self.draft_model(view)
                assert drafted.dtype == np.intc
                pending = drafted.astype(int)[: len(self.input_ids) - len(text)].tolist()


PROMPT = list(range(10, 17))


def test_the_text_stays_and_forwards_are_saved():
    plain, drafted = Engine(), Engine()
    drafted.draft_model = LookupDraft()
    assert drafted.generate(PROMPT, 200) == plain.generate(PROMPT, 200)
    stats = drafted.draft_model.stats
    assert drafted.forwards < plain.forwards / 2.5
    assert stats.calls == len(drafted.seen) == drafted.forwards - 1
    # Every forward gives a token of its own besides the accepted ones; the last is not counted yet.
    assert 0 < 200 - drafted.forwards - stats.accepted <= ChainSettings().max_tokens
    assert stats.accepted <= stats.drafted


def test_a_second_answer_drafts_from_the_first():
    engine = Engine()
    engine.draft_model = LookupDraft(FAR)
    first = engine.generate(PROMPT, 60)
    before = engine.forwards
    assert engine.generate(PROMPT, 60) == first  # the text is cut back to the prompt
    again = engine.forwards - before
    assert again < before / 1.5
    forgets = Engine()
    forgets.draft_model = LookupDraft(ChainSettings(row_cost=0.0, keep=0))
    forgets.generate(PROMPT, 60)
    before = forgets.forwards
    assert forgets.generate(PROMPT, 60) == first
    assert forgets.forwards - before == before  # nothing was kept


def follow(draft, text):
    return draft(np.array(text, dtype=np.intc)).tolist()


@pytest.mark.parametrize("cut", [0, 1, 5, 40, 99])
def test_after_a_departure_it_drafts_as_one_that_read_the_new_text_alone_would(cut):
    """As long as the departed branch has nothing to say about the new one."""
    old = list(range(100, 200))
    new = [*old[:cut], 7, 8, 9, 7, 8, 9, 7, 8]
    kept, fresh = LookupDraft(FAR), LookupDraft(FAR)
    follow(kept, old)
    assert follow(kept, new) == follow(fresh, new)
    assert follow(kept, [*new, 9]) == follow(fresh, [*new, 9]) != []


def test_the_departed_branch_goes_on_being_a_source():
    draft = LookupDraft(FAR)
    follow(draft, [1, 2, 3, 4, 5, 6, 7, 8])
    assert follow(draft, [1, 2, 3, 4]) == [5, 6, 7, 8]
    assert follow(draft, [90, 91, 2, 3]) == [4, 5, 6, 7, 8]


def test_the_engines_buffer_is_not_kept():
    buffer = np.arange(100, 130, dtype=np.intc)
    draft = LookupDraft(FAR)
    draft(buffer[:10])
    buffer[:10] = 0  # what the engine does with a new prompt
    assert follow(draft, [*range(100, 110), 100, 101]) == [*range(102, 110), 100, 101]


def test_a_long_text_is_not_read_again_in_every_call():
    rng = np.random.default_rng(0)
    text = rng.integers(0, 500, 40_000).astype(np.intc)
    draft = LookupDraft(ChainSettings(keep=100_000))
    start = time.perf_counter()
    draft(text[:-60])
    reading = time.perf_counter() - start
    start = time.perf_counter()
    for end in range(1, 61):  # a token more in each call
        draft(text[: len(text) - 60 + end])
    for end in range(1, 61):  # and thousands of tokens fewer in each
        draft(text[: -500 * end])
    assert time.perf_counter() - start < 120 * reading / 10


def test_chains_end_where_a_row_costs_more_than_it_brings():
    survival = [0.9, 0.8, 0.5, 0.3, 0.1]
    for cost in (0.0, 0.05, 0.2, 0.5, 0.95, 1.0):
        length = paying_length(survival, cost)
        ratios = [(1 + sum(survival[:n])) / (1 + n * cost) for n in range(len(survival) + 1)]
        assert ratios[length] == max(ratios)
    assert paying_length(survival, 0.0) == 5
    assert paying_length(survival, 1.0) == 0


def test_attach_reads_a_corpus_and_sets_the_draft(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz", encoding="utf-8")
    engine = Engine()
    draft = LookupDraft.attach(engine, corpus=path, settings=FAR)
    assert engine.draft_model is draft
    offered = follow(draft, [1, *b"abcdefghijklmnop"])
    assert len(offered) > 1
    assert bytes(offered) == b"qrstuvwxyz"[: len(offered)]


def test_what_cannot_work_is_refused(tmp_path):
    engine = Engine()
    engine.scores = np.zeros((64, 1))
    with pytest.raises(ConfigError, match="logits of 64 positions, but drafts need all 4096"):
        LookupDraft.attach(engine)
    with pytest.raises(ConfigError, match="n_batch is 8, but must be above max_tokens"):
        LookupDraft.attach(Engine(batch=8))
    with pytest.raises(DataError, match="cannot be read"):
        LookupDraft.attach(Engine(), corpus=tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="not UTF-8"):
        LookupDraft.attach(Engine(), corpus=tmp_path / "latin.txt")
    with pytest.raises(ConfigError, match="vocab_size is missing"):
        LookupDraft(corpus=[[1, 2, 3]])
    with pytest.raises(ConfigError, match="token 9, but the vocabulary ends at 8"):
        LookupDraft(corpus=[[1, 9]], vocab_size=9)
    for field in ("max_tokens", "min_match"):
        with pytest.raises(ConfigError, match=f"{field} is 0"):
            ChainSettings(**{field: 0})
    with pytest.raises(ConfigError, match="row_cost is 2"):
        ChainSettings(row_cost=2)


def test_a_draft_model_is_asked_where_lookup_is_not_sure():
    """A draft model that is the target itself: every token it offers is accepted."""
    target = random_target("llama", exact=False)
    vocabulary = target.info.vocab_size

    def greedy(text, count):
        out = list(text)
        for _ in range(count):
            cache = target.new_cache()
            slot, _ = cache.open(out)
            cache.reserve(slot, len(out))
            part = BatchPart.chain(slot, out, 0, want_last=True)
            out.append(int(target.forward(TokenBatch.build([part]), cache).logits[-1].argmax()))
        return out[len(text) :]

    second = ModelDrafter(target, vocab_size=vocabulary)
    settings = ChainSettings(max_tokens=4, row_cost=0.0)
    draft = LookupDraft(settings, second=second, vocab_size=vocabulary)
    text = [5, 9, 3, 11]
    for _ in range(3):
        offered = follow(draft, text)
        assert offered
        assert offered == greedy(text, len(offered))
        text = [*text, *offered, *greedy([*text, *offered], 1)]
    low = LookupDraft(settings, second=second, vocab_size=min(offered))
    assert all(token < min(offered) for token in follow(low, text))


class NeedsHiddenStates:
    name = "eagle3"
    capture = (1, 2, 3)


def test_a_drafter_that_reads_hidden_states_is_refused():
    with pytest.raises(ConfigError, match="eagle3 reads the target's hidden states"):
        LookupDraft(second=NeedsHiddenStates(), vocab_size=8)


@pytest.fixture(scope="module")
def llama():
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path = os.environ.get("DSPARK_LLAMA_CPP_MODEL", "")
    if not Path(path).is_file():
        pytest.skip("DSPARK_LLAMA_CPP_MODEL names no GGUF file")
    return llama_cpp.Llama(
        path, n_ctx=512, logits_all=True, n_threads=1, n_threads_batch=1, verbose=False
    )


CODE = (
    "def area(width, height):\n    return width * height\n\n"
    "def perimeter(width, height):\n    return 2 * (width + height)\n\n"
    "The same two functions again:\n\ndef area(width, height):\n"
)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_llama_cpp_gives_the_same_text_for_the_same_seed(llama, temperature):
    def run():
        llama.reset()
        out = llama(CODE, max_tokens=48, temperature=temperature, seed=3)
        return out["choices"][0]["text"]

    llama.draft_model = None
    plain = run()
    draft = LookupDraft.attach(llama)
    assert [run(), run()] == [plain, plain]
    assert draft.stats.accepted > 24
    assert draft.stats.calls < 2 * 48 - draft.stats.accepted + 1


@pytest.mark.slow
def test_llama_cpp_shows_logits_processors_drafted_tokens_too(llama):
    """Documented: if this fails, llama-cpp-python has mended it, and docs/plugins.md is wrong."""
    from llama_cpp import LogitsProcessorList

    def lengths():
        seen = []

        def record(ids, scores):
            seen.append(len(ids))
            return scores

        llama.reset()
        processors = LogitsProcessorList([record])
        llama(CODE, max_tokens=16, temperature=0.0, logits_processor=processors)
        return [b - a for a, b in pairwise(seen)]

    llama.draft_model = None
    assert set(lengths()) == {1}
    LookupDraft.attach(llama)
    assert set(lengths()) != {1}
