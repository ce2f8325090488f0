"""What a check finds, gathered: one problem does not hide the next."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from gemma_qat.errors import InputError


class Findings:
    """Problems (it cannot start), warnings (it can, but), and notes on how something was found; a line each."""

    def __init__(self) -> None:
        """Begins with none."""
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.notes: list[str] = []

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """Keeps the error that ends the block, as the command line would print it, each once."""
        try:
            yield
        except (InputError, OSError) as error:
            said = str(error)
            if isinstance(error, OSError) and error.strerror:
                said = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
            self.problem(" ".join(said.split()))

    def problem(self, line: str) -> None:
        """Adds a problem unless it is known."""
        if line not in self.problems:
            self.problems.append(line)

    def warn(self, line: str) -> None:
        """Adds a warning."""
        self.warnings.append(line)
