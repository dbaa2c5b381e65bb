"""The suffix automaton against brute force, and the trees that the lookup drafter offers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.draft.base import DraftContext, Drafter
from dspark.draft.lookup import LookupConfig, LookupDrafter, Match, SuffixAutomaton, blend
from dspark.errors import ConfigError
from dspark.request import Rule, SamplingParams
from dspark.tree import POINT_MASS
from dspark.verify.noise import NoiseKey

TEXTS = st.lists(st.integers(0, 2), max_size=24)


def context(tokens, *, budget=15, depth=8, rule=Rule.GREEDY, **options):
    values = {
        "request_id": 0,
        "prompt_length": 1,
        "params": SamplingParams(),
        "noise": NoiseKey(0),
        "round": 0,
        **options,
    }
    return DraftContext(tokens=tokens, rule=rule, budget=budget, depth=depth, **values)


def offer(drafter, tokens, **options):
    return drafter.propose([context(tokens, **options)])[0]


def occurrences(text, part):
    """End positions of `part` in `text`."""
    n = len(part)
    return [i + n - 1 for i in range(len(text) - n + 1) if text[i : i + n] == part]


def longest_match(text, tokens):
    """Length of the longest suffix of `tokens` that occurs in `text`."""
    return max(n for n in range(len(tokens) + 1) if n == 0 or occurrences(text, tokens[-n:]))


@given(TEXTS, TEXTS)
def test_the_automaton_knows_every_substring_its_count_and_its_followers(text, probe):
    automaton = SuffixAutomaton(text)
    for start in range(len(text)):
        for stop in range(start + 1, len(text) + 1):
            part = text[start:stop]
            state = 0
            for token in part:
                state = automaton.next[state][token]
            ends = occurrences(text, part)
            assert automaton.count[state] == len(ends)
            assert automaton.latest[state] == ends[-1]
            assert automaton.length[automaton.link[state]] < len(part) <= automaton.length[state]
            followers = {text[end + 1] for end in ends if end + 1 < len(text)}
            assert set(automaton.next[state]) == followers
    assert len(automaton.next) <= max(2 * len(text), 1)
    state, length = 0, 0
    for i, token in enumerate(probe):
        state, length = automaton.step(state, length, token)
        assert length == longest_match(text, probe[: i + 1])


@given(TEXTS)
def test_the_repeated_suffix_is_the_longest_that_occurred_before(text):
    automaton = SuffixAutomaton()
    for i, token in enumerate(text):
        automaton.extend([token])
        seen = text[: i + 1]
        expected = max(n for n in range(i + 1) if n == 0 or len(occurrences(seen, seen[-n:])) > 1)
        state, length = automaton.repeated_suffix()
        assert length == expected
        assert set(automaton.next[state]) == set(SuffixAutomaton(seen).next[state])


def test_a_long_repetition_stays_linear():
    automaton = SuffixAutomaton([7] * 5000)
    assert len(automaton.next) == 5001
    assert automaton.repeated_suffix()[1] == 4999


def test_it_is_a_drafter():
    assert isinstance(LookupDrafter(), Drafter)
    assert LookupDrafter().capture == ()


def test_nothing_is_offered_without_a_match():
    drafter = LookupDrafter()
    assert offer(drafter, [1]).tree.num_nodes == 0
    assert offer(drafter, [1, 2, 3, 4]).tree.num_nodes == 0
    assert offer(drafter, [1, 2, 3, 4, 2]).tree.num_nodes == 0  # one token is below the default
    eager = LookupDrafter(LookupConfig(min_match=1))
    assert offer(eager, [1, 2, 3, 4, 2]).tree.token[0] == 3


def test_the_earlier_continuation_is_offered():
    tree = offer(LookupDrafter(), [1, 2, 3, 4, 5, 6, 7, 1, 2, 3], depth=3).tree
    assert tree.is_chain
    assert tree.token.tolist() == [4, 5, 6]
    tree.validate()


def test_disagreeing_occurrences_branch_and_counts_decide():
    text = [1, 2, 3, 8, 1, 2, 4, 8, 1, 2, 3, 9, 1, 2]
    tree = offer(LookupDrafter(), text).tree
    tree.validate()
    first = tree.children_of(-1)
    assert tree.token[first].tolist() == [3, 4]  # twice against once
    below = tree.children_of(int(first[0]))
    assert sorted(tree.token[below].tolist()) == [8, 9]
    assert tree.token[below[0]] == 9  # as often, but later


def test_longer_matches_weigh_more():
    short = offer(LookupDrafter(), [5, 1, 2, 3, 6, 1, 2], depth=1).tree
    long = offer(LookupDrafter(), [7, 8, 9, 1, 2, 3, 6, 7, 8, 9, 1, 2], depth=1).tree
    assert short.token.tolist() == long.token.tolist() == [3]
    assert long.survival[0] > short.survival[0]


def test_a_shorter_ending_adds_candidates():
    text = [9, 1, 2, 3, 0, 1, 2, 4, 0, 9, 1, 2]
    tree = offer(LookupDrafter(), text, depth=1).tree
    assert tree.token.tolist() == [3, 4]  # 9 1 2 was followed by 3 only, 1 2 by 4 also


def test_a_period_is_followed_beyond_the_end_of_the_text():
    tree = offer(LookupDrafter(), [1, 2, 3] * 4, depth=7).tree
    assert tree.path_tokens(int(tree.depth.argmax())) == [1, 2, 3, 1, 2, 3, 1]


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from(list(Rule)),
)
def test_proposals_are_valid_and_within_their_limits(tokens, budget, depth, width, rule):
    drafter = LookupDrafter(corpus=[[0, 1, 2, 0], [2, 2]])
    proposal = offer(drafter, tokens, budget=budget, depth=depth, width=width, rule=rule)
    proposal.validate()
    tree = proposal.tree
    assert tree.num_nodes <= budget
    assert tree.max_depth <= depth
    for node in range(-1, tree.num_nodes):
        children = tree.children_of(node)
        assert len(children) <= width
        assert len(set(tree.token[children].tolist())) == len(children)
        above = 1.0 if node < 0 else tree.survival[node]
        assert tree.survival[children].sum() <= above
    if rule.draws_from_laws:
        assert proposal.laws is None
        assert proposal.law_of.tolist() == [POINT_MASS] * tree.num_nodes
    if rule is Rule.BLOCK:
        assert tree.is_chain
    # every offered first token followed the longest match somewhere, or a shorter one
    for node in tree.children_of(-1).tolist():
        texts = (tokens, [0, 1, 2, 0], [2, 2])
        joined = [tokens[-1], int(tree.token[node])]
        assert any(occurrences(list(text), joined) for text in texts)


@given(st.lists(st.integers(0, 2), min_size=4, max_size=40), st.integers(1, 3))
def test_state_in_step_equals_state_from_scratch(tokens, stride):
    corpus = [[0, 0, 1, 2, 2, 1]]
    drafter = LookupDrafter(corpus=corpus)
    for stop in range(1, len(tokens) + 1, stride):
        online = offer(drafter, tokens[:stop])
        fresh = offer(LookupDrafter(corpus=corpus), tokens[:stop])
        assert online.tree.token.tolist() == fresh.tree.token.tolist()
        assert online.tree.survival.tolist() == fresh.tree.survival.tolist()


def test_a_context_that_was_rewritten_is_read_again():
    drafter = LookupDrafter()
    offer(drafter, [1, 2, 3, 4])
    assert offer(drafter, [5, 6, 7, 5, 6]).tree.token[0] == 7
    assert offer(drafter, [5, 6]).tree.num_nodes == 0


def test_requests_are_apart_and_release_forgets():
    drafter = LookupDrafter()
    a = context([1, 2, 3, 1, 2], request_id=1)
    b = context([1, 2, 9, 9, 1, 2], request_id=2)
    first, second = drafter.propose([a, b])
    assert (first.tree.token[0], second.tree.token[0]) == (3, 9)
    assert drafter.texts_kept == 2
    drafter.release(1)
    drafter.release(77)
    assert drafter.texts_kept == 1


def test_the_corpus_serves_every_request_but_never_across_its_texts():
    drafter = LookupDrafter(corpus=[[1, 2, 3, 4, 5], [6, 7, 8]])
    assert offer(drafter, [9, 2, 3], request_id=1).tree.token.tolist()[:2] == [4, 5]
    assert offer(drafter, [9, 6, 7], request_id=2).tree.token.tolist() == [8]
    assert offer(drafter, [4, 5], request_id=3).tree.num_nodes == 0
    own_first = offer(drafter, [2, 3, 1, 2, 3], request_id=4, depth=1)
    assert set(own_first.tree.token.tolist()) == {1, 4}


def test_blended_shares_never_exceed_one():
    matches = [Match(2, [(3, 1), (4, 1)], newest=4), Match(1, [(4, 9), (5, 1)])]
    shares = blend(matches, 5)
    assert next(token for token, _ in shares) == 4
    assert 0 < sum(share for _, share in shares) < 1
    assert blend([], 5) == blend([Match(3, [])], 5) == []


def test_a_corpus_is_believed_less_than_the_request_s_own_text():
    text = [1, 2, 3, 4, 1, 2]
    (own,) = offer(LookupDrafter(), text, depth=1, width=1).tree.survival
    shared_drafter = LookupDrafter(corpus=[[1, 2, 3, 4]])
    (shared,) = offer(shared_drafter, [9, 1, 2], depth=1, width=1).tree.survival
    assert 0 < shared < own


def test_one_token_is_enough_where_there_is_a_corpus():
    corpus = [[5, 6, 7], [5, 6, 8], [5, 9]]
    eager = LookupConfig(min_survival=0)
    tree = offer(LookupDrafter(eager, corpus=corpus), [1, 5], depth=2, width=2).tree
    first = tree.children_of(-1)
    assert tree.token[first].tolist() == [6, 9]
    assert tree.token[tree.children_of(int(first[0]))].tolist() == [7, 8]
    careful = LookupDrafter(LookupConfig(min_shared=2), corpus=corpus)
    assert offer(careful, [1, 5]).tree.num_nodes == 0


def test_a_negative_token_of_the_text_is_never_offered():
    tree = offer(LookupDrafter(), [1, 2, -1, 1, 2, -1, 1, 2]).tree
    assert tree.num_nodes == 0
    with_corpus = offer(LookupDrafter(corpus=[[4, 5]]), [4, -1, 4], depth=2).tree
    assert with_corpus.token.tolist() == [5]


def test_it_has_the_name_it_is_given():
    assert LookupDrafter().name == "lookup"
    assert LookupDrafter(name="lookup:mine").name == "lookup:mine"


@pytest.mark.parametrize(
    "options",
    [
        {"min_match": 0},
        {"min_shared": 0},
        {"width": 0},
        {"min_survival": 1.0},
        {"min_survival": -0.1},
    ],
)
def test_bad_settings_are_refused(options):
    with pytest.raises(ConfigError):
        LookupConfig(**options)


def test_a_negative_corpus_token_is_refused():
    with pytest.raises(ConfigError):
        LookupDrafter(corpus=[[1, -1]])
