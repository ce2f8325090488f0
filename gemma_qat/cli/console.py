"""What a person watching sees: progress bars on a terminal; elsewhere a line a tenth of the way, seconds apart."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gemma_qat.cli.secrets import safe, safe_values
from gemma_qat.errors import InputError

Report = Callable[[str, int, int], None]


def quiet() -> None:
    """Keeps libraries from printing the tracebacks of what they then raise, which is said in one line.

    Tracebacks that are printed hold no secrets.
    """
    for name in ("absl", "asyncio"):  # Orbax logs under the first, and leaves tasks to the second.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unless_left_behind
    sys.excepthook = trace


def _unless_left_behind(raised: Any) -> None:
    # When one array of a checkpoint cannot be read or written, which is said, others fail or end after the loop that
    # waited for them all is gone, and nobody is left to be told.
    code = getattr(raised.object, "cr_code", None)
    of_orbax = code is not None and "orbax" in Path(code.co_filename).parts
    if not of_orbax and str(raised.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(raised)


def say(error: BaseException) -> None:
    """Prints an error in one line, without secrets."""
    print(safe(f"gemma-qat: error: {' '.join(str(error).split())}"), file=sys.stderr, flush=True)


def trace(kind: type[BaseException], error: BaseException, where: Any) -> None:
    """Prints a traceback without secrets, as `sys.excepthook` is called."""
    text = "".join(traceback.format_exception(kind, error, where))
    print(safe(text), file=sys.stderr, end="", flush=True)


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """Adds --tokenizer, as every verb that reads text for a model has it."""
    parser.add_argument(
        "--tokenizer", default=None,
        help="SentencePiece model, tokenizer.json, or a directory that has one (default: the checkpoint's own)",
    )  # fmt: skip


def tokenizer_for(file: str | None, model: str, vocab: int) -> Any:
    """Returns the tokenizer in `file`; without one, that which travels with the checkpoint `model`.

    Raises: FileNotFoundError; InputError when there is none, or its pieces are not the vocabulary of `model`.
    """
    from gemma_qat import api
    from gemma_qat.data.tokenizer import Tokenizer, tokenizer_among

    found = Path(file) if file else tokenizer_among(api.companions_of(model).files)
    if found is None:
        raise InputError(f"{model}: no tokenizer lies beside it; give --tokenizer FILE")
    tokenizer = Tokenizer.load(found)
    if tokenizer.vocab_size != vocab:
        raise InputError(
            f"{found}: {tokenizer.vocab_size} pieces, but {model} has a vocabulary of {vocab}"
        )
    return tokenizer


@contextlib.contextmanager
def progress(told: str = "") -> Iterator[Report]:
    """Gives a function (description, done, total) that shows how far each long part is.

    What is printed meanwhile stands above the bars. `told` describes a part that prints lines of its own: where nobody
    watches, they are enough.
    """
    if sys.stdout.isatty():
        with _bars() as report:
            yield _safely(report)
    else:
        yield _safely(_lines(told))


def _safely(report: Report) -> Report:
    """Shows no secrets: a description may hold the name of a file."""
    named: dict[str, str] = {}

    def reported(description: str, done: int, total: int) -> None:
        if description not in named:
            named[description] = safe(description)
        report(named[description], done, total)

    return reported


@contextlib.contextmanager
def _bars() -> Iterator[Report]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    tasks = {}
    with Progress(*columns) as bars:

        def report(description: str, done: int, total: int) -> None:
            if description not in tasks:
                tasks[description] = bars.add_task(description, total=total)
            bars.update(tasks[description], completed=done, total=total)

        yield report


@contextlib.contextmanager
def transfer() -> Iterator[Report]:
    """Gives a function (description, done, total) that shows how many bytes have passed, and how many a second."""
    if not sys.stdout.isatty():
        yield _rates()
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description:<12}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns) as bars:
        task = bars.add_task("", total=None)
        yield lambda description, done, total: bars.update(
            task, description=description, completed=done, total=total
        )


def _rates() -> Report:
    first: list[tuple[float, int]] = []
    shown = [0]

    def report(description: str, done: int, total: int) -> None:
        now = time.monotonic()
        # The first report is where a resumed conversion stands: its bytes did not pass now.
        start, before = first[0] if first else (now, done)
        first[:] = [(start, before)]
        tenth = 10 * done // max(total, 1)
        if tenth != shown[0]:
            shown[0] = tenth
            rate = (done - before) / 1e9 / max(now - start, 1e-9)
            print(
                f"{description}: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate:.2f} GB/s",
                flush=True,
            )

    return report


PACE = 5.0
"""Seconds between two lines about one part of the work, where nobody watches."""


def _lines(told: str) -> Report:
    shown: dict[str, tuple[int, float]] = {}

    def report(description: str, done: int, total: int) -> None:
        tenth, now = 10 * done // max(total, 1), time.monotonic()
        before, since = shown.setdefault(description, (0, now))
        if description == told or not (done >= total or (tenth > before and now >= since + PACE)):
            return
        shown[description] = (tenth if done < total else 0, now)  # a part may come again
        print(f"{description}: {done} of {total}", flush=True)

    return report


@contextlib.contextmanager
def silent() -> Iterator[Report]:
    """Gives a function that shows nothing, for all but one of several processes."""
    yield lambda description, done, total: None


def writable(path: str | None) -> None:
    """Refuses, before long work, a file that could not be written after it.

    Raises: InputError when its directory is not there or cannot be written to, or a directory has its name.
    """
    import os

    from gemma_qat.errors import InputError

    if path is None:
        return
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise InputError(f"{path}: no such directory to write it in")
    if Path(path).is_dir():
        raise InputError(f"{path}: a directory, the name of a file to write expected")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{path}: its directory cannot be written to")


def keep_json(path: str | None, found: Any) -> None:
    """Writes what long work found, without secrets, whole or not at all, and before it is printed: a pipe may close."""
    from gemma_qat.checkpoint.appear import appearing_file
    from gemma_qat.checkpoint.store import write_json

    if path is not None:
        with appearing_file(Path(path)) as file:
            write_json(file, safe_values(found))
