"""How many nodes are drafted for a request after what was taken of the last ones."""

from __future__ import annotations

from dspark.appetite import Appetite


def after(*rounds: tuple[int, int]) -> int:
    """Nodes to draft out of 30, after rounds of (kept, offered)."""
    appetite = Appetite()
    for kept, offered in rounds:
        appetite.took(kept, offered)
    return appetite.most(30)


def test_at_first_everything_is_drafted() -> None:
    assert after() == after(*[(1, 15)] * 3) == 30


def test_twice_what_was_taken_at_the_most_is_drafted() -> None:
    assert after(*[(1, 15)] * 4) == 4
    assert after((6, 15), *[(1, 12)] * 7) == 12
    assert after((6, 15), *[(1, 12)] * 8) == 4  # and older rounds do not count
    assert after(*[(20, 30)] * 4) == 30


def test_nothing_is_held_back_where_all_was_taken() -> None:
    assert after(*[(1, 15)] * 8, (4, 4)) == 30
    assert after(*[(0, 4)] * 8) == 4
