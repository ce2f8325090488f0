"""Output of a process, a line at a time: raw into its log, with the process's number before it on the console."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from gemma_qat.launch.failures import MARK, REACH
from gemma_qat.redaction import is_secret_name

LONGEST = 65_536
"""Bytes of an unfinished line that are passed on without waiting for its end."""


def redacted(command: Sequence[str]) -> list[str]:
    """Returns a command that can be shown: *** for what follows a name such as hf_token= or --password."""
    shown: list[str] = []
    hides = False
    for word in command:
        name, equals, _ = word.partition("=")
        secret = is_secret_name(name) and not any(c.isspace() for c in name)
        if hides and not word.startswith("-"):
            shown.append("***")
        else:
            shown.append(f"{name}=***" if equals and secret else word)
        hides = secret and not equals and word.startswith("-")
    return shown


class Log:
    """A log that is appended to, and the last lines that went into it."""

    def __init__(self, file: Path) -> None:
        """Raises: OSError when it cannot be opened."""
        self._file: BinaryIO | None = file.open("ab", buffering=0)
        self.recent: collections.deque[str] = collections.deque(maxlen=2 * REACH)
        if self._file.tell():
            with file.open("rb") as before:
                before.seek(-1, 2)
                if before.read(1) != b"\n":  # Whoever wrote last was cut off in a line.
                    self._file.write(b"\n")

    def write(self, piece: bytes) -> None:
        """Writes; a disk that is full ends the log, not the run."""
        text = piece.decode("utf-8", "replace").rstrip("\r\n")
        if not text.startswith(MARK):
            self.recent.append(text[:2000])
        if self._file is not None:
            try:
                self._file.write(piece)
            except OSError as error:
                self.recent.append(f"(the log ends here: {error})")
                self._file = None

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


class Console:
    """One of our own two outputs. When nobody reads it any more it is left alone, and logs go on."""

    def __init__(self, stream: BinaryIO | None) -> None:
        """`stream` is None where it was closed before we began."""
        self._stream = stream

    def write(self, text: bytes) -> None:
        """Writes at once."""
        if self._stream is not None:
            try:
                self._stream.write(text)
                self._stream.flush()
            except OSError:
                self._stream = None


class Lines:
    """One output of one process. Pieces end with a newline, or with the carriage return of a bar that moves."""

    def __init__(self, log: Log, console: Console, prefix: bytes) -> None:
        self._log, self._console, self._prefix = log, console, prefix
        self._rest = b""
        self._begins = True

    def add(self, data: bytes) -> None:
        """Takes what was read and passes on what is finished."""
        *whole, self._rest = re.split(rb"(?<=\n)|(?<=\r)(?=[^\n])", self._rest + data)
        if len(self._rest) >= LONGEST:
            whole.append(self._rest)
            self._rest = b""
        for piece in whole:
            self._pass_on(piece)

    def end(self) -> None:
        """Passes on the last line, which has no end."""
        if self._rest:
            self._pass_on(self._rest if self._rest.endswith(b"\r") else self._rest + b"\n")
            self._rest = b""

    def _pass_on(self, piece: bytes) -> None:
        if piece:
            self._log.write(piece)
            self._console.write((self._prefix if self._begins else b"") + piece)
            self._begins = piece.endswith((b"\n", b"\r"))
