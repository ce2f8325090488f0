"""Which of several processes failed first, from what each of them said last.

When one dies the others follow within seconds, each with an error about the one that is gone: the first by the clock
may be any of them, and clocks of hosts differ. So an error of one's own comes before a process that left no word, and
both before an error that only says that another is gone; the time decides among equals.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from gemma_qat.errors import InputError

Kind = Literal["own", "lost", "followed"]
RANK: dict[Kind, int] = {"own": 0, "lost": 1, "followed": 2}

OTHERS_GONE = re.compile(
    r"coordination.service|heartbeat|\bUNAVAILABLE\b|\bDEADLINE_EXCEEDED\b|\bgloo \w+ failed|\bby peer\b|socket closed"
    r"|connection (reset|refused|closed)|distributed service detected|another task|remote process",
    re.IGNORECASE,
)
"""What jax, gloo and NCCL say when a process they talk to is gone."""

TRACEBACK = "Traceback (most recent call last):"
REACH = 150
"""Lines before the end within which a traceback is what a process ended with."""
TAIL = 20
"""Lines that stand for a traceback where there is none."""
MARK = "=== "
"""Begins the lines of a log that are not the process's own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """One process that ended with neither 0 nor 75. `time` is in seconds since 1970, `said` its traceback."""

    process: int
    status: int
    time: float
    host: str
    kind: Kind
    said: tuple[str, ...]


def last_words(lines: Sequence[str]) -> tuple[str, ...]:
    """Returns the last traceback near the end with all that follows it; without one the last lines."""
    recent = lines[-REACH:]
    starts = [n for n, line in enumerate(recent) if line.startswith(TRACEBACK)]
    return tuple(recent[starts[-1] :] if starts else recent[-TAIL:])


def kind_of(said: Sequence[str]) -> Kind:
    """Returns "followed" when the error only says that another process is gone."""
    return "followed" if OTHERS_GONE.search(_telling(said)) else "own"


def _telling(said: Sequence[str]) -> str:
    """The line that names the error; all there is where none does."""
    if said and said[0].startswith(TRACEBACK):
        for line in said[1:]:
            if line.strip() and not line.startswith((" ", "\t")):
                return line
    errors = [line for line in said if line.startswith("gemma-qat: error:")]
    return errors[-1] if errors else "\n".join(said)


def in_order(failures: Iterable[Failure]) -> list[Failure]:
    """Returns them by kind, then by time: the first is the one to look at."""
    return sorted(failures, key=lambda f: (RANK[f.kind], f.time, f.process))


def told(failures: Sequence[Failure]) -> list[str]:
    """Returns the lines that tell which failed first and how, then the others in a line each."""
    first, *others = in_order(failures)
    return [
        f"process {first.process} failed first: {_how(first)}",
        *first.said,
        *(f"process {other.process}: {_how(other)}" for other in others),
    ]


def _how(failure: Failure) -> str:
    if failure.kind == "lost":
        return (
            f"its log has no end, last written {stamp(failure.time)}: it still runs, or it was killed together with "
            "the worker that watched it, or its host is gone"
        )
    why = " (another process was gone, or it was told to end)" if failure.kind == "followed" else ""
    return f"status {failure.status} at {stamp(failure.time)} on {failure.host}{why}"


def stamp(seconds: float) -> str:
    """Returns a time as logs have it, in UTC."""
    when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return when.isoformat(timespec="seconds").replace("+00:00", "Z")


def log_of(directory: Path, process: int) -> Path:
    """Where the output of a process is kept."""
    return directory / f"process-{process}.log"


def note_of(directory: Path, process: int) -> Path:
    """Where it is kept how a process failed; not there when it did not."""
    return directory / f"process-{process}.failed"


def keep(directory: Path, failure: Failure) -> None:
    """Writes how a process failed beside its log."""
    note = note_of(directory, failure.process)
    note.write_text(json.dumps(dataclasses.asdict(failure), indent=1) + "\n", "utf-8")


def failures_in(directory: Path) -> list[Failure]:
    """Returns what failed of the processes whose logs are in `directory`, in order.

    Raises: InputError when no log is there.
    """
    logs = sorted(directory.glob("process-*.log"))
    if not logs:
        raise InputError(f"{directory}: no logs of processes (process-0.log and so on) are there")
    found = []
    for log in logs:
        process = int(log.stem.removeprefix("process-"))
        note = note_of(directory, process)
        if note.is_file():
            said = json.loads(note.read_text("utf-8"))
            found.append(Failure(**said | {"said": tuple(said["said"])}))
        elif not (lines := _lines(log)) or not lines[-1].startswith(f"{MARK}ended"):
            words = last_words([line for line in lines if not line.startswith(MARK)])
            found.append(
                Failure(process=process, status=-1, time=log.stat().st_mtime, host="", kind="lost", said=words)
            )  # fmt: skip
    return in_order(found)


def _lines(log: Path) -> list[str]:
    """The last lines of a log, of its last session only."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 262_144))
        lines = file.read().decode("utf-8", "replace").splitlines()
    begun = [n for n, line in enumerate(lines) if line.startswith(f"{MARK}began")]
    return lines[begun[-1] :] if begun else lines
