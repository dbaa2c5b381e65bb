"""What `dspark report` compares, what it refuses to compare, and how sure changes are."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from dspark.errors import ConfigError
from dspark.eval.audit_report import Status
from dspark.eval.report import build_page, render_html, render_markdown
from dspark.eval.report.changes import Change, difference_of, ratio_of
from dspark.eval.report.compare import pair_up
from dspark.eval.report.page import Cell, Page, Table
from tests.eval.report_samples import (
    EXACT,
    audit_results,
    bench_results,
    eval_cell,
    eval_results,
    profile_results,
    write,
)

pytestmark = pytest.mark.slow  # draws many charts

CELL = eval_cell("lookup")


def page_of(folder: Path, *results: dict[str, Any], is_forced: bool = False) -> Page:
    paths = [write(folder, name, item) for name, item in zip("abcd", results, strict=False)]
    return build_page(paths, is_forced=is_forced)


def table(page: Page, title: str) -> Table:
    (found,) = (t for s in page.sections for t in s.tables if t.title == title)
    return found


def texts(table_: Table) -> list[list[str]]:
    return [[c.text if isinstance(c, Cell) else c for c in row] for row in table_.rows]


def evaluated(*, target: dict[str, Any] | None = None, **header: Any) -> dict[str, Any]:
    results = eval_results(copy.deepcopy(CELL), **header)
    results["header"]["target"].update(target or {})
    return results


def cell_with(*, sha256: str | None = None, **sampling: Any) -> dict[str, Any]:
    cell = copy.deepcopy(CELL)
    cell["sampling"].update(sampling)
    if sha256 is not None:
        cell["prompts"]["sha256"] = sha256
    return cell


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (evaluated(processor="Other CPU"), "processor (Example CPU @ 2.50GHz and Other CPU)"),
        (evaluated(device="cuda"), "device (cpu and cuda)"),
        (evaluated(threads=8), "threads (2 and 8)"),
        (evaluated(target={"dtype": "bfloat16"}), "dtype (float32 and bfloat16)"),
        (evaluated(target={"quant": "int8"}), "quant (none and int8)"),
        (evaluated(exact={**EXACT, "enabled": False}), "exact.enabled (yes and no)"),
        (evaluated(target={"fingerprint": "cd" * 32}), "target (5f5f5f5f5f5f and cdcdcdcdcdcd)"),
        (evaluated(template="raw"), "template (chat and raw)"),
        (evaluated(think=True), "think (not set and yes)"),
        (evaluated(seed=7), "seed (0 and 7)"),
        (evaluated(batch=4), "batch (1 and 4)"),
        (eval_results(cell_with(sha256="12" * 32)), "prompts.sha256 (abababababab and 121212121"),
        (eval_results(cell_with(max_tokens=64)), "sampling.max_tokens (48 and 64)"),
        (eval_results(cell_with(temperature=0.7)), "sampling.temperature (0 and 0.7)"),
        (eval_results(cell_with(rule="rejection")), "sampling.rule (greedy and rejection)"),
        (eval_results(cell_with(ignore_eos=True)), "sampling.ignore_eos (no and yes)"),
    ],
)
def test_evaluations_with_other_settings_do_not_compare(
    tmp_path: Path, other: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        page_of(tmp_path, evaluated(), other)
    assert caught.value.message.startswith("results that differ in machine or settings")
    assert named in caught.value.message
    assert "a.json and b.json in" in caught.value.message
    assert "\n" not in caught.value.message
    assert "--force" in (caught.value.hint or "")


def test_every_difference_is_named_at_once(tmp_path: Path) -> None:
    other = evaluated(threads=4, seed=1, target={"dtype": "bfloat16"})
    with pytest.raises(ConfigError, match=r"threads .*dtype .*seed "):
        page_of(tmp_path, evaluated(), other)


def test_a_page_that_was_forced_says_so_before_any_figure(tmp_path: Path) -> None:
    page = page_of(tmp_path, evaluated(), evaluated(threads=4), is_forced=True)
    (warning,) = page.warnings
    assert "differ in threads (2 and 4)" in warning
    html, text = render_html(page), render_markdown(page)
    assert html.index("differ in threads") < html.index('class="headlines"')
    assert text.index("differ in threads") < text.index("**lookup**")
    assert page_of(tmp_path, evaluated(), evaluated()).warnings == ()


def test_what_drafts_and_what_ran_it_may_differ(tmp_path: Path) -> None:
    """That is what comparisons are made for; the page names it."""
    cell = eval_cell("new-draft", luck=0.7)
    cell["sampling"].update(tree_budget=31, depth=12)
    other = eval_results(cell, code="f" * 16, libraries={"torch": "2.14.0"})
    page = page_of(tmp_path, evaluated(), other)
    assert page.warnings == ()
    noted = {row[0]: row[2:] for row in texts(table(page, "What differs between the files"))}
    assert noted["draft"] == ["lookup", "new-draft"]
    assert noted["code"] == ["0123456789abcdef", "f" * 16]
    assert noted["libraries.torch"] == ["2.13.0", "2.14.0"]
    assert noted["sampling.tree_budget"] == ["not set", "31"]
    assert len(texts(table(page, "What changed"))) == 4  # all, and three categories


@pytest.mark.parametrize(
    ("first", "other", "named"),
    [
        (bench_results(), bench_results(threads=1), "threads (2 and 1)"),
        (bench_results(), {**bench_results(), "baseline": "lookup"}, "baseline (plain and lookup)"),
        (bench_results(), bench_results(warm_ups=0), "warm_ups (1 and 0)"),
        (profile_results(), profile_results(threads=1), "threads (2 and 1)"),
        (audit_results(), audit_results(threads=1), "threads (2 and 1)"),
        (bench_results(), audit_results(threads=1), "threads (2 and 1)"),
        (eval_results(), profile_results(processor="Other"), "processor (Example CPU @ 2.50GHz"),
        (eval_results(), bench_results(exact={**EXACT, "enabled": False}), "exact.enabled"),
    ],
)
def test_other_machines_and_settings_are_refused_for_every_kind(
    tmp_path: Path, first: dict[str, Any], other: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        page_of(tmp_path, first, other)
    assert named in caught.value.message


def test_an_audit_of_another_target_is_refused(tmp_path: Path) -> None:
    audit = audit_results()
    audit["header"]["target"]["fingerprint"] = "other"
    with pytest.raises(ConfigError, match=r"target \(\w+ and other\)"):
        page_of(tmp_path, eval_results(), audit)
    audit["header"]["target"] = eval_results()["header"]["target"]
    assert page_of(tmp_path, eval_results(), audit).warnings == ()


def test_different_kinds_may_have_different_workloads(tmp_path: Path) -> None:
    other = bench_results(seed=3, batch=8)
    other["header"]["prompts"][0]["sha256"] = "34" * 32
    assert page_of(tmp_path, eval_results(), other).warnings == ()


def test_files_without_a_configuration_in_common_are_refused(tmp_path: Path) -> None:
    cells = [cell_with(temperature=t, rule="coupled") for t in (0.5, 0.9)]
    for at, cell in enumerate(cells):
        cell["name"] = f"other {at}"
    with pytest.raises(ConfigError, match=r"a\.json and b\.json have no configuration in common"):
        page_of(tmp_path, eval_results(), eval_results(*cells), is_forced=True)


# -- changes ---------------------------------------------------------------------------------------


def test_the_change_of_tau_is_shown_with_its_interval(tmp_path: Path) -> None:
    better = eval_cell("lookup", luck=0.9)
    page = page_of(tmp_path, evaluated(), eval_results(better))
    one, two = CELL["acceptance"], better["acceptance"]
    row = texts(table(page, "What changed"))[0]
    assert row[:2] == ["lookup", "all"]
    assert row[2].startswith(f"{one['tau']:.2f} (")
    assert row[3].startswith(f"{two['tau']:.2f} (")
    assert row[4].startswith(f"+{two['tau'] - one['tau']:.2f} (+")
    (headline,) = page.headlines
    assert (headline.figure, headline.tone) == (f"+{two['tau'] - one['tau']:.2f}", "good")
    assert page_of(tmp_path, eval_results(better), evaluated()).headlines[0].tone == "bad"


def test_no_change_is_called_so(tmp_path: Path) -> None:
    (headline,) = page_of(tmp_path, evaluated(), evaluated()).headlines
    assert "no change shown" in headline.text
    assert headline.figure == "0.00"
    assert headline.tone == ""


def test_a_change_of_speed_is_that_of_the_raw_runs(tmp_path: Path) -> None:
    """Every answer of the second file took half as long; the interval must not be wider."""
    first = bench_results()
    second = copy.deepcopy(first)
    for run in second["runs"]:
        run["seconds"] /= 2
        for request in run["requests"]:
            request["seconds"] /= 2
    for figures in second["figures"]:
        for key in ("median", "low", "high"):
            figures["tokens_per_second"][key] *= 2
    page = page_of(tmp_path, first, second)
    for row in texts(table(page, "What changed: speed")):
        assert row[4] == "+100.0 % (+100.0 % to +100.0 %)"
    headline = page.headlines[1]
    assert headline.figure == "+100.0 %"
    assert "from A to B at concurrency 1" in headline.text
    assert headline.text.endswith("speed-up 1.30× to 1.30×")


def test_a_change_of_speed_without_raw_runs_has_no_interval(tmp_path: Path) -> None:
    first, second = bench_results(), bench_results(speeds={"plain": 1.0, "lookup": 1.5})
    for broken in ([], [{"configuration": "lookup", "concurrency": 1}]):
        second["runs"] = broken
        page = page_of(tmp_path, first, second)
        rows = texts(table(page, "What changed: speed"))
        cell = next(row[4] for row in rows if row[:2] == ["lookup", "1"])
        assert cell.startswith("+1")
        assert "(" not in cell


def test_three_files_are_each_held_against_the_first(tmp_path: Path) -> None:
    results = [profile_results(speed=speed) for speed in (1.0, 1.25, 0.8)]
    page = page_of(tmp_path, *results)
    rows = texts(table(page, "What changed"))
    assert {row[0] for row in rows} == {"B", "C"}
    assert {row[-1] for row in rows if row[0] == "B"} == {"−20.0 %"}
    assert {row[-1] for row in rows if row[0] == "C"} == {"+25.0 %"}
    benches = [bench_results(seed=seed) for seed in range(3)]
    names = [row[0] for row in texts(table(page_of(tmp_path, *benches), "What changed: speed"))]
    assert names == ["plain, B", "plain, C", "lookup, B", "lookup, C"]


def test_audits_stand_side_by_side(tmp_path: Path) -> None:
    second = audit_results(status=Status.FOUND)
    second["checks"].pop(0)
    page = page_of(tmp_path, audit_results(), second)
    assert texts(table(page, "What changed")) == [
        ["trees and rollback", "passed", "not run"],
        ["tokens, greedy", "passed", "found"],
    ]


def test_configurations_that_compare_stand_together(tmp_path: Path) -> None:
    drafts = ("none", "lookup", "model")
    one = eval_results(*(eval_cell(name) for name in drafts))
    two = eval_results(*(eval_cell(name) for name in ("model", "lookup", "extra")))
    page = page_of(tmp_path, one, two)
    assert [row[0] for row in texts(table(page, "Accepted length"))] == [
        "A: none",
        "A: lookup",
        "B: lookup",
        "A: model",
        "B: model",
        "B: extra",
    ]


def test_pairs_are_found_by_the_strictest_key_that_tells_them_apart() -> None:
    first, other = ["a1", "b1", "c1"], ["b2", "a1", "d3"]
    pairs = pair_up(first, other, lambda x: x, lambda x: x[0])
    assert pairs == [("a1", "a1"), ("b1", "b2"), ("c1", None)]
    assert pair_up(["x"], ["y"], lambda x: x) == [("x", "y")]
    assert pair_up(["x", "x"], ["x"], lambda x: x) == [("x", None), ("x", None)]


def test_the_interval_of_a_difference_is_movers() -> None:
    found = difference_of((1.0, 0.9, 1.2), (2.0, 1.6, 2.3))
    assert found is not None
    low, high = 1 - math.hypot(0.4, 0.2), 1 + math.hypot(0.3, 0.1)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, low, high))
    assert found.is_beyond(0.0)
    assert not found.is_beyond(1.0)
    assert difference_of((1.0, None, None), (2.0, 1.0, 3.0)) == Change(value=1.0)
    assert difference_of((None, None, None), (2.0, 1.0, 3.0)) is None


def test_the_interval_of_a_ratio_is_movers_on_logarithms() -> None:
    found = ratio_of((1.0, 0.5, 2.0), (4.0, 4.0, 4.0))
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((4.0, 2.0, 8.0))
    assert ratio_of((0.0, 0.0, 1.0), (1.0, 1.0, 1.0)) is None
