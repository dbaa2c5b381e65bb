"""Sampling parameters act as documented, and on each row alone, to the bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dspark.errors import CapabilityError, ConfigError, ShapeError
from dspark.request import SamplingParams
from dspark.verify.likeliest import likeliest
from dspark.verify.sampling import History, has_history, laws, shape_logits

INF = math.inf


def kept(shaped: torch.Tensor) -> list[int]:
    return torch.nonzero(shaped > -INF).flatten().tolist()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def test_trivial_parameters_leave_logits_as_they_are() -> None:
    x = randn(2, 10)
    for temperature in (0.0, 1.0):
        assert torch.equal(shape_logits(x, [SamplingParams(temperature=temperature)] * 2), x)
    greedy = SamplingParams(top_k=1, top_p=0.1, min_p=0.5)  # greedy does not truncate
    assert torch.equal(shape_logits(x, [greedy] * 2), x)
    assert shape_logits(x.bfloat16(), [greedy] * 2).dtype == torch.float32


def test_the_input_is_not_modified() -> None:
    x = randn(1, 50)
    before = x.clone()
    p = SamplingParams(temperature=0.5, top_k=3, logit_bias={1: 5.0}, repetition_penalty=2.0)
    shape_logits(x, [p], [History([1, 2], [3])], [[4]])
    assert torch.equal(x, before)


@pytest.mark.parametrize("size", [6, 300, 20_000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("k", "min_p", "p"), [(5, 0, 1), (0, 0.1, 1), (0, 0, 0.9), (4, 0, 0.7)])
def test_truncation_agrees_with_transformers(
    size: int, temperature: float, k: int, min_p: float, p: float
) -> None:
    x = randn(3, size)
    params = SamplingParams(temperature=temperature, top_k=k, min_p=min_p, top_p=float(p))
    got = shape_logits(x, [params] * 3)
    want = TemperatureLogitsWarper(temperature)(None, x)
    if k:
        want = TopKLogitsWarper(k)(None, want)
    if min_p:
        want = MinPLogitsWarper(min_p)(None, want)
    if p < 1:
        want = TopPLogitsWarper(p)(None, want)
    assert torch.equal(got > -INF, want > -INF)
    torch.testing.assert_close(laws(got).float(), want.softmax(-1))


def test_ties_go_to_the_lowest_ids() -> None:
    x = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 1.0]])
    assert kept(shape_logits(x, [SamplingParams(temperature=1.0, top_k=1)])[0]) == [1]
    assert kept(shape_logits(x, [SamplingParams(temperature=1.0, top_k=4)])[0]) == [0, 1, 2, 3]
    flat = torch.zeros(1, 5000)
    half = shape_logits(flat, [SamplingParams(temperature=1.0, top_p=0.5)])[0]
    assert kept(half) == list(range(2500))


def test_top_p_is_the_smallest_set_that_reaches_it() -> None:
    law = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    for top_p, count in ((0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.99, 4)):
        got = shape_logits(law.log(), [SamplingParams(temperature=1.0, top_p=top_p)])
        assert kept(got[0]) == list(range(count))


def test_each_truncation_acts_on_the_law_the_last_one_left() -> None:
    law = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    p = SamplingParams(temperature=1.0, top_k=2, top_p=0.55)
    assert kept(shape_logits(law.log(), [p])[0]) == [0]  # .4 of .7 is .571
    p = SamplingParams(temperature=1.0, min_p=0.6, top_p=0.55)
    assert kept(shape_logits(law.log(), [p])[0]) == [0]


def test_penalties_see_prompt_output_and_path_as_documented() -> None:
    x = torch.tensor([[1.0, -1.0, 2.0, 4.0, -3.0]])
    history = History(prompt=[0, 0], output=[1, 3, 3])
    p = SamplingParams(repetition_penalty=2.0)
    assert shape_logits(x, [p], [history], [[4]])[0].tolist() == [0.5, -2.0, 2.0, 2.0, -6.0]
    ids = torch.tensor([[0, 0, 1, 3, 3, 4]])
    want = RepetitionPenaltyLogitsProcessor(2.0)(ids, x.clone())
    assert torch.equal(shape_logits(x, [p], [history], [[4]]), want)
    p = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    got = shape_logits(x, [p], [history], [[4, 3]])[0].tolist()
    assert got == [1.0, -1.75, 2.0, 4 - 0.5 - 0.75, -3.75]


def test_a_path_counts_as_the_same_tokens_committed() -> None:
    x = randn(1, 30)
    p = SamplingParams(
        temperature=0.7, repetition_penalty=1.3, presence_penalty=0.3, frequency_penalty=0.1
    )
    as_path = shape_logits(x, [p], [History([1, 2], [3, 4, 4])], [[4, 9, 9]])
    as_output = shape_logits(x, [p], [History([1, 2], [3, 4, 4, 4, 9, 9])], [[]])
    assert torch.equal(as_path, as_output)


def test_bias_and_bad_words() -> None:
    x = torch.zeros(3, 6)
    p = SamplingParams(temperature=1.0, logit_bias={2: -4.0, 5: 1.5})
    assert shape_logits(x, [p] * 3)[0].tolist() == [0, 0, -4, 0, 0, 1.5]
    words = [[1], [2, 3], [4, 2, 0]]
    histories = [History([4], [2]), History([4], []), History([9], [4])]
    paths: list[list[int]] = [[], [2], [5]]
    got = shape_logits(x, [SamplingParams()] * 3, histories, paths, [words] * 3)
    assert [kept(row) for row in got] == [[2, 4, 5], [2, 4, 5], [0, 2, 3, 4, 5]]


def test_what_leaves_no_token_is_an_error() -> None:
    x = torch.zeros(1, 3)
    with pytest.raises(CapabilityError, match="no token"):
        shape_logits(x, [SamplingParams()], bad_words=[[[0], [1], [2]]])
    for value in (math.nan, INF):
        bad = torch.zeros(2, 3)
        bad[1, 2] = value
        with pytest.raises(CapabilityError, match="row 1"):
            shape_logits(bad, [SamplingParams()] * 2)
    with pytest.raises(CapabilityError, match="row 0"):
        shape_logits(torch.full((1, 3), -INF), [SamplingParams()])


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigError, match="logit_bias names token 3"):
        shape_logits(torch.zeros(1, 3), [SamplingParams(logit_bias={3: 1.0})])
    with pytest.raises(ConfigError, match="bad_words names token -1"):
        shape_logits(torch.zeros(1, 3), [SamplingParams()], bad_words=[[[-1]]])
    with pytest.raises(ShapeError, match="every row needs one"):
        shape_logits(torch.zeros(2, 3), [SamplingParams()])
    with pytest.raises(ShapeError, match="floating"):
        shape_logits(torch.zeros(2, 3, dtype=torch.int64), [SamplingParams()] * 2)
    assert shape_logits(torch.zeros(0, 3), []).shape == (0, 3)


def test_removed_tokens_stay_removed_and_extremes_stay_finite() -> None:
    x = torch.tensor([[5.0, -INF, 4.0, -3e38, 3e38]])
    for p in (
        SamplingParams(temperature=1e-40),
        SamplingParams(temperature=0.5, top_k=4, top_p=0.9, min_p=0.1),
        SamplingParams(temperature=1e30),
    ):
        got = shape_logits(x, [p])
        law = laws(got)
        assert not got.isnan().any()
        assert law[0, 1] == 0
        assert law.sum() == pytest.approx(1.0)
    many = SamplingParams(temperature=1.0, top_k=3, top_p=0.999999)
    assert kept(shape_logits(torch.tensor([[0.0, -INF, -INF, -INF]]), [many])[0]) == [0]


PARAMS = [
    SamplingParams(temperature=0.0, repetition_penalty=1.2),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3, top_p=0.95),
    SamplingParams(temperature=0.9, top_k=20, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.02, presence_penalty=0.4),
    SamplingParams(temperature=1.1, top_p=0.9999, logit_bias={3: 2.0}),
]


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, len(PARAMS) - 1), min_size=1, max_size=7),
    st.sampled_from([5, 257, 4001]),
    st.integers(0, 99),
)
def test_a_row_does_not_depend_on_its_batch(which: list[int], size: int, seed: int) -> None:
    """Bitwise: otherwise a neighbour could change a text."""
    x = randn(len(which), size, seed=seed)
    params = [PARAMS[i] for i in which]
    histories = [History([1, 2], [3, r % 5]) for r in range(len(which))]
    paths = [[r % 3] for r in range(len(which))]
    together = shape_logits(x, params, histories, paths)
    law = laws(together, params)
    for r in range(len(which)):
        part = slice(r, r + 1)
        alone = shape_logits(x[part].clone(), params[part], histories[part], paths[part])
        assert torch.equal(together[part], alone)
        assert torch.equal(law[part], laws(alone, params[part]))


def test_laws_are_float64_and_one_hot_for_greedy() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0], [0.0, -INF, 0.0]])
    law = laws(x, [SamplingParams(), SamplingParams(temperature=1.0)])
    assert law.dtype == torch.float64
    assert law.tolist() == [[0, 1, 0], [0.5, 0, 0.5]]
    wide = laws(randn(1, 129_280))
    assert abs(float(wide.sum()) - 1) < 1e-12
    np.testing.assert_allclose(wide, randn(1, 129_280).double().softmax(-1), rtol=1e-12)


def test_has_history_tells_which_parameters_look_back() -> None:
    assert not has_history(SamplingParams(temperature=0.5, top_k=3, logit_bias={1: 1.0}))
    for p in (
        SamplingParams(repetition_penalty=1.1),
        SamplingParams(presence_penalty=0.1),
        SamplingParams(frequency_penalty=-0.1),
        SamplingParams(bad_words=("x",)),
    ):
        assert has_history(p)
    assert has_history(SamplingParams(), [[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_likeliest_token_is_the_lowest_of_those_that_tie(dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 50, dtype=dtype)
    logits[0, [7, 20, 41]] = 2.0
    logits[1] = -torch.inf
    logits[1, [33, 48]] = -5.0
    assert likeliest(logits) == [7, 33, 0]
