"""Sources that are compiled on demand and kept."""

from __future__ import annotations

import ctypes
import logging
import shutil
import stat
from pathlib import Path

import pytest

from dspark.errors import ConfigError
from dspark.native import FLAGS, PATH_VARIABLE, NotCompiled, Sources, compile_once, wanted_path

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)
QUICK = tuple("-O0" if flag == "-O3" else flag for flag in FLAGS)


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    """A function that returns what a header says."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    (folder / "main.cpp").write_text(
        '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'
    )
    return Sources("answer", folder / "main.cpp", (folder / "answer.h",))


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


@needs_compiler
def test_a_library_is_compiled_once_and_again_when_a_header_changes(
    sources: Sources, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "kernels"
    first = compile_once(sources, folder, flags=QUICK)
    assert answer(first) == 42
    assert "compiling" in caplog.text
    caplog.clear()
    assert compile_once(sources, folder, flags=QUICK) == first
    assert "compiling" not in caplog.text
    sources.included[0].write_text("#define ANSWER 43\n")
    second = compile_once(sources, folder, flags=QUICK)
    assert answer(second) == 43
    assert {path.name for path in folder.iterdir()} == {first.name, second.name}


@needs_compiler
def test_a_source_that_does_not_compile_says_why_and_leaves_nothing(
    sources: Sources, tmp_path: Path
) -> None:
    sources.main.write_text("int answer() { return nothing; }\n")
    with pytest.raises(NotCompiled, match=r"failed: .*nothing"):
        compile_once(sources, tmp_path / "kernels", flags=QUICK)
    assert not list((tmp_path / "kernels").iterdir())


def test_without_a_compiler(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NotCompiled, match=r"no C\+\+ compiler \(no-such-compiler\)"):
        compile_once(sources, tmp_path)
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(NotCompiled, match="failed: no message"):
        compile_once(sources, tmp_path, compiler=str(broken))


def test_a_folder_that_cannot_be_written_is_a_reason(sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    compiler = tmp_path / "never-called"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(NotCompiled, match="cannot be compiled"):
        compile_once(sources, tmp_path / "file", compiler=str(compiler))


def test_the_environment_says_what_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    assert wanted_path("auto") == "auto"
    monkeypatch.setenv(PATH_VARIABLE, "plain")
    assert wanted_path("auto") == "plain"
    assert wanted_path("fused") == "fused"
    with pytest.raises(ConfigError, match="'quick'"):
        wanted_path("quick")
