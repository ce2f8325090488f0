"""Runs that lie under a directory, and how far each is: read from names and small JSON files, in milliseconds each.

A run is a folder with the config.json of one and beside it run.json, metrics.jsonl or checkpoints; a sweep's cells are
runs too. Checkpoints (a manifest.json) and models of other programs (another config.json) are none.

| state | what lies there |
|---|---|
| new | a config, and no step, save or session yet |
| running | a process holds the run's mark, or of one on another kernel something moved a short while ago |
| stopped | the last session ended before the planned steps, saved |
| failed | the last session ended in an error, which run.json tells in a line |
| lost | the last session has no end and nobody goes on with it; or it ended, and its save is gone |
| done | the last session ended and a save of the planned steps is there |
| quantized | weights rounded without training: save 0 and no step |
| damaged | a file that cannot be read; the note says which |

All but `new`, `done` and `quantized` go on from the newest save by `gemma-qat train --resume`.

**The mark.** Whoever trains holds a lock (flock) on `.running`, which the kernel lets go when the process ends, however
it ends: on the kernel it was made on, whose boot id it holds, that settles it. Elsewhere, as on a file system that
hosts share, files are looked at: a run that wrote nothing for `PATIENCE` reports, and for `LEAST` seconds at least
(`FIRST` before its first report, while it compiles), is given up. No name of a host, no process id is written anywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from gemma_qat.errors import InputError

State = Literal["new", "running", "stopped", "failed", "lost", "done", "quantized", "damaged"]
STATES: tuple[str, ...] = get_args(State)

PATIENCE, LEAST, FIRST = 20, 600.0, 3600.0
"""Reports, seconds, seconds: how long a run on another kernel may be silent before it is given up."""

ENDING = 60.0
"""Seconds that a process may take to end after the next one has been started."""

DEPTH = 4
"""Folders below the directory asked for that are looked into: runs/SWEEP/CELL is 2."""

_BESIDE = ("run.json", "metrics.jsonl", "checkpoints")
_MARK = ".running"
_TAIL = 2**16
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run as its files tell it.

    `name` is its folder below the directory asked for; `step` is of the last report or save, `saved` of the last save.
    Units: `age` in seconds since the last report; `tokens_per_second` and `mfu` over all devices; `bytes` on disk.
    """

    name: str
    folder: Path
    state: State
    model: str = ""
    recipe: str = ""
    loss_kind: str = ""
    step: int = 0
    planned: int = 0
    loss: float | None = None
    mfu: float | None = None
    tokens_per_second: float | None = None
    age: float | None = None
    saved: int | None = None
    bytes: int | None = None
    note: str = ""


def saves(directory: Path) -> list[Path]:
    """Returns the complete saves of a run, oldest first; `directory` is its `checkpoints`."""
    found = [path for path in directory.glob("*") if re.fullmatch(r"\d+", path.name)]
    return sorted((p for p in found if (p / "manifest.json").is_file()), key=lambda p: int(p.name))


def latest_save(directory: Path) -> Path | None:
    """Returns the newest complete save of a run, if there is one."""
    found = saves(directory)
    return found[-1] if found else None


def run_folders(directory: Path) -> Iterator[Path]:
    """Yields the folders of runs in `directory`, itself included, in the order of their names; links count once."""
    yield from _below(directory, DEPTH, set())


def runs_in(directory: Path, *, sizes: bool = False) -> list[Run]:
    """Returns every run in `directory`; `sizes` adds up the bytes of each, which takes a look at every file."""
    now = time.time()
    found = []
    for folder in run_folders(directory):
        inside = folder.relative_to(directory)
        run = read_run(folder, str(inside) if inside.parts else folder.name, now)
        if sizes:
            run = dataclasses.replace(run, bytes=_size(folder))
        found.append(run)
    return found


def read_run(folder: Path, name: str = "", now: float | None = None) -> Run:
    """Returns what the files of a run say; `now` is the time that ages count from, in seconds since 1970."""
    now = time.time() if now is None else now
    name = name or folder.name
    try:
        config = _object(folder / "config.json")
        about = _object(folder / "run.json") if (folder / "run.json").exists() else {}
        said = _Said.of(config, about)
    except _DamageError as damage:
        return Run(name=name, folder=folder, state="damaged", note=str(damage))
    metrics, reported = _last_report(folder / "metrics.jsonl")
    last = latest_save(folder / "checkpoints")
    saved = int(last.name) if last else None
    state, note = _state(folder, said, metrics, saved, now)
    return Run(
        name=name, folder=folder, state=state, model=said.model, recipe=said.recipe,
        loss_kind="" if state == "quantized" else said.loss,
        step=0 if state == "quantized" else max(int(metrics.get("step", 0)), saved or 0),
        planned=0 if state == "quantized" else said.steps,
        loss=metrics.get("loss"), mfu=metrics.get("mfu"),
        tokens_per_second=metrics.get("tokens_per_second"),
        age=None if reported is None else max(0.0, now - reported), saved=saved, note=note,
    )  # fmt: skip


@contextlib.contextmanager
def marked_as_running(folder: Path) -> Iterator[None]:
    """Holds the mark of a run until the block ends; where there are no locks, or no right to write, goes on without."""
    descriptor = None
    with contextlib.suppress(OSError):
        descriptor = os.open(folder / _MARK, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, _boot().encode())
        _share(descriptor)
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                (folder / _MARK).unlink(missing_ok=True)
            os.close(descriptor)


