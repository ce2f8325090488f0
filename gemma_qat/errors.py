"""Errors a person can act on: one line saying what was given, what was expected, and the nearest valid name."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path

MOST = 40
"""Names that a message lists."""

RETRY = 75
"""EX_TEMPFAIL of sysexits.h: saved and stopped, start the same command again. Launchers map it to a requeue."""


class InputError(ValueError):
    """Bad input from a person; the command line prints it in one line and exits with status 2."""


class Stopped(Exception):
    """A run ended early because it was asked to, and everything up to here is saved; exit status 75 (try again).

    `step`: how many steps are done.
    """

    def __init__(self, message: str, step: int = 0) -> None:
        super().__init__(message)
        self.step = step


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Returns up to `n` known names that look like `name`, joined by commas; empty when none does."""
    return ", ".join(difflib.get_close_matches(name, list(known), n=n, cutoff=0.4))


def beside(path: Path) -> str:
    """Returns a hint at what lies where a path is missing and is called like it; empty when nothing is."""
    try:
        close = nearest(path.name, (other.name for other in path.parent.iterdir()))
    except OSError:
        close = ""
    return f" (nearest: {close})" if close else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Returns the error for a name that is not in a table; of a long one it shows the beginning."""
    names = list(known)
    close = nearest(name, names)
    hint = f" (nearest: {close})" if close else ""
    shown = ", ".join(names[:MOST]) + (f", ... ({len(names)} in all)" if len(names) > MOST else "")
    return InputError(f"unknown {kind} {name!r}: expected one of {shown}{hint}")


def refuse_outside(
    name: str, value: int | float, least: int | float, below: int | float = math.inf
) -> None:
    """Refuses a number of a config that is less than `least`, not less than `below`, or nan.

    Raises: InputError.
    """
    if not least <= value < below:
        end = "" if below == math.inf else f" and less than {below:g}"
        raise InputError(f"{name}={value}: at least {least:g}{end} expected")


_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|(gs|s3|az|abfss?|hdfs|hf|https?):/", re.IGNORECASE)
"""A path that went through `pathlib` has lost one of its slashes: then only names of stores are told from folders."""


def refuse_address(path: object) -> None:
    """Refuses an address of an object store or a server where a path is expected, before it is taken for a folder.

    Credentials in it, and what follows a question mark, are not repeated.
    Raises: InputError.
    """
    text = str(path)
    if _ADDRESS.match(text) is None:
        return
    shown = re.sub(r"(:/+)[^/@]*@", r"\1", text.partition("?")[0])
    raise InputError(
        f"{shown}: an address, a path expected: mount the bucket (gcsfuse, Mountpoint for Amazon S3) on every host and "
        "give the path there"
    )
