"""Which path is taken, why, and that the finding is remembered."""

from __future__ import annotations

import json
import logging
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark.adapters.fused import choose as choosing
from dspark.adapters.fused import library
from dspark.adapters.fused.target import FusedTarget
from dspark.adapters.hf.target import HFTarget
from dspark.errors import CapabilityError, ConfigError
from dspark.exactness import read_probe
from dspark.registry import QUANTS
from dspark.target import Target
from tests.conftest import random_model, random_target
from tests.fused.models import choose, forward, needs_compiler, tree_part

TIMING = "timing both paths"


@pytest.fixture
def tiny_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_LEAST_PARAMETERS", 0)


def small_llama(dtype: torch.dtype | None = None) -> Any:
    """One layer: which path is taken does not depend on how many there are."""
    return random_model("llama", dtype, layers=1)


def pretend(monkeypatch: pytest.MonkeyPatch, fused: float, plain: float) -> None:
    """Let steps take so many seconds."""

    def seconds(targets, rows, pairs):
        times = {"fused": fused, "plain": plain}
        return {name: dict.fromkeys(rows, times[name]) for name in targets}

    monkeypatch.setattr(choosing, "step_seconds", seconds)


@needs_compiler
@pytest.mark.usefixtures("tiny_models_too")
def test_the_faster_path_is_taken_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pretend(monkeypatch, fused=1.0, plain=2.0)
    assert isinstance(choose(small_llama(), "auto", probe_folder=tmp_path), FusedTarget)
    assert TIMING in caplog.text
    caplog.clear()
    pretend(monkeypatch, fused=3.0, plain=2.0)  # what was found stays
    again = choose(small_llama(), "auto", probe_folder=tmp_path)
    assert isinstance(again, FusedTarget)
    assert again.exactness.enabled
    assert "fused" in again.exactness.backend
    assert TIMING not in caplog.text


@needs_compiler
@pytest.mark.usefixtures("tiny_models_too")
def test_a_slower_fused_path_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, fused=2.0, plain=1.0)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            target = choose(small_llama(), "auto", probe_folder=tmp_path, exact=False)
        assert isinstance(target, HFTarget)
        assert "plain path: the fused path is no faster here" in target.exactness.backend
    assert TIMING not in caplog.text


@needs_compiler
@pytest.mark.usefixtures("tiny_models_too")
@pytest.mark.parametrize(
    ("name", "finding", "reason"),
    [
        ("check_rows", False, "depend on their company"),
        ("_difference", 0.5, "off by 5.0e-01"),
    ],
)
def test_a_fused_path_that_fails_its_check_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, finding: object, reason: str
) -> None:
    pretend(monkeypatch, fused=1.0, plain=2.0)
    monkeypatch.setattr(choosing, name, lambda *args: finding)
    target = choose(small_llama(), "auto", probe_folder=tmp_path, exact=False)
    assert isinstance(target, HFTarget)
    assert reason in target.exactness.backend


@needs_compiler
def test_steps_are_really_timed(tmp_path: Path) -> None:
    target = choose(small_llama())
    found = choosing.step_seconds({"one": target}, (1, 16), 2)
    assert set(found["one"]) == {1, 16}
    assert all(0 < seconds < 60 for seconds in found["one"].values())


def test_tiny_models_and_models_without_a_record_are_not_measured(tmp_path: Path) -> None:
    tiny = small_llama()
    assert isinstance(choose(tiny, "auto", probe_folder=tmp_path, exact=False), HFTarget)
    assert isinstance(choose(small_llama(), "auto", exact=False), HFTarget)


@needs_compiler
@pytest.mark.usefixtures("tiny_models_too")
def test_the_environment_says_what_auto_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choosing.PATH_VARIABLE, "plain")
    kept = {"probe_folder": tmp_path, "exact": False}
    assert isinstance(choose(small_llama(), "auto", **kept), HFTarget)
    monkeypatch.setenv(choosing.PATH_VARIABLE, "fused")
    assert isinstance(choose(small_llama(), "auto"), FusedTarget)
    assert isinstance(choose(small_llama(), "plain", exact=False), HFTarget)
    monkeypatch.setenv(choosing.PATH_VARIABLE, "quick")
    with pytest.raises(ConfigError, match="'quick'"):
        choose(small_llama(), "auto")


