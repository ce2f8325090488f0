"""Errors a person can act on: one line saying what was given, what was expected, and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST = 40
"""Names that a message lists."""


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


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Returns the error for a name that is not in a table; of a long one it shows the beginning."""
    names = list(known)
    close = nearest(name, names)
    hint = f" (nearest: {close})" if close else ""
    shown = ", ".join(names[:MOST]) + (f", ... ({len(names)} in all)" if len(names) > MOST else "")
    return InputError(f"unknown {kind} {name!r}: expected one of {shown}{hint}")
