"""What an engine that is being loaded learns of its costs beforehand."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

import dspark
from dspark import loading
from dspark.eval import profile_auto
from dspark.eval.profile import ProfileKey
from dspark.eval.profile_auto import kept_or_quick
from dspark.eval.profile_measure import quick_profile
from dspark.eval.profile_store import key_of, load_profile
from dspark.registry import LoadedTarget
from tests.eval.toys import ToyTarget, toy_pair


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of targets that were measured; a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names: list[str] = []

    def quick(target: ToyTarget, **options: object) -> object:
        names.append(target.info.name)
        return quick_profile(target, seconds=0.05, **options)

    monkeypatch.setattr(profile_auto, "quick_profile", quick)
    return names


def test_a_quick_profile_is_measured_once_and_kept(measured: list[str]) -> None:
    target, notes = toy_pair()[0], []
    first = kept_or_quick(target, note=notes.append)
    assert (measured, len(notes)) == (["toy"], 1)
    assert "toy" in notes[0]
    second = kept_or_quick(target, note=notes.append)
    assert (measured, len(notes)) == (["toy"], 1)
    assert first(8, 100) == second(8, 100) > 0
    assert load_profile(target).settings["quick"] is True


def test_another_setting_is_another_profile(measured: list[str]) -> None:
    target = toy_pair()[0]
    kept_or_quick(target)
    kept_or_quick(target, None, 1 << 20)
    assert len(measured) == 2
    assert isinstance(key_of(target), ProfileKey)
    assert load_profile(target, expert_memory=1 << 20).key.expert_memory == 1 << 20


def test_a_target_that_cannot_be_measured_is_no_error(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise dspark.CapabilityError("no trees today.")

    monkeypatch.setattr(profile_auto, "quick_profile", refuse)
    assert kept_or_quick(toy_pair()[0]) is None
    assert "no trees today" in caplog.text


@pytest.mark.parametrize(
    ("schedule", "draft", "is_asked"),
    [
        ("auto", "lookup", True),
        ("early-stop", "lookup", True),
        ("async", "lookup", True),
        ("fixed:2", "lookup", False),
        ("threshold:0.3", "lookup", False),
        ("off", "lookup", False),
        ("auto", "none", False),
    ],
)
def test_costs_are_asked_for_where_the_schedule_goes_by_them(
    schedule: str, draft: str, is_asked: bool, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = LoadedTarget(target=toy_pair()[0], codec=None, sampling={}, folder=Path())
    monkeypatch.setattr(loading, "_load_model", lambda spec, options: loaded)
    load = partial(dspark.Engine.load, "toy", draft, step_costs=kept_or_quick)
    own = load(config=dspark.EngineConfig(schedule=schedule))
    assert len(measured) == is_asked
    assert (own.config.step_seconds is not None) == is_asked

    def given(rows: int, context: int) -> float:
        return 1.0

    own = load(config=dspark.EngineConfig(schedule=schedule, step_seconds=given))
    assert own.config.step_seconds is given
    assert len(measured) == is_asked
    plain = dspark.Engine.load("toy", draft, config=dspark.EngineConfig(schedule=schedule))
    assert plain.config.step_seconds is None
