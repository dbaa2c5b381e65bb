"""Files that `dspark report` reads and refuses, and numbers as it shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.errors import DataError
from dspark.eval.report import numbers
from dspark.eval.report.page import printable
from dspark.eval.report.read import read_inputs
from tests.conftest import CHARACTERS
from tests.eval.report_samples import (
    audit_results,
    bench_results,
    eval_results,
    profile_results,
    write,
)


def without(results: dict[str, Any], *path: str) -> dict[str, Any]:
    """Results that lack a key."""
    place = results
    for name in path[:-1]:
        place = place[name]
    del place[path[-1]]
    return results


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ('{"schema": NaN}', "is not JSON: NaN is no number of JSON"),
        ("[1]", "is no result file of dspark: it holds no JSON object"),
        ("[" * 100_000, "is no result file of dspark: it is nested too deeply"),
        ("{}", "its schema is None, but must be one of dspark.bench, dspark.eval,"),
        ('{"schema": "other", "version": 1}', "its schema is 'other'"),
        ('{"schema": "dspark.doctor", "version": 1}', "its schema is 'dspark.doctor'"),
        ('{"schema": 1, "kind": "other"}', "its schema is 1"),
        (json.dumps({"schema": "x" * 500}), "xxx..., but must be"),
    ],
)
def test_what_is_no_result_file_is_refused_in_one_sentence(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_inputs([path])
    assert message in caught.value.message
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.message.endswith(".")


@pytest.mark.parametrize(
    "results", [bench_results(), eval_results(), profile_results()], ids=lambda x: x["schema"]
)
@pytest.mark.parametrize("version", [2, 0, "1", True, None])
def test_another_version_is_refused(tmp_path: Path, results: dict[str, Any], version: Any) -> None:
    path = write(tmp_path, "r", {**results, "version": version})
    message = rf"is version {version!r} of {results['schema']}, but this dspark reads version 1\."
    with pytest.raises(DataError, match=message):
        read_inputs([path])


def test_a_newer_audit_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "r", {**audit_results(), "version": 2})
    with pytest.raises(DataError, match=r"is version 2 of dspark\.audit"):
        read_inputs([path])


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (without(eval_results(), "header"), "at header, field required"),
        (without(eval_results(), "header", "target"), "at header.target, field required"),
        (without(bench_results(), "figures"), "at figures, field required"),
        ({**profile_results(), "points": [{"rows": "many"}]}, "at points.0.context"),
        ({**audit_results(), "checks": 3}, "at checks, input should be a valid list"),
        ({**eval_results(), "configurations": [1]}, "at configurations.0"),
        ({**eval_results(), "configurations": []}, "at configurations, list should have at least"),
        ({**bench_results(), "figures": []}, "at figures, list should have at least"),
    ],
)
def test_a_file_that_lacks_what_its_schema_promises_is_refused(
    tmp_path: Path, results: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        read_inputs([write(tmp_path, "r", results)])
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.json cannot be read: No such file"):
        read_inputs([tmp_path / "gone.json"])
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"binary\.json is not JSON"):
        read_inputs([tmp_path / "binary.json"])
    with pytest.raises(DataError, match="0 files were given, but a report takes 1 to 26"):
        read_inputs([])


def test_keys_that_are_not_known_do_no_harm(tmp_path: Path) -> None:
    results = eval_results()
    results["new"] = results["header"]["newer"] = {"x": [1]}
    (file,) = read_inputs([write(tmp_path, "r", results)]).eval
    assert file.raw == results


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (numbers.rounded(0.012345), "0.0123"),
        (numbers.rounded(9.996), "10.0"),
        (numbers.rounded(99.96), "100"),
        (numbers.rounded(1234.5), "1,230"),
        (numbers.rounded(-15.04), "−15.0"),
        (numbers.rounded(0), "0"),
        (numbers.rounded(None), "–"),
        (numbers.percent(0.3456), "34.6 %"),
        (numbers.times(1.305), "1.30×"),
        (numbers.signed(-0.004), "0.00"),
        (numbers.signed(0.126), "+0.13"),
        (numbers.signed(-1234.5, 1), "−1,234.5"),
        (numbers.change(1.099), "+9.9 %"),
        (numbers.change(None), "–"),
        (numbers.interval(1.2, 1.345), "1.20 to 1.34"),
        (numbers.interval(1.2, None), "–"),
        (numbers.seconds(0.0321, numbers.time_unit([0.0321, 9.9])), "32.1"),
        (numbers.seconds(0.4, numbers.time_unit([0.4, 10.0])), "0.400"),
        (numbers.seconds(None, "ms"), "–"),
        (numbers.size(943718400), "900 MiB"),
        (numbers.size(12), "12.0 B"),
        (numbers.size(None), "–"),
        (numbers.count(12345), "12,345"),
        (numbers.value_text("ab" * 32), "abababababab"),
        (numbers.value_text([1, None]), "1, not set"),
        (numbers.value_text(True), "yes"),
    ],
)
def test_numbers_have_sensible_digits(shown: str, text: str) -> None:
    assert shown == text


@given(st.floats(1e-9, 1e12))
def test_rounding_keeps_three_digits(value: float) -> None:
    assert float(numbers.rounded(value).replace(",", "")) == pytest.approx(value, rel=0.0051)


@given(st.text(st.one_of(st.sampled_from("\n\r\t \x00\x7f\u2028\u202e\ud800"), CHARACTERS)))
def test_printable_text_has_one_line_and_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode("utf-8")  # raises if it cannot be written
    assert printable(shown) == shown
