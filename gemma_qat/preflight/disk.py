"""Where a run writes: whether it can, how saves become complete there, and how much there has to be room for.

    saves   as many as lie there at once (the newest `keep`, those at multiples of `keep_every`, the one being written)
            times one save's arrays, less those that are there; compression, which leaves less, is not counted
    rows    the tokens of the documents that were read, for all documents, 3 bytes each (`data.looked_at`)
    logs    32 KiB a report: metrics.jsonl, TensorBoard's events

Free space is what the file system has; a quota, or a bucket's price, is not seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from gemma_qat.errors import InputError
from gemma_qat.train import TrainConfig

REPORT_BYTES = 32 * 2**10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """What one file system has and what a run writes on it.

    Units: bytes. `needed` by what it is for.
    """

    path: str
    free: int
    needed: dict[str, float]

    @property
    def total(self) -> float:
        """All that is written."""
        return sum(self.needed.values())


def try_directory(directory: Path) -> None:
    """Creates a directory, and in it one with a file, renames that, and takes all of it away again.

    Raises: InputError when any of it cannot be done.
    """
    made: list[Path] = []
    try:
        for path in reversed([p for p in (directory, *directory.parents) if not p.exists()]):
            path.mkdir()
            made.append(path)
        if not directory.is_dir():
            raise InputError(f"{directory}: a file, a directory expected")
        _try_rename(directory)
    except OSError as error:
        raise InputError(f"{directory}: cannot be written to ({error.strerror or error})") from None
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # not empty: another process writes there by now
                path.rmdir()


def _try_rename(directory: Path) -> None:
    trial = Path(tempfile.mkdtemp(prefix=".preflight-", dir=directory))
    moved = trial.with_name(f"{trial.name}.moved")
    try:
        (trial / "file").write_bytes(b"written")
        try:
            os.replace(trial, moved)
            read = (moved / "file").read_bytes()
        except OSError as error:
            raise InputError(
                f"{directory}: a directory in it cannot be renamed ({error.strerror or error}), which is how a save "
                "becomes complete; gcsfuse needs --rename-dir-limit or a bucket with a hierarchical namespace"
            ) from None
        if read != b"written":
            raise InputError(f"{directory}: what is written there is not what is read")
    finally:
        shutil.rmtree(trial, ignore_errors=True)
        shutil.rmtree(moved, ignore_errors=True)


def saves_to_come(train: TrainConfig, there: Sequence[int]) -> tuple[int, int]:
    """Returns how many saves are still written, and how many lie there at once at most, those there included."""
    begun, every = max(there, default=0), train.save_every
    due = [*range(begun - begun % every + every, train.steps, every)] if every else []
    due += [train.steps] if begun < train.steps else []
    present, most = sorted(there), len(there)
    for step in due:
        old = present[: -train.keep]
        kept = [one for one in old if train.keep_every and one % train.keep_every == 0]
        present = [*kept, *present[-train.keep :], step]
        most = max(most, len(present))
    return len(due), most


def spaces(needs: Iterable[tuple[str, Path, float]]) -> list[Space]:
    """Returns a row for each file system: needs are (what for, where, bytes), together where they share one."""
    found: dict[int, Space] = {}
    for what, where, size in needs:
        here = where.absolute()
        there = next(path for path in (here, *here.parents) if path.exists())
        device = there.stat().st_dev
        if device not in found:
            found[device] = Space(path=str(there), free=shutil.disk_usage(there).free, needed={})
        found[device].needed[what] = found[device].needed.get(what, 0.0) + size
    return list(found.values())
