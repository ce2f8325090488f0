"""Files and directories that are there whole or not at all.

What is written stands beside its name until it is complete, and then takes it by rename:

    .NAME.82bcd31c.new.5f0e77a1     what is being written
    .NAME.82bcd31c.old.90ab12cd     a directory that stood under the name, while it is deleted

A process that is killed leaves them behind, and the next one that writes the same name deletes them. It must not take
what a living process is writing, so whoever writes holds a lock (flock) on it, which the kernel lets go when the
process ends, however it ends. Locks are known to one kernel: 82bcd31c is the beginning of its boot id, and what has
another, as on a file system that several hosts share, is left where it is; so is what could not be locked when it was
made. What stood under the name changes places with what is new, in one step where the system can; where it cannot,
the old copy is deleted only when something stands there again.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from gemma_qat.errors import InputError, refuse_address

What = Literal["new", "old"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Drawn when the kernel starts; the same in every container on it."""


@contextlib.contextmanager
def appearing(directory: Path, marker: str = "manifest.json") -> Iterator[Path]:
    """Gives a temporary directory that becomes `directory` when the block ends well; a checkpoint there is replaced.

    `marker` is the file that a directory must hold to be replaced.
    Raises: InputError when what is there is no checkpoint of this project.
    """
    refuse_to_replace(directory, marker)
    directory.parent.mkdir(parents=True, exist_ok=True)
    _clear(directory, "new")
    with _held(directory, "new", Path.mkdir) as temporary:
        try:
            yield temporary
            appear(temporary, directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextlib.contextmanager
def appearing_file(out: Path) -> Iterator[Path]:
    """Gives an empty file in the same directory that becomes `out` when the block ends well.

    What stood at `out` stays until then, and stays for good when the block fails; the partial file is removed.
    Raises: InputError when `out` is a directory, or a device or pipe, which a file would take the place of.
    """
    refuse_address(out)
    if out.is_dir():
        raise InputError(f"{out}: a directory given, the name of a file expected")
    if out.exists() and not out.is_file():
        raise InputError(f"{out}: a device or pipe given, the name of a file expected")
    out.parent.mkdir(parents=True, exist_ok=True)
    _clear(out, "new")
    with scratch_file(out) as partial:
        yield partial
        os.replace(partial, out)


@contextlib.contextmanager
def scratch_file(out: Path) -> Iterator[Path]:
    """Gives an empty file in the directory of `out`, for something on the way to it, that is gone after the block."""
    with _held(out, "new", lambda path: path.touch(exist_ok=False)) as partial:
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)


def appear(temporary: Path, directory: Path) -> None:
    """Renames a complete `temporary` beside `directory` to it; a checkpoint there is replaced."""
    if directory.exists() and _exchange(temporary, directory):
        shutil.rmtree(temporary)  # what stood there
    elif directory.exists():
        with _held(directory, "old", Path.mkdir) as doomed:
            try:
                os.replace(directory, doomed / "old")
                os.replace(temporary, directory)
            except BaseException:
                if (doomed / "old").exists():
                    os.replace(doomed / "old", directory)
                doomed.rmdir()
                raise
            shutil.rmtree(doomed)
    else:
        os.replace(temporary, directory)
    _clear(directory, "old")


def _exchange(one: Path, other: Path) -> bool:
    """Swaps what two names stand for in one step, so that neither is ever missing; False where that cannot be done.

    Source: renameat2(2) of Linux; not every file system has it.
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return (
        rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0
    )


def refuse_to_replace(directory: Path, marker: str = "manifest.json") -> None:
    """Raises InputError when a checkpoint at `directory` would take the place of anything but a checkpoint."""
    refuse_address(directory)
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() and not (directory / marker).is_file():
        what = f"a directory without a {marker}" if directory.is_dir() else "a file"
        raise InputError(
            f"{directory}: there is {what}, which is not replaced; give a new name or another checkpoint's"
        )


def refuse_overlap(source: Path, out: Path) -> None:
    """Raises InputError when writing `out` would take the place of what is read, or of a part of it."""
    here, there = source.resolve(), out.resolve()
    if there == here or (here in there.parents and there.exists()):
        raise InputError(f"{out}: that is, or is part of, what is read ({source}); give a new name")


@contextlib.contextmanager
def _held(out: Path, what: What, make: Callable[[Path], object]) -> Iterator[Path]:
    """Gives what `make` makes beside `out`, locked until the block ends."""
    while True:
        path = out.with_name(f".{out.name}.{_boot() or 'unknown'}.{what}.{secrets.token_hex(4)}")
        make(path)
        with contextlib.suppress(FileNotFoundError):  # another process took it for a dead one's
            descriptor = os.open(path, os.O_RDONLY)
            locked = _lock(descriptor)
            if locked is not False and path.exists():
                break
            os.close(descriptor)
    if locked is None:
        path = path.rename(out.with_name(f".{out.name}.unlocked.{what}.{secrets.token_hex(4)}"))
    try:
        yield path
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Returns whether the lock is ours now; None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _clear(out: Path, what: What) -> None:
    """Deletes what dead processes of this kernel left beside `out`."""
    boot = _boot()
    if boot is None:
        return
    name = re.compile(rf"\.{re.escape(out.name)}\.{boot}\.{what}\.[0-9a-f]{{8}}")
    with contextlib.suppress(PermissionError):  # a directory may be written in without being listed
        for path in [path for path in out.parent.iterdir() if name.fullmatch(path.name)]:
            _remove_if_dead(path)


def _remove_if_dead(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        if _lock(descriptor) is not True:
            return
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _boot() -> str | None:
    """The beginning of the kernel's boot id; None where it has none."""
    try:
        return _BOOT_ID.read_text("ascii")[:8]
    except OSError:
        return None
