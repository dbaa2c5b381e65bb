"""Hidden states of several forwards, gathered late."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark.captured import Captured, rows_of, side_by_side

LAYERS = (-1, 2, 7)
CPU = torch.device("cpu")


@st.composite
def forwards(draw):
    """Captured layers of some forwards, and rows of each in ascending order."""
    parts = []
    for seed in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 6))
        generator = torch.Generator().manual_seed(seed)
        hidden = {layer: torch.randn(count, 3, generator=generator) for layer in LAYERS}
        rows = draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True).map(sorted))
        parts.append((hidden, rows))
    return parts


@given(forwards())
def test_it_is_what_taking_the_rows_at_once_would_give(parts):
    own = Captured(parts)
    eager = {layer: torch.cat([hidden[layer][rows] for hidden, rows in parts]) for layer in LAYERS}
    assert sorted(own) == sorted(eager)
    assert len(own) == len(LAYERS)
    for layer in LAYERS:
        assert torch.equal(own[layer], eager[layer])
    assert own.num_rows == rows_of(own) == rows_of(eager) == sum(len(rows) for _, rows in parts)
    for layers in (LAYERS, (7, -1)):
        wanted = torch.cat([eager[layer] for layer in layers], dim=-1)
        assert torch.equal(side_by_side(own, layers, CPU), wanted)
        assert torch.equal(side_by_side(eager, layers, CPU), wanted)


def test_nothing_has_no_rows_and_no_layers():
    assert rows_of({}) == rows_of(Captured([])) == 0
    assert not Captured([])
    with pytest.raises(KeyError):
        Captured([({0: torch.ones(1, 2)}, [0])])[1]
