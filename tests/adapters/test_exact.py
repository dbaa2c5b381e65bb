"""The probe behind exact mode: it finds what it must, and planted faults do not get past it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dspark import exactness
from dspark.adapters.hf import attention, exact, linear
from dspark.adapters.hf.load import adapter_for, wrap_model
from dspark.adapters.hf.target import HFTarget
from dspark.errors import CapabilityError
from dspark.registry import LoadOptions
from tests.conftest import random_model, random_target


def fresh_target(family: str = "llama") -> HFTarget:
    model = random_model(family, layers=1)
    options = LoadOptions(name="fresh", exact=True)
    return wrap_model(model, adapter_for(model.config.model_type), options)


# -- linear layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(64, 96), (33, 64), (256, 320)])
def test_kernels_that_are_offered_are_right(shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs, outputs = shape
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs).to(dtype).requires_grad_(False)
    rows = torch.randn(3, 21, inputs).to(dtype)
    expected = layer(rows)
    for name in linear.available_kernels(dtype, torch.device("cpu")):
        stable = linear.RowStableLinear(layer, name, linear.RowWindow(4, 16))
        torch.testing.assert_close(stable(rows), expected)
        torch.testing.assert_close(stable(rows[0, :1]), expected[0, :1])


def test_a_kernel_gives_a_row_the_same_bits_in_any_company() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        kernel = linear.available_kernels(dtype, torch.device("cpu"))[0]
        windows = linear.find_windows([(96, 160)], kernel, dtype, torch.device("cpu"))
        assert windows is not None
        torch.manual_seed(1)
        layer = nn.Linear(96, 160).to(dtype).requires_grad_(False)
        stable = linear.RowStableLinear(layer, kernel, windows[(96, 160)])
        rows = torch.randn(300, 96).to(dtype)
        whole = stable(rows)
        for start, count in ((0, 1), (7, 1), (3, 2), (10, 17), (1, 299)):
            part = stable(rows[start : start + count])
            assert torch.equal(part, whole[start : start + count])


class _OtherOrder:
    """A product that sums in another order for few rows, as fast kernels do."""

    def __init__(self, weight: torch.Tensor, limit: int) -> None:
        self.weight, self.limit = weight, limit

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        terms = rows[:, None, :].float() * self.weight[None].float()
        half = terms.shape[2] // 2
        if rows.shape[0] < self.limit:
            total = self.one_after_another(terms)
        else:
            total = self.one_after_another(terms[..., :half])
            total = total + self.one_after_another(terms[..., half:])
        return total.to(rows.dtype)

    @staticmethod
    def one_after_another(terms: torch.Tensor) -> torch.Tensor:
        total = terms[..., 0]
        for i in range(1, terms.shape[2]):
            total = total + terms[..., i]
        return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("limit", "least"), [(1, 1), (5, 5), (16, 16), (1000, 1)])
def test_another_order_of_the_sum_is_seen(limit: int, least: int, dtype: torch.dtype) -> None:
    """In bfloat16 too, where rounding hides all but one in 50 000 such differences."""
    weight, rows = linear.cancelling_layer(32, 8, dtype, torch.device("cpu"))
    window = linear.find_row_window(_OtherOrder(weight, limit), rows)
    assert window == linear.RowWindow(least, 256)


def test_a_product_that_agrees_with_itself_nowhere_is_refused() -> None:
    weight, rows = linear.cancelling_layer(32, 8, torch.float32, torch.device("cpu"))
    calls = iter(range(10**6))

    def drifting(part: torch.Tensor) -> torch.Tensor:
        return part @ weight.t() + next(calls)

    assert linear.find_row_window(drifting, rows) is None


def test_rows_outside_the_window_are_padded_or_parted() -> None:
    seen = []

    def product(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows.shape[0])
        return rows * 2

    window = linear.RowWindow(4, 10)
    for count in (1, 3, 4, 10, 11, 23, 95):
        rows = torch.arange(count * 2.0).view(count, 2)
        assert torch.equal(linear.run_windowed(product, rows, window), rows * 2)
    assert min(seen) >= 4
    assert max(seen) <= 10


# -- the end-to-end check --------------------------------------------------------------------------


def test_the_check_passes_on_the_real_code() -> None:
    target = random_target("gemma3", exact=True, layers=2)  # of every family: test_parity.py
    assert exact.find_query_rows(target) is not None
    assert exactness.check_trees(target)


def test_a_tree_summed_in_one_go_across_a_page_boundary_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The planted fault: sums grouped by where rows lie and not by their positions."""
    target = fresh_target()
    monkeypatch.setattr(attention.Step, "tail_masks", lambda self, index: [None])
    assert exact.find_query_rows(target) is None


def test_a_tree_that_sees_a_sibling_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    target = fresh_target()
    plan = attention._plan_span

    def careless(*args: object) -> attention.Span:
        span = plan(*args)
        if span.visible is not None and span.rows > 2:
            span.visible[2, 1] = True
        return span

    monkeypatch.setattr(attention, "_plan_span", careless)
    assert not exactness.check_trees(target)


def test_fast_attention_is_not_exact() -> None:
    """If it were, the exact form would be needless."""
    target = fresh_target()
    target.switch_exact(False)
    assert not exactness.check_trees(target)


# -- decisions -------------------------------------------------------------------------------------


def report(**changes: object) -> object:
    facts = {"wanted": None, "holds": True, "min_rows": 1, "backend": "mkl", "cost": 0.02}
    return exactness.report(**{**facts, **changes})


def test_exact_mode_is_the_default_where_it_is_cheap() -> None:
    assert report().enabled
    assert not report(cost=0.11).enabled
    assert "--exact" in report(cost=0.11).reason
    assert report(cost=0.5, wanted=True).enabled
    assert not report(wanted=False).enabled
    assert not report(holds=False).enabled


def test_asking_for_exact_mode_where_it_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "check_trees", lambda target: False)
    with pytest.raises(CapabilityError, match="exact mode does not hold"):
        fresh_target()


def test_a_finding_is_kept_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    check = exactness.check_trees
    monkeypatch.setattr(exactness, "check_trees", lambda target: calls.append(1) or check(target))
    adapter = adapter_for("llama")
    options = LoadOptions(name="kept", probe_folder=tmp_path)
    first = wrap_model(random_model("llama", layers=1), adapter, options, fingerprint="a").exactness
    again = wrap_model(random_model("llama", layers=1), adapter, options, fingerprint="a").exactness
    assert (len(calls), again) == (1, first)
    (record,) = tmp_path.glob("*.json")
    assert json.loads(record.read_text())["holds"] is True
    wrap_model(random_model("llama", layers=1), adapter, options, fingerprint="other weights")
    assert len(calls) == 2
    record.write_text("{ damaged")
    wrap_model(random_model("llama", layers=1), adapter, options, fingerprint="a")
    assert len(calls) == 3


def test_a_tree_larger_than_what_was_checked_is_refused() -> None:
    import dspark

    engine = dspark.Engine(random_target(exact=True))
    params = dspark.SamplingParams(tree_budget=attention.MAX_EXACT_NODES + 1, max_tokens=2)
    (result,) = engine.generate([[5]], params)
    assert "at most 64 nodes" in result.error
    loose = dspark.Engine(random_target(exact=False))
    assert loose.generate([[5]], params)[0].error is None