@needs_compiler
@pytest.mark.usefixtures("tiny_models_too")
@pytest.mark.parametrize("family", ["phi3", "qwen3_moe", "gemma4"])
def test_unusual_models_stay_on_the_plain_path(family: str, tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="fused path cannot be taken"):
        choose(random_model(family))
    target = choose(random_model(family), "auto", probe_folder=tmp_path, exact=False)
    assert isinstance(target, HFTarget)
    assert "plain path: models of type" in target.exactness.backend


@needs_compiler
def test_unusual_parts_are_noticed() -> None:
    model = random_model("llama")
    model.model.layers[1].extra = torch.nn.Identity()
    with pytest.raises(CapabilityError, match="parts that are not fused"):
        choose(model)
    model = random_model("llama")
    model.model.layers[2].self_attn.o_proj = torch.nn.Identity()
    with pytest.raises(CapabilityError, match="linear layers are Identity"):
        choose(model)
    with pytest.raises(CapabilityError, match="float16 models"):
        choose(random_model("llama", torch.float16))


@pytest.mark.usefixtures("tiny_models_too")
@pytest.mark.parametrize(
    ("compiler", "reason"), [("missing", "no C++ compiler"), ("broken", "failed: no message")]
)
def test_without_a_working_compiler(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    compiler: str,
    reason: str,
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / compiler))
    with caplog.at_level(logging.INFO):
        model, folder = small_llama(), tmp_path / "probes"
        target = choose(model, "auto", probe_folder=folder, exact=False)
    assert isinstance(target, HFTarget)
    assert reason in target.exactness.backend
    assert [r.message for r in caplog.records if "takes the plain path" in r.message]
    with pytest.raises(CapabilityError, match=re.escape(reason)):
        choose(small_llama())


@needs_compiler
def test_kernels_are_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And branches for other machines are right: AVX512-BF16, whose instruction other ones stand in
    for, and no instruction for int8.
    """
    caplog.set_level(logging.INFO)
    # Compiled sooner, and with the same bits as -O3: multiplications and additions are joined.
    quick = ("-O1", "-fexpensive-optimizations")
    flags = (*library._FLAGS, *quick, "-DDSPARK_PAIRS", "-DDSPARK_NO_VNNI")
    monkeypatch.setattr(library, "_FLAGS", flags)
    first = library.load_library(tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".so"]  # and no scratch is left
    assert "compiling" in caplog.text
    caplog.clear()
    library._load.cache_clear()  # as another process would begin
    second = library.load_library(tmp_path)
    assert "compiling" not in caplog.text
    assert first.fingerprint == second.fingerprint

    monkeypatch.setattr(choosing, "load_library", lambda folder: second)
    target = choose(small_llama(torch.bfloat16))
    assert target.exactness.holds
    plain = random_target("llama", torch.bfloat16, exact=True, layers=1)
    tokens = list(range(3, 43))
    ours, theirs = (_logits(which, tokens) for which in (target, plain))
    assert (ours - theirs).abs().max() <= 0.03 * theirs.abs().max()
    slow = [choose(small_llama(), quant=quant) for quant in QUANTS[1:]]
    monkeypatch.undo()
    for quant, other in zip(QUANTS[1:], slow, strict=True):
        assert torch.equal(
            _logits(choose(small_llama(), quant=quant), tokens), _logits(other, tokens)
        )


def _logits(target: Target, tokens: list[int]) -> torch.Tensor:
    cache = target.new_cache()
    slot, _ = cache.open(tokens)
    part = tree_part(slot, tokens, list(range(-1, len(tokens) - 1)), 0)
    return forward(target, cache, part).logits.float()


@needs_compiler
@pytest.mark.usefixtures("tiny_models_too")
def test_a_record_is_kept_per_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, fused=1.0, plain=2.0)
    before = torch.get_num_threads()
    try:
        settings = ((1, None, "none"), (2, None, "none"), (1, torch.bfloat16, "none"))
        for threads, dtype, quant in (*settings, (1, None, "int8"), (1, None, "int4")):
            torch.set_num_threads(threads)
            options = {"probe_folder": tmp_path, "exact": False, "quant": quant}
            choose(small_llama(dtype), "auto", **options)
    finally:
        torch.set_num_threads(before)
    records = [read_probe(tmp_path, path.stem) for path in tmp_path.glob("*.json")]
    paths = [record for record in records if record and "path" in record]
    assert len(paths) == 5
    assert all(json.dumps(record["seconds"]) for record in paths)
