"""The curve itself: reading it, its file, SGLang's forms, the picture."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from dspark.errors import ConfigError, DataError
from dspark.eval.profile import (
    ExpertCount,
    Profile,
    ProfileKey,
    ProfilePoint,
    is_measured,
    read_profile,
    seconds_for,
    steps_per_second,
)
from dspark.eval.profile_plot import plot_profile
from dspark.eval.profile_sglang import from_sglang, rising_steps, to_sglang, write_sglang
from dspark.eval.results import write_results

KEY = ProfileKey(
    target="abc", device="cpu", processor="some CPU", dtype="float32", threads=2, exact=True
)


def point(context: int, rows: int, milliseconds: float) -> ProfilePoint:
    seconds = milliseconds / 1000
    return ProfilePoint(
        context=context,
        rows=rows,
        requests=1,
        median=seconds,
        low=0.9 * seconds,
        high=1.2 * seconds,
        repeats=5,
    )


def curve(table: dict[int, dict[int, float]], **options: Any) -> Profile:
    points = tuple(
        point(context, rows, value) for context, own in table.items() for rows, value in own.items()
    )
    return Profile(key=KEY, points=points, **options)


JAGGED = {128: {1: 10.0, 4: 16.0, 8: 12.0, 16: 20.0}, 512: {1: 20.0, 4: 26.0, 8: 22.0, 16: 40.0}}


# -- reading ----------------------------------------------------------------------------------


def test_measured_points_are_read_as_they_were_measured() -> None:
    """Eight rows took less time than four, and stay so."""
    made = curve(JAGGED)
    for context, own in JAGGED.items():
        for rows, value in own.items():
            assert seconds_for(made, rows, context) == value / 1000
            assert is_measured(made, rows, context)
    assert steps_per_second(made, 4, 128) == pytest.approx(62.5)


@pytest.mark.parametrize(
    ("rows", "context", "milliseconds"),
    [
        (2, 128, 12.0),  # a third of the way from 10 to 16
        (6, 128, 14.0),  # down from 16 to 12
        (1, 320, 15.0),  # half way between contexts
        (6, 320, 19.0),  # both: (14 + 24) / 2
        (2.5, 128, 13.0),
    ],
)
def test_between_points_the_reading_is_linear(
    rows: float, context: float, milliseconds: float
) -> None:
    made = curve(JAGGED)
    assert seconds_for(made, rows, context) == pytest.approx(milliseconds / 1000)
    assert is_measured(made, rows, context)


@pytest.mark.parametrize(
    ("rows", "context", "milliseconds"),
    [
        (24, 128, 28.0),  # slope of the upper half: (20 - 12) / 8 a row
        (1, 896, 30.0),  # slope between the contexts: 10 / 384 a token
        (1, 5, 10.0),  # before the first context: its value
    ],
)
def test_beyond_the_points_it_goes_on_and_says_so(
    rows: float, context: float, milliseconds: float
) -> None:
    made = curve(JAGGED)
    assert seconds_for(made, rows, context) == pytest.approx(milliseconds / 1000)
    assert not is_measured(made, rows, context)


def test_before_the_first_row_count_the_reading_is_that_ones() -> None:
    made = curve({64: {4: 16.0, 8: 24.0}})
    assert seconds_for(made, 1, 64) == 0.016
    assert not is_measured(made, 1, 64)


def test_beyond_the_last_point_a_step_never_gets_cheaper() -> None:
    made = curve({64: {1: 10.0, 8: 30.0, 16: 20.0}})
    assert seconds_for(made, 1000, 64) == 0.020


def test_contexts_may_have_other_row_counts() -> None:
    """As in an interrupted run."""
    made = curve({64: {1: 10.0, 8: 24.0}, 128: {1: 20.0}})
    assert seconds_for(made, 8, 128) == 0.020
    assert not is_measured(made, 8, 128)
    assert is_measured(made, 1, 100)
    assert made.rows == (1, 8)


@pytest.mark.parametrize(
    ("rows", "context"), [(0.5, 64), (1, -1), (float("nan"), 64), (float("inf"), 64)]
)
def test_a_step_without_rows_or_context_has_no_cost(rows: float, context: float) -> None:
    with pytest.raises(ConfigError, match="has no cost"):
        seconds_for(curve(JAGGED), rows, context)


def test_points_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="no point"):
        Profile(key=KEY, points=())
    with pytest.raises(ConfigError, match="twice"):
        Profile(key=KEY, points=(point(64, 1, 5.0), point(64, 1, 6.0)))
    with pytest.raises(ConfigError, match="seconds > 0"):
        Profile(key=KEY, points=(point(64, 1, 0.0),))


# -- files ------------------------------------------------------------------------------------


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    made = curve(
        JAGGED,
        experts=(ExpertCount(rows=1, distinct_experts=2.0),),
        settings={"rows_per_request": 16},
        header={"created": "today"},
    )
    path = tmp_path / "profile.json"
    write_results(path, made.to_json())
    assert read_profile(path) == made
    written = json.loads(path.read_text())
    assert (written["schema"], written["version"]) == ("dspark.profile", 1)
    assert written["contexts"] == [128, 512]
    assert written["rows"] == [1, 4, 8, 16]
    seconds = {"median": 0.01, "low": 0.009, "high": 0.012}
    assert written["points"][0]["seconds"] == pytest.approx(seconds)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda data: data.pop("key"),
        lambda data: data["points"][0].pop("seconds"),
        lambda data: data["points"][0].update(rows="many"),
        lambda data: data["points"].append(data["points"][0]),
        lambda data: data.update(points=[]),
        lambda data: data["key"].update(colour="red"),
    ],
)
def test_half_a_profile_is_refused(tmp_path: Path, break_it: Any) -> None:
    data = curve(JAGGED).to_json()
    break_it(data)
    path = tmp_path / "profile.json"
    write_results(path, data)
    with pytest.raises(DataError, match=r"profile\.json is not a"):
        read_profile(path)


# -- SGLang -----------------------------------------------------------------------------------


def write(path: Path, **fields: Any) -> Path:
    path.write_text(json.dumps(fields))
    return path


def test_the_plain_form_goes_out_and_in(tmp_path: Path) -> None:
    path = tmp_path / "sps.json"
    write_sglang(path, curve(JAGGED), 128)
    table = json.loads(path.read_text())
    assert table["sample_batch_tokens"] == [1, 4, 8, 16]
    assert table["sample_steps_per_sec"] == pytest.approx([100.0, 62.5, 83.333, 50.0], rel=1e-4)
    assert table["max_batch_tokens"] == 16
    assert rising_steps(table) == [8]
    back = from_sglang(path)
    for rows, value in JAGGED[128].items():
        assert seconds_for(back, rows, 0) == pytest.approx(value / 1000)


def test_the_longest_context_is_written_unless_another_is_named() -> None:
    made = curve(JAGGED)
    assert to_sglang(made)["sample_steps_per_sec"][0] == pytest.approx(50.0)
    with pytest.raises(ConfigError, match=r"context 64 was not measured; .*: 128, 512"):
        to_sglang(made, 64)


ADDITIVE = {
    "bias_seconds": 0.01,
    "bs_probes": [1, 8],
    "alpha_seconds": [0.0, 0.007],
    "m_probes": [4, 16, 64],
    "theta_seconds": [0.0, 0.002, 0.014],
}


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        (1, {1: 0.010, 4: 0.010, 16: 0.012, 64: 0.024}),
        (6, {6: 0.010 + 0.005 + 0.002 * 2 / 12, 16: 0.017, 64: 0.029}),
        (100, {100: 0.010 + 0.007 + 0.014}),
    ],
)
def test_the_additive_form_is_read_at_a_number_of_requests(
    tmp_path: Path, requests: int, expected: dict[int, float]
) -> None:
    """Bias + alpha(requests) + theta(rows), constant beyond the probes."""
    made = from_sglang(write(tmp_path / "sps.json", **ADDITIVE), requests=requests)
    assert {p.rows: p.median for p in made.points} == pytest.approx(expected)
    assert {p.requests for p in made.points} == {requests}
    assert made.settings["form"] == "additive"


PLAIN = {
    "sample_batch_tokens": [1, 8],
    "sample_steps_per_sec": [50.0, 40.0],
    "max_batch_tokens": 8,
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**PLAIN, "mean": 3}, "field mean, whose meaning"),
        ({**ADDITIVE, "gamma_seconds": [1]}, "field gamma_seconds, whose meaning"),
        ({"sample_batch_tokens": [1]}, "no SPS table of SGLang: it has no sample_steps"),
        ({**ADDITIVE, "bias_seconds": 0}, "bias_seconds is 0"),
        ({**ADDITIVE, "theta_seconds": [0.0]}, "m_probes has 3 entries and theta_seconds 1"),
        ({**ADDITIVE, "alpha_seconds": [0.0, -9.0]}, "takes no time"),
        ({**PLAIN, "sample_batch_tokens": [8, 1]}, "must be rising"),
        ({**PLAIN, "sample_batch_tokens": [1.5, 8]}, "integers"),
        ({**PLAIN, "sample_steps_per_sec": [50.0]}, "as many"),
        ({**PLAIN, "sample_steps_per_sec": [50.0, 0.0]}, "must be > 0"),
        ({**PLAIN, "sample_steps_per_sec": [50.0, None]}, "list of numbers"),
        ({**PLAIN, "max_batch_tokens": 4}, "max_batch_tokens is 4"),
        (
            {
                "sample_batch_tokens": [1],
                "sample_steps_per_sec": [1.0],
                "max_batch_tokens": 64,
            },
            "never measured",
        ),
    ],
)
def test_what_is_unclear_in_a_table_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    requests = 8 if fields.get("alpha_seconds") == [0.0, -9.0] else 1
    with pytest.raises(DataError, match=message):
        from_sglang(write(tmp_path / "sps.json", **fields), requests=requests)


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sps.json"
    for text, message in (("[1]", "JSON object"), ("{", "not JSON")):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            from_sglang(path)
    with pytest.raises(DataError, match="cannot be read"):
        from_sglang(tmp_path / "gone.json")
    with pytest.raises(ConfigError, match="requests is 0"):
        from_sglang(path, requests=0)


# -- the picture ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pictures of each kind, of the same profile."""
    folder = tmp_path_factory.mktemp("plots")
    for name in ("a.svg", "a.png", "b.svg", "b.png"):
        plot_profile(curve(JAGGED), folder / name)
    return folder


@pytest.mark.parametrize(("name", "start"), [("a.svg", b"<?xml"), ("a.png", b"\x89PNG")])
def test_a_plot_is_a_picture_of_its_kind(plots: Path, name: str, start: bytes) -> None:
    assert (plots / name).read_bytes().startswith(start)


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_same_profile_makes_the_same_file(plots: Path, kind: str) -> None:
    assert (plots / f"a.{kind}").read_bytes() == (plots / f"b.{kind}").read_bytes()


def test_a_plot_without_matplotlib_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = builtins.__import__

    def missing(name: str, *arguments: Any, **more: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return load(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match="not installed") as caught:
        plot_profile(curve(JAGGED), tmp_path / "a.svg")
    assert caught.value.hint == "pip install 'dspark[report]'"


def test_a_plot_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.svg or \.png"):
        plot_profile(curve(JAGGED), tmp_path / "a.pdf")
