"""What killed writers leave: if these fail, it fills the disk for good, or what somebody is writing is deleted."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_qat.checkpoint import appear
from gemma_qat.checkpoint.appear import appearing, appearing_file
from gemma_qat.errors import InputError

ROOT = Path(__file__).resolve().parents[2]

_DIES = """
import os, signal, sys
from pathlib import Path
from gemma_qat.checkpoint import appear
from gemma_qat.checkpoint.appear import appearing, appearing_file
appear._exchange = lambda one, other: False  # where the system has none
out, when = Path(sys.argv[1]), sys.argv[2]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if when == "half a file":
    with appearing_file(out) as partial:
        partial.write_bytes(b"half")
        die()
with appearing(out) as temporary:
    (temporary / "manifest.json").write_text("new")
    if when == "half a directory":
        die()
    if when == "nothing under the name":
        replace = os.replace
        os.replace = lambda a, b: die() if Path(b) == out else replace(a, b)
    if when == "while deleting":
        import shutil
        shutil.rmtree = die
    if when == "alive":
        print("writing", flush=True)
        sys.stdin.readline()
"""


def started(out: Path, when: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _DIES, str(out), when], env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def killed(out: Path, when: str) -> list[str]:
    """Names in the directory after a writer was killed at a moment."""
    process = started(out, when)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    return names(out.parent)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def written(out: Path, text: str) -> None:
    with appearing(out) as temporary:
        (temporary / "manifest.json").write_text(text)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    written(tmp_path / "out", "before")
    return tmp_path / "out"


def test_the_next_writer_deletes_what_a_dead_one_left(out: Path, tmp_path: Path) -> None:
    """Directories and files, before anything new is written: a disk may have no room for two."""
    left = killed(out, "half a directory")
    assert len(left) == 2 and left[1] == "out" and ".new." in left[0]
    assert (out / "manifest.json").read_text() == "before"
    with appearing(out) as temporary:
        assert names(tmp_path) == [temporary.name, "out"]
        (temporary / "manifest.json").write_text("after")
    assert names(tmp_path) == ["out"] and (out / "manifest.json").read_text() == "after"
    file = tmp_path / "m.gguf"
    assert len(killed(file, "half a file")) == 2
    with appearing_file(file) as partial:
        assert names(tmp_path) == [partial.name, "out"]
        partial.write_bytes(b"whole")
    assert names(tmp_path) == ["m.gguf", "out"] and file.read_bytes() == b"whole"


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    """If it fails, `--out /dev/null` puts a file in the place of the device, for every program of the machine."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="a device or pipe"), appearing_file(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo() and names(tmp_path) == ["pipe"]


def test_what_stood_there_is_deleted_when_something_stands_there_again(out: Path) -> None:
    """If it fails, a kill between two renames and an export that fails after it cost the only copy."""
    left = killed(out, "nothing under the name")
    assert len(left) == 2 and "out" not in left
    old = out.parent / next(name for name in left if ".old." in name) / "old" / "manifest.json"
    with pytest.raises(ValueError, match="fails"), appearing(out):
        raise ValueError("fails")
    assert old.read_text() == "before" and names(out.parent) == [old.parents[1].name]
    written(out, "after")
    assert names(out.parent) == ["out"] and (out / "manifest.json").read_text() == "after"
    assert len(killed(out, "while deleting")) == 2
    assert (out / "manifest.json").read_text() == "new"
    written(out, "again")
    assert names(out.parent) == ["out"]


def test_a_living_writer_keeps_what_it_writes(out: Path) -> None:
    """If it fails, two exports to one name destroy one another; now the last to end stands there."""
    other = started(out, "alive")
    assert other.stdout is not None and other.stdout.readline() == "writing\n"
    written(out, "ours")
    assert len(names(out.parent)) == 2 and (out / "manifest.json").read_text() == "ours"
    other.communicate("go on\n", timeout=60)
    assert other.returncode == 0
    assert names(out.parent) == ["out"] and (out / "manifest.json").read_text() == "new"


def test_what_cannot_be_known_is_left(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it fails, a process on another host, or where locks are not, loses what it is writing."""
    boot = appear._BOOT_ID.read_text()[:8]
    other = "0" * 8 if boot != "0" * 8 else "1" * 8
    strangers = [
        f".out.{other}.new.01234567", ".out.unlocked.new.01234567", f".out.{boot}.new.0123456",
        f".outer.{boot}.new.01234567", f".out.{boot}.new.01234567.{boot}.new.01234567",
    ]  # fmt: skip
    for name in strangers:
        (out.parent / name).mkdir()
    (out.parent / f".out.{boot}.new.76543210").symlink_to(out)
    before = names(out.parent)
    written(out, "after")
    assert names(out.parent) == before

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with appearing(out) as temporary:
        assert temporary.name.startswith(".out.unlocked.new.") and temporary.is_dir()
        (temporary / "manifest.json").write_text("unlocked")
    assert names(out.parent) == before
    monkeypatch.setattr(appear, "_BOOT_ID", out / "nowhere")
    written(out, "without a boot id")
    assert names(out.parent) == before


def test_made_anew_when_it_was_taken_for_a_dead_ones(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making a directory and locking it another process may lock or delete it."""
    opened: list[Path] = []
    real: Callable[..., int] = os.open

    def meddled(path: Any, *rest: Any, **at: Any) -> int:
        if at:  # of shutil.rmtree
            return real(path, *rest, **at)
        opened.append(Path(path))
        if len(opened) == 1:
            Path(path).rmdir()
        descriptor = real(path, *rest)
        if len(opened) == 2:
            Path(path).rmdir()
        if len(opened) == 3:
            fcntl.flock(real(path, *rest), fcntl.LOCK_EX)
        return descriptor

    monkeypatch.setattr(os, "open", meddled)
    with appearing(out) as temporary:
        assert len(opened) == 4 and temporary == opened[3]
        (temporary / "manifest.json").write_text("after")


def test_a_rename_that_fails_puts_back_what_was_there(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target) == out and Path(source).name != "old":
            raise OSError(errno.EIO, "no more")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(appear, "_exchange", lambda one, other: False)  # where the system has none
    with pytest.raises(OSError, match="no more"):
        written(out, "after")
    assert names(out.parent) == ["out"] and (out / "manifest.json").read_text() == "before"


@pytest.mark.parametrize("can", [True, False])
def test_old_and_new_change_places(
    can: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one step where the system can: if it fails, a kill between two renames leaves nothing under the name."""
    if not can:
        monkeypatch.setattr(appear, "_exchange", lambda one, other: False)
    elif sys.platform == "linux":
        # The name is never seen missing: no rename but the exchange touches it.
        monkeypatch.setattr(appear.os, "replace", None)
    for content in ("old", "new"):
        if content == "old":
            (tmp_path / "x").mkdir()
            (tmp_path / "x/manifest.json").write_text(content)
            continue
        with appearing(tmp_path / "x") as temporary:
            (temporary / "manifest.json").write_text(content)
    assert (tmp_path / "x/manifest.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
