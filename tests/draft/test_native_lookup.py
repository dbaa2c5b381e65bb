"""The lookup drafter in C++ against the one in Python: the same proposals, bit by bit."""

from __future__ import annotations

import gc
import logging
import resource
import shutil
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark import native
from dspark.draft import native_lookup
from dspark.draft.base import DraftContext
from dspark.draft.combined import CombinedDrafter
from dspark.draft.corpus import Corpus
from dspark.draft.lookup import LookupConfig, LookupDrafter
from dspark.errors import CapabilityError, ConfigError, DataError
from dspark.request import Rule, SamplingParams
from dspark.verify.noise import NoiseKey

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)
pytestmark = needs_compiler


def context(tokens, *, request_id=0, rule=Rule.GREEDY, budget=15, depth=8, width=None):
    return DraftContext(
        request_id=request_id,
        tokens=tokens,
        prompt_length=1,
        params=SamplingParams(),
        rule=rule,
        noise=NoiseKey(0),
        round=1,
        budget=budget,
        depth=depth,
        width=width,
    )


def both(config=None, corpus=(), **options):
    """The same drafter in Python and in C++."""
    corpus = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
    return [
        LookupDrafter(config, corpus=corpus, path=path, **options) for path in ("plain", "fused")
    ]


def contents(proposal):
    """All that a proposal says, and the types it says it in."""
    tree = proposal.tree
    columns = (tree.token, tree.parent, tree.depth, tree.survival, proposal.law_of)
    return [(str(c.dtype), c.shape, c.tobytes()) for c in columns], proposal.source, proposal.laws


def offers(drafters, contexts):
    """What both offer, after checking that it is the same."""
    plain, compiled = (drafter.propose(contexts) for drafter in drafters)
    for one, other in zip(plain, compiled, strict=True):
        assert contents(one) == contents(other)
        other.validate()
    return compiled


@st.composite
def texts(draw, most=60):
    """Texts of few tokens, often with long repetitions, some of them of strange tokens."""
    alphabet = draw(st.integers(1, 4))
    tokens = st.integers(0, alphabet - 1)
    text = draw(st.lists(tokens, max_size=most))
    if draw(st.booleans()):
        piece = draw(st.lists(tokens, min_size=1, max_size=7))
        text += piece * draw(st.integers(1, 12))
    if draw(st.integers(0, 3)) == 0:
        strange = st.sampled_from([-1, -7, (1 << 21) - 1, 1 << 21, 1 << 40, (1 << 63) - 1])
        text += [*draw(st.lists(strange, max_size=3)), *text[-5:]]
    return text


CORPORA = st.lists(texts(30).map(lambda t: [x for x in t if 0 <= x < 9]), max_size=4)
CONFIGS = st.builds(
    LookupConfig,
    min_match=st.integers(1, 4),
    min_shared=st.integers(1, 3),
    width=st.integers(1, 4),
    min_survival=st.sampled_from([0.0, 0.02, 0.3]),
)


@st.composite
def limits(draw):
    """What a request may ask for."""
    return {
        "rule": draw(st.sampled_from(list(Rule))),
        "budget": draw(st.integers(1, 31)),
        "depth": draw(st.integers(1, 9)),
        "width": draw(st.sampled_from([None, 1, 2, 3, 40])),
    }


@given(st.lists(st.tuples(texts(), limits()), min_size=1, max_size=5), CORPORA, CONFIGS)
def test_requests_of_one_call_are_offered_the_same(asked, corpus, config):
    contexts = [context(t, request_id=i, **own) for i, (t, own) in enumerate(asked)]
    offers(both(config, corpus), contexts)


@st.composite
def histories(draw):
    """A text as a round after the other sees it: it grows, and sometimes it is another one."""
    text = draw(texts(30))
    seen = []
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.integers(0, 9))
        if kind == 0:
            text = text[: draw(st.integers(0, len(text)))]
        elif kind == 1:
            text = draw(texts(30))
        elif kind == 2 and text:
            text = [*text[:-1], text[-1] + 1, *text[-3:]]
        else:
            text = text + draw(st.lists(st.integers(0, 3), max_size=12))
        seen.append(text)
    return seen


@given(histories(), histories(), CORPORA, limits())
def test_texts_that_grow_jump_and_are_released_are_offered_the_same(first, second, corpus, own):
    drafters = both(corpus=corpus)
    for turn in range(max(len(first), len(second))):
        contexts = [
            context(text[turn], request_id=i, **own)
            for i, text in enumerate((first, second))
            if turn < len(text)
        ]
        offers(drafters, contexts)
        if turn == 3:
            for drafter in drafters:
                drafter.release(0)
    plain, compiled = drafters
    assert plain.texts_kept == compiled.texts_kept