def wait_until_left(folder: Path) -> None:
    """Returns when no process on this kernel holds the mark of a run: the one before may still be writing its save.

    Raises: InputError when one holds it for longer than `ENDING` seconds.
    """
    since = time.monotonic()
    while _is_held(folder):
        if time.monotonic() - since > ENDING:
            raise InputError(
                f"{folder}: another process trains this run; name=NAME or directory=DIR makes it another run"
            )
        time.sleep(0.5)


class _DamageError(Exception):
    """A file of a run that is not what its name says."""


@dataclasses.dataclass(frozen=True)
class _Said:
    """What config.json and run.json say of a run."""

    model: str
    recipe: str
    loss: str
    steps: int
    log_every: int
    session: Mapping[str, Any] | None

    @classmethod
    def of(cls, config: Mapping[str, Any], about: Mapping[str, Any]) -> _Said:
        train = config.get("train")
        if not isinstance(train, dict) or not isinstance(config.get("model"), str):
            raise _DamageError("config.json: no 'train' and 'model' in it")
        steps, every = train.get("steps"), train.get("log_every", 1)
        if not isinstance(steps, int) or not isinstance(every, int):
            raise _DamageError("config.json: train.steps and train.log_every are no numbers")
        sessions = about.get("sessions", [])
        if not isinstance(sessions, list) or not all(isinstance(one, dict) for one in sessions):
            raise _DamageError("run.json: 'sessions' is no list of objects")
        last = sessions[-1] if sessions else None
        recipe, loss = (str(where.get(what, "")) for where, what in ((config, "recipe"), (train, "loss")))  # fmt: skip
        return cls(config["model"], recipe, loss, steps, every, last)


def _state(
    folder: Path, said: _Said, metrics: Mapping[str, Any], saved: int | None, now: float
) -> tuple[State, str]:
    if _is_held(folder):
        return "running", ""
    session, whole = said.session, saved is not None and saved >= said.steps
    if session is None and not metrics:
        if saved is None:
            return "new", ""
        if saved == 0:
            return "quantized", ""
    if session is None and whole:
        return "done", ""
    if session is not None and session.get("ended"):
        if session.get("error"):
            return "failed", printable(str(session["error"]))
        if saved is None and session.get("steps") == 0:
            return "stopped", "before its first step"
        if saved is None:
            return "lost", "ended, but there is no save"
        return ("done" if whole else "stopped"), ""
    if _is_held(folder) is None and now - _moved(folder) < _patience(said, metrics):
        return "running", ""
    return "lost", "ended after its last save, before run.json said so" if whole else ""


def _patience(said: _Said, metrics: Mapping[str, Any]) -> float:
    if not metrics:
        return FIRST
    return max(LEAST, PATIENCE * said.log_every * float(metrics.get("seconds", 0.0)))


def _moved(folder: Path) -> float:
    times = [0.0]
    for name in (*_BESIDE, _MARK):
        with contextlib.suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times)


def _is_held(folder: Path) -> bool | None:
    """Returns whether a process holds the mark of a run; None where that cannot be known from here."""
    try:
        descriptor = os.open(folder / _MARK, os.O_RDONLY)
    except OSError:
        return None
    try:
        if os.read(descriptor, 64).decode("utf-8", "replace") != _boot() or not _boot():
            return None
        for _ in range(3):  # Another reader may be trying the lock at this moment.
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
            time.sleep(0.002)
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _share(descriptor: int) -> None:
    for _ in range(50):  # A reader tries the lock for a moment.
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        time.sleep(0.002)


def _boot() -> str:
    """The beginning of this kernel's boot id; empty where it has none."""
    try:
        return _BOOT_ID.read_text("ascii")[:8]
    except OSError:
        return ""


def _below(folder: Path, depth: int, seen: set[tuple[int, int]]) -> Iterator[Path]:
    try:
        here = folder.stat()
        if (here.st_dev, here.st_ino) in seen:
            return
        seen.add((here.st_dev, here.st_ino))
        with os.scandir(folder) as entries:
            found = {entry.name: entry for entry in entries}
    except OSError:
        return  # Not ours to read, or gone meanwhile.
    if _is_run(folder, found):
        yield folder
        return
    if "manifest.json" in found or depth == 0:
        return
    for name in sorted(found):
        if not name.startswith(".") and found[name].is_dir():
            yield from _below(folder / name, depth - 1, seen)


def _is_run(folder: Path, found: Collection[str]) -> bool:
    """Whether config.json, or else run.json, is of a run; what cannot be read is taken for one beside a run's files."""
    try:
        if "config.json" in found and {"train", "model"} <= set(_object(folder / "config.json")):
            return True
        return "run.json" in found and _object(folder / "run.json").get("kind") == "run"
    except _DamageError:
        return any(name in found for name in _BESIDE)


def _object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise _DamageError(f"{file.name}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise _DamageError(f"{file.name}: not JSON") from None
    if not isinstance(found, dict):
        raise _DamageError(f"{file.name}: no object")
    return found


def _last_report(file: Path) -> tuple[dict[str, Any], float | None]:
    """Returns the finite numbers in the last whole line of metrics and when the file was written, if there is one."""
    try:
        with file.open("rb") as content:
            written = os.fstat(content.fileno())
            content.seek(max(0, written.st_size - _TAIL))
            lines = content.read().splitlines()
    except OSError:
        return {}, None
    for line in reversed(lines):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(line)
            if isinstance(found, dict) and isinstance(found.get("step"), int | float):
                numbers = {key: float(x) for key, x in found.items() if isinstance(x, int | float)}
                return {k: x for k, x in numbers.items() if math.isfinite(x)}, written.st_mtime
    return {}, None


def printable(text: str) -> str:
    """Returns a text in one line that moves no cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _size(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_size
    return total
