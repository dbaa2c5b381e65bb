"""The filters of `dspark data`, one by one."""

from __future__ import annotations

import itertools
import random

import pytest

from dspark.errors import ConfigError
from dspark.training.data_filters import (
    Drop,
    DuplicateIndex,
    ExclusionIndex,
    FilterLimits,
    repetition,
    shingles,
    words,
)

QUESTION = (
    "Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes "
    "muffins for her friends every day with four."
)


def test_words_know_neither_case_nor_punctuation_nor_whitespace() -> None:
    assert words("  The CAT\n\tsat, on: the (mat)!") == ["the", "cat", "sat", "on", "the", "mat"]
    assert words("ﬁne ２０") == ["fine", "20"]
    assert words("天気は good") == ["天", "気", "は", "good"]
    assert words("3 + 4 - x_1") == ["3", "4", "x", "1"]
    assert words("3 + 4", with_signs=True) == ["3", "+", "4"]
    assert words("") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b c d e", 0.0),
        ("a b", 0.0),
        ("", 0.0),
        ("a a a a a a a a", 5 / 6),
        ("a b c a b c", 1 / 4),
    ],
)
def test_repetition_is_the_share_of_repeated_ngrams(text: str, expected: float) -> None:
    assert repetition(text.split(), 3) == pytest.approx(expected)


def test_equal_texts_are_duplicates_and_small_changes_near_duplicates() -> None:
    index = DuplicateIndex(0.7)
    assert index.check("Can you write a short poem about the autumn leaves in my garden?") is None
    same = "can you write a short  poem about the autumn leaves in my garden"
    assert index.check(same) is Drop.DUPLICATE
    near = "Can you write a short poem about the autumn leaves in our garden?"
    assert index.check(near) is Drop.NEAR_DUPLICATE
    assert index.check("Can you write a short story about a dog and his master?") is None
    assert DuplicateIndex(1.0).check(near) is None


def test_at_similarity_one_only_exact_duplicates_go() -> None:
    index = DuplicateIndex(1.0)
    assert index.check("one two three four five six seven") is None
    assert index.check("one two three four five six seven one two three") is None
    assert index.check("One two three four five six seven!") is Drop.DUPLICATE


def test_arithmetic_with_another_sign_is_another_question() -> None:
    index = DuplicateIndex(0.7)
    assert [index.check(t) for t in ("What is 3 + 4?", "What is 3 - 4?")] == [None, None]
    assert index.check("what is 3+4") is Drop.DUPLICATE


def test_texts_without_words_are_told_apart() -> None:
    index = DuplicateIndex(0.7)
    assert [index.check(t) for t in ("?!", "...", "?!")] == [None, None, Drop.DUPLICATE]


def test_near_duplicates_are_those_of_a_search_by_brute_force() -> None:
    rng = random.Random(3)
    names = [f"w{i}" for i in range(40)]
    texts: list[str] = []
    for _ in range(300):
        if texts and rng.random() < 0.5:
            own = rng.choice(texts).split()
            own[rng.randrange(len(own))] = rng.choice(names)
        else:
            own = [rng.choice(names) for _ in range(rng.randint(1, 14))]
        texts.append(" ".join(own))
    index, found = DuplicateIndex(0.6), list[Drop | None]()
    kept: dict[str, set[str]] = {}
    for text in texts:
        own_shingles = shingles(text)
        alike = max(
            (len(own_shingles & other) / len(own_shingles | other) for other in kept.values()),
            default=0.0,
        )
        if text in kept:
            found.append(Drop.DUPLICATE)
        else:
            found.append(Drop.NEAR_DUPLICATE if alike > 0.6 else None)
            if found[-1] is None:
                kept[text] = own_shingles
        assert index.check(text) is found[-1]
    assert {Drop.DUPLICATE, Drop.NEAR_DUPLICATE, None} == set(found)


@pytest.mark.parametrize(
    "prompt",
    [
        QUESTION,
        QUESTION.upper(),
        QUESTION.replace(" ", " \n ").replace(".", " ...").replace("’", "'"),
        "Solve this for me, please: " + QUESTION + " Think step by step.",
        "I know that she eats three for breakfast every morning and bakes muffins for her friends.",
    ],
)
def test_an_excluded_question_is_found_in_any_dress(prompt: str) -> None:
    assert ExclusionIndex([QUESTION, "Who wrote Hamlet?"]).overlaps(prompt)


def test_other_questions_do_not_overlap() -> None:
    index = ExclusionIndex([QUESTION, "Who wrote Hamlet?", ""])
    twelve = "She eats three for breakfast every morning and bakes muffins for nobody at all."
    for prompt in (twelve, "Who wrote Hamlet, and who wrote Faust?", "", "Tom's ducks lay eggs."):
        assert not index.overlaps(prompt)
    assert index.overlaps("who wrote HAMLET")


def test_a_short_question_overlaps_if_it_stands_whole_in_the_other() -> None:
    index = ExclusionIndex(["How far away is the moon?", QUESTION])
    assert index.overlaps("Tell me: how far away is the moon? I would like to go there by bike.")
    assert index.overlaps("She eats three for breakfast")
    assert not index.overlaps("How far away is the sun?")


def test_an_instruction_that_a_whole_set_shares_does_not_count() -> None:
    instruction = "Please reason step by step, and put your final answer within the boxes below."
    topics = ("pears", "plums", "apples", "kiwis", "limes", "figs", "dates")
    asked = [
        f"Tom buys {i + 2} {topic} and gives {i} away, how many remain? {instruction}"
        for i, topic in enumerate(topics)
    ]
    index = ExclusionIndex(asked)
    assert not index.overlaps(f"Where does the river Danube begin? {instruction}")
    assert all(index.overlaps(question) for question in asked)
    assert index.overlaps("Tom buys 5 kiwis and gives 3 away, how many remain?")
    few = ExclusionIndex(asked[:3])
    assert few.overlaps(f"Where does the river Danube begin? {instruction}")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_tokens": 0}, "min_tokens is 0"),
        ({"max_repetition": 1.5}, "max_repetition is 1.5"),
        ({"max_similarity": 0}, "max_similarity is 0"),
        ({"min_prompt_tokens": 9, "max_prompt_tokens": 8}, "min_prompt_tokens is 9"),
    ],
)
def test_limits_out_of_range_are_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FilterLimits(**limits)


def test_every_reason_has_a_name_of_its_own() -> None:
    assert all(a.value != b.value for a, b in itertools.combinations(Drop, 2))
