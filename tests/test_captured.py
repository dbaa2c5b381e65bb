"""Hidden states of several forwards, gathered late."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark import captured
from dspark.captured import Captured, parts_of, rows_of, side_by_side

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


def test_asking_for_a_layer_gathers_nothing(monkeypatch):
    own = Captured([({0: torch.randn(5, 8)}, [0, 2])] * 3)
    monkeypatch.setattr(captured, "_picked", None)
    assert 0 in own
    assert 1 not in own
    assert 0 not in Captured([])


def kept_bytes(parts):
    storages = {rows.untyped_storage() for hidden, _ in parts for rows in hidden.values()}
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("size", [5, 32, 33, 500])
def test_parts_of_a_forward(size):
    hidden = {layer: torch.randn(size, 3) for layer in LAYERS}
    wanted = [[0], range(1, size - 3), [size - 3, size - 1]]
    parts = parts_of(hidden, wanted)
    for rows, part in zip(wanted, parts, strict=True):
        for layer in LAYERS:
            assert torch.equal(Captured([part])[layer], hidden[layer][list(rows)])
    whole, few = size * 3 * 4 * len(LAYERS), 3 * 3 * 4 * len(LAYERS)
    assert kept_bytes(parts[1:2]) == whole
    assert kept_bytes(parts[::2]) == (few if size > 32 else whole)
    assert parts_of({}, wanted[:1]) == [({}, wanted[0])]
    assert parts_of(hidden, []) == []
