"""Measuring a curve: what is timed, in which order, what is kept and found again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dspark.base_model.checkpoint import Layout
from dspark.base_model.checkpoint_write import random_checkpoint
from dspark.errors import ConfigError
from dspark.eval.profile import Profile, read_profile
from dspark.eval.profile_measure import CONTEXTS, ProfileConfig, measure_profile, quick_profile
from dspark.eval.profile_steps import profile_tree, split_rows
from dspark.eval.profile_store import keep_profile, key_of, load_profile
from dspark.expert_reuse import TellsExperts
from dspark.registry import LoadOptions, load_target
from dspark.target import TargetOutput, TokenBatch
from tests.base_model.conftest import SMALL
from tests.conftest import random_target
from tests.eval.toys import ToyCache, ToyTarget, toy_pair


class Clocked(ToyTarget):
    """A toy whose steps take a known time by a clock of its own."""

    def __init__(self, seconds: Callable[[int, int], float]) -> None:
        super().__init__(toy_pair()[0].table)
        self.seconds = seconds
        self.now = 0.0
        self.steps: list[tuple[int, ...]] = []  # rows of each request, of every timed forward

    def clock(self) -> float:
        return self.now

    def forward(
        self, batch: TokenBatch, cache: ToyCache, *, capture: tuple[int, ...] = ()
    ) -> TargetOutput:
        context = len(cache.committed[batch.spans[0].slot])
        self.now += self.seconds(batch.num_rows, context)
        if len(batch.output_rows):
            self.steps.append(tuple(span.stop - span.start for span in batch.spans))
        return super().forward(batch, cache, capture=capture)


def jagged(rows: int, context: int) -> float:
    return 0.001 * (10 + rows + (5 if rows == 4 else 0)) + 1e-5 * context


CONFIG = ProfileConfig(contexts=(8, 32), rows=(1, 2, 4, 8), rows_per_request=3, repeats=3)


def measured(target: Clocked, config: ProfileConfig = CONFIG) -> Profile:
    return measure_profile(target, config, clock=target.clock)


def test_every_point_is_the_time_of_its_step() -> None:
    """The four rows that take longer than eight are kept."""
    found = measured(Clocked(jagged))
    assert found.contexts == (8, 32)
    for point in found.points:
        assert point.median == pytest.approx(jagged(point.rows, point.context))
        assert point.low == pytest.approx(point.high)
        assert point.repeats == 3


def test_the_median_is_kept_with_the_quartiles_and_a_slow_step_does_not_show() -> None:
    count = itertools.count()

    def sometimes_slow(rows: int, context: int) -> float:
        return 0.010 + (5.0 if next(count) % 6 == 5 else 0.0)

    config = ProfileConfig(contexts=(8,), rows=(1, 2), repeats=11)
    for point in measured(Clocked(sometimes_slow), config).points:
        assert point.median == pytest.approx(0.010)


def test_rows_are_shared_among_few_requests_each_with_its_own_context() -> None:
    target = Clocked(jagged)
    found = measured(target)
    assert {point.rows: point.requests for point in found.points} == {1: 1, 2: 1, 4: 2, 8: 3}
    assert set(target.steps) == {(1,), (2,), (2, 2), (3, 3, 2)}
    assert split_rows(64, 16) == [16] * 4


def test_row_counts_take_turns_in_changing_order() -> None:
    target = Clocked(jagged)
    measured(target)
    passes = [tuple(map(sum, target.steps[i : i + 4])) for i in range(0, len(target.steps), 4)]
    assert len(passes) == 2 * (1 + 3)  # contexts, each with a warm-up and three repeats
    assert all(sorted(own) == [1, 2, 4, 8] for own in passes)
    assert len(set(passes)) > 1


def test_a_request_is_a_tree_of_its_own() -> None:
    parents, depths = profile_tree(16)
    assert (parents[0], depths[0]) == (-1, 0)
    assert all(depths[row] == depths[parents[row]] + 1 for row in range(1, 16))
    assert max(parents.count(node) for node in range(16)) > 1  # it branches
    assert 2 < max(depths) <= 8


def test_progress_ends_when_the_work_does() -> None:
    told: list[tuple[float, float]] = []
    target = Clocked(jagged)
    measure_profile(
        target,
        CONFIG,
        clock=target.clock,
        on_progress=lambda done, whole: told.append((done, whole)),
    )
    assert told == sorted(told)
    assert told[-1][0] == pytest.approx(told[-1][1])


def test_ctrl_c_keeps_what_was_measured() -> None:
    def interrupted(rows: int, context: int) -> float:
        if context == 32 and rows == 8:
            raise KeyboardInterrupt
        return jagged(rows, context)

    target = Clocked(interrupted)
    found = measured(target)
    assert found.is_interrupted
    assert len(found.curve(8)) == 4
    assert found.to_json()["interrupted"] is True


def test_ctrl_c_before_anything_was_measured_is_passed_on() -> None:
    def interrupted(rows: int, context: int) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(Clocked(interrupted))


def test_contexts_must_fit_the_target() -> None:
    assert ProfileConfig().fitting(100_000) == CONTEXTS
    assert ProfileConfig().fitting(600) == (128, 512)
    assert ProfileConfig().fitting(40) == (24,)
    with pytest.raises(ConfigError, match="context 4096 with 16 rows behind it does not fit"):
        ProfileConfig(contexts=(64, 4096)).fitting(4096)


@pytest.mark.parametrize(
    "options",
    [
        {"rows": (4, 2)},
        {"rows": ()},
        {"rows": (0, 1)},
        {"contexts": (64, 64)},
        {"rows_per_request": 33},
        {"repeats": 0},
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        ProfileConfig(**options)


# -- quick ------------------------------------------------------------------------------------


def test_a_quick_profile_ends_in_time() -> None:
    target = Clocked(lambda rows, context: 0.02 + 0.001 * rows)
    found = quick_profile(target, seconds=2.0, clock=target.clock)
    assert target.now < 2.0
    assert found.rows == (1, 2, 4, 8, 12, 16, 24, 32)
    assert min(point.repeats for point in found.points) >= 3


def test_a_quick_profile_of_a_slow_target_has_the_points_that_matter_most() -> None:
    target = Clocked(lambda rows, context: 1.0)
    found = quick_profile(target, seconds=2.0, clock=target.clock)
    assert found.rows == (1, 16)
    assert len(target.steps) == 5  # two warm-ups, two timed, one that showed that time is up


def test_a_clock_that_stands_still_ends_a_quick_profile() -> None:
    target = Clocked(lambda rows, context: 1e-9)
    assert quick_profile(target, seconds=1e-7, clock=target.clock).rows


# -- keeping ----------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dspark" / "profiles"


def test_a_kept_profile_is_found_again_for_the_same_settings_only(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Clocked(jagged)
    assert load_profile(target) is None
    found = measured(target)
    path = keep_profile(found)
    assert path is not None
    assert path.parent == cache
    assert read_profile(path) == found
    assert load_profile(target) == found
    assert load_profile(target, expert_memory=1 << 30) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert load_profile(target) is None
    assert key_of(target).threads == 77


def test_a_damaged_profile_is_measured_anew(cache: Path) -> None:
    target = Clocked(jagged)
    path = keep_profile(measured(target))
    assert path is not None
    path.write_text("{")
    assert load_profile(target) is None


def test_a_folder_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.parent.write_text("in the way")
    assert keep_profile(measured(Clocked(jagged))) is None


# -- experts ----------------------------------------------------------------------------------


def test_experts_are_counted_where_the_target_tells() -> None:
    """Eight experts, two a token: one row wakes two, many wake nearly all."""
    target = random_target("qwen3_moe", exact=False)
    assert isinstance(target, TellsExperts)
    config = ProfileConfig(contexts=(16,), rows=(1, 32), rows_per_request=32, repeats=1)
    found = measure_profile(target, config)
    assert found.experts is not None
    one, many = found.experts
    assert (one.rows, one.distinct_experts) == (1, 2.0)
    assert 5 < many.distinct_experts <= 8
    again = measure_profile(random_target("llama", exact=False), config)
    assert again.experts is None
    quick = quick_profile(target, context=16, seconds=0.2).experts
    assert quick is not None
    assert (quick[0].rows, quick[0].distinct_experts) == (1, 2.0)
    assert 2 < quick[-1].distinct_experts <= 8
    assert measured(Clocked(jagged)).to_json()["experts"] is None


def test_deepseek_v4_tells_its_experts(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, SMALL, seed=1, quantised=False, layout=Layout.OFFICIAL)
    options = LoadOptions(name="v4", dtype="float32", exact=False)
    target = load_target(tmp_path, options).target
    config = ProfileConfig(contexts=(8,), rows=(1, 8), repeats=1)
    found = measure_profile(target, config)
    assert found.experts is not None
    one, eight = (count.distinct_experts for count in found.experts)
    assert one == SMALL.num_experts_per_tok
    assert one < eight <= SMALL.n_routed_experts
    assert target.model.blocks[0].experts.on_route is None