def test_a_text_that_grows_token_by_token_is_offered_the_same():
    generator = np.random.default_rng(4)
    words = [
        generator.integers(0, 400, size=size).tolist() for size in generator.integers(2, 9, 60)
    ]
    rank = generator.zipf(1.5, size=700) % len(words)
    text = [token for number in rank for token in words[number]]
    corpus = Corpus([text[i : i + 90] for i in range(800, len(text) - 90, 45)])
    drafters = both(corpus=corpus)
    sizes = [
        offers(drafters, [context(text[:stop], width=3, budget=31)])[0].tree.num_nodes
        for stop in range(1, 800, 5)
    ]
    assert max(sizes) == 31  # there was something to compare


def test_many_occurrences_and_followers_are_offered_the_same():
    generator = np.random.default_rng(5)
    follows = np.minimum(generator.zipf(1.3, size=20_000), 900)
    answers = [[7, 10 + int(token), int(token) % 5] for token in follows]
    text = [token for answer in answers[:1000] for token in answer]
    drafters = both(LookupConfig(min_survival=0), corpus=answers)
    for tokens in (text, [7], [3, 7], [*text, 7], text[:40]):
        (offer,) = offers(drafters, [context(tokens, budget=31, depth=3, width=31)])
        assert offer.tree.num_nodes == 31
        offers(drafters, [context(tokens, budget=31, depth=3, width=31)])  # remembered


def test_a_hundred_thousand_tokens_are_offered_the_same():
    generator = np.random.default_rng(6)
    text = (generator.zipf(1.2, size=100_000) % 5000).tolist()
    drafters = both()
    for tokens in ([*text, *text[500:520]], [9] * 20_000):
        (offer,) = offers(drafters, [context(tokens)])
        assert offer.tree.max_depth == 8


@pytest.mark.parametrize("corpus", [(), [[]], [[5]], [[5, 6]]])
@pytest.mark.parametrize("tokens", [[], [5], [5, 5], [6, 5]])
def test_next_to_nothing_is_offered_the_same(corpus, tokens):
    offers(both(corpus=corpus), [context(tokens, budget=1), context(tokens, depth=1)])
    assert offers(both(corpus=corpus), []) == []


def test_limits_of_zero_offer_nothing_and_impossible_ones_are_refused():
    tokens = [1, 2, 1, 2, 1]
    for drafter in both():
        for asked in ({"budget": 0}, {"depth": 0}):
            assert drafter.propose([context(tokens, **asked)])[0].tree.num_nodes == 0
        for asked in ({"budget": -1}, {"depth": -1}, {"width": 0}):
            with pytest.raises(ConfigError, match="was asked for"):
                drafter.propose([context(tokens, **asked)])
    huge = {"budget": 1 << 62, "depth": 1 << 62, "width": 1 << 62}
    (offer,) = offers(both(), [context(tokens, **huge)])
    assert offer.tree.num_nodes > 2


@pytest.mark.parametrize("bad", [1 << 63, -(1 << 70), "a", 1.5, None])
def test_what_is_no_token_id_is_refused_and_the_drafter_goes_on(bad):
    for drafter in both():
        tokens = [1, 2, 1, 2, 1]
        drafter.propose([context(tokens, request_id=1)])
        with pytest.raises(DataError, match="no token id"):
            drafter.propose([context([*tokens, 2], request_id=1), context([1, bad], request_id=2)])
        (offer,) = drafter.propose([context([*tokens, 2, 1], request_id=1)])
        assert offer.tree.token[0] == 2


@pytest.mark.parametrize("kind", [tuple, np.array, range])
def test_a_context_may_be_any_sequence(kind):
    tokens = range(5) if kind is range else kind([1, 2, 3, 1, 2])
    drafters = both(LookupConfig(min_match=1), corpus=[[3, 4, 5]])
    for stop in (3, 5):
        (offer,) = offers(drafters, [context(tokens[:stop])])
        expected = offers(both(LookupConfig(min_match=1), [[3, 4, 5]]), [context([*tokens[:stop]])])
        assert contents(offer) == contents(expected[0])


def test_only_what_is_new_in_a_text_is_read():
    reader = native_lookup.Reader()
    text = list(range(100))
    assert list(reader.follow(text[:90])) == text[:90]
    assert reader.is_extended_by(text)
    assert list(reader.follow(text)) == text[90:]
    assert list(reader.follow(text)) == []
    assert not reader.is_extended_by(text[:99])
    assert not reader.is_extended_by([*text[:99], 0, 1])


def test_together_with_another_drafter_it_is_the_same():
    text = [1, 2, 3, 8, 1, 2, 4, 8, 1, 2, 3, 9, 1, 2]
    for rule in Rule:
        merged = [
            CombinedDrafter(drafter, LookupDrafter(corpus=[[1, 2, 5, 6]], path="plain"))
            for drafter in both(LookupConfig(min_match=1))
        ]
        (offer,) = offers(merged, [context(text, rule=rule, budget=9)])
        assert offer.tree.num_nodes


def test_texts_are_freed_with_their_request_and_with_the_drafter():
    compiled = LookupDrafter(path="fused")
    for number in range(40):
        compiled.propose([context([1, 2, 1, 2, number], request_id=number)])
    for number in range(0, 40, 2):
        compiled.release(number)
        compiled.release(number)
    assert compiled.texts_kept == 20
    again = [context([3, 4, 3, 4, 3], request_id=100 + i) for i in range(30)]
    assert all(offer.tree.token[0] == 4 for offer in compiled.propose(again))
    assert compiled.texts_kept == 50
    gone = weakref.ref(compiled._native)
    del compiled
    gc.collect()
    assert gone() is None


def test_proposals_outlive_the_next_call_and_the_drafter():
    compiled = LookupDrafter(path="fused")
    (first,) = compiled.propose([context([1, 2, 3, 1, 2])])
    before = contents(first)
    compiled.propose([context([1, 2, 3, 1, 2, 3, 9, 9, 9, 9])])
    del compiled
    gc.collect()
    assert contents(first) == before


def test_threads_share_a_drafter():
    text = [1, 2, 3, 8, 1, 2, 4, 8, 1, 2, 3, 9, 1, 2] * 5
    drafter = LookupDrafter(corpus=[text], path="fused")
    (expected,) = drafter.propose([context(text)])
    failed = []

    def work(number):
        for turn in range(50):
            (offer,) = drafter.propose([context(text, request_id=number)])
            if contents(offer) != contents(expected):
                failed.append((number, turn))
            if turn % 7 == 0:
                drafter.release(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_without_a_compiler_it_drafts_in_python(monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise native.NotCompiled("there is no C++ compiler (g++ or clang++)")

    monkeypatch.setattr(native_lookup, "load_library", fail)
    monkeypatch.delenv(native.PATH_VARIABLE, raising=False)
    caplog.set_level(logging.INFO)
    drafter = LookupDrafter()
    assert "lookup drafts in Python: there is no C++ compiler" in caplog.text
    assert drafter.propose([context([1, 2, 1, 2])])[0].tree.token[0] == 1
    with pytest.raises(CapabilityError, match="there is no C\\+\\+ compiler"):
        LookupDrafter(path="fused")


def test_the_environment_says_which_path(monkeypatch):
    monkeypatch.setenv(native.PATH_VARIABLE, "plain")
    assert native_lookup.choose_library() is None
    assert native_lookup.choose_library("fused") is not None
    monkeypatch.setenv(native.PATH_VARIABLE, "swift")
    with pytest.raises(ConfigError, match="swift"):
        LookupDrafter()


@pytest.mark.parametrize("bad", [{"followers": 17}, {"followers": 0}, {"least": 0}])
def test_settings_that_there_is_no_room_for_are_refused(bad):
    values = {"links": 32, "matches": 8, "followers": 16, "least": 1}
    doubts = {"leftover": 0.02, "doubt": 4.0, "shared_doubt": 20.0, "min_survival": 0.02}
    assert native_lookup.Limits(**values, **doubts).least == 1
    with pytest.raises(ConfigError, match="lookup is to take"):
        native_lookup.Limits(**{**values, **bad}, **doubts)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_texts_of_requests_that_ended_take_no_memory():
    drafter = LookupDrafter(path="fused")
    text = np.random.default_rng(0).integers(0, 1000, 30_000).tolist()

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def run(requests):
        for request in requests:
            drafter.propose([context(text, request_id=request)])
            drafter.release(request)

    run(range(3))
    before = resident()
    run(range(3, 43))  # some 3 MB each
    assert resident() - before < 30e6
