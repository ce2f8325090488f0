"""The backends of packed contractions and of attention over codes: what each takes, and why one was chosen.

A backend is a row: where it runs, what it does, and what it refuses, in words. `choose` takes the first row of a
platform that takes the problem; the definition takes everything.

Kernels that are compiled for one kind of processor run elsewhere too, where they are asked for by name (`using`): jax
interprets them, slowly, which is how they are tested. Which it is goes by the platform a program is lowered for and
not by the one it is lowered on, so that a machine without a TPU can compile for one: `Choice.run` says it to the
operation, for each platform of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from gemma_qat.errors import InputError, unknown
from gemma_qat.kernels import (
    blocked,
    blocked_attend,
    gpu,
    gpu_attend,
    reference,
    tpu_attend,
    tpu_blocks,
    tpu_grouped,
    tpu_products,
    tpu_top,
)
from gemma_qat.kernels.cached import Cached
from gemma_qat.kernels.problem import MANY_ROWS, Problem


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Backend:
    """A row of the table; equal to none but itself."""

    name: str
    platforms: tuple[str, ...]
    """cpu, tpu, cuda, ...; empty: all."""
    operations: dict[str, Callable[..., Any]]
    """By name, called as those of `reference`."""
    refuses: Callable[[str, Problem], str | None]
    """refuses(operation, problem): why it does not take this contraction; None when it does."""
    refuses_cached: Callable[[Cached], str | None] = lambda problem: None
    """The same of attention over a cache of codes."""
    interpreted: bool = False
    """Whether its operations take `interpret`, and so run on platforms that are not its own."""

    def why_not(self, operation: str, problem: Problem | Cached) -> str | None:
        """Returns why it does not take a problem; None when it does."""
        if operation not in self.operations:
            return f"{self.name} has no {operation}"
        no = (
            self.refuses_cached(problem)
            if isinstance(problem, Cached)
            else self.refuses(operation, problem)
        )
        return None if no is None else f"{self.name}: {no}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A backend, and why it and none before it."""

    backend: Backend
    why: str
    interpret: bool = False
    """Whether its kernels have to be interpreted: it was asked for by name on a platform that is not its own."""

    def run(self, operation: str) -> Callable[..., Any]:
        """Returns the operation."""
        function = self.backend.operations[operation]
        return functools.partial(function, interpret=True) if self.interpret else function


def many_rows(operation: str, problem: Problem) -> str | None:
    """Refuses the rows of a prefill."""
    if operation != "top" and problem.rows > MANY_ROWS:
        return f"{problem.rows} rows, at most {MANY_ROWS}: bound by arithmetic"
    return None


BACKENDS: tuple[Backend, ...] = (
    Backend(
        name="gpu", platforms=("cuda",), refuses=gpu.refuses, refuses_cached=gpu_attend.refuses,
        operations=gpu.OPERATIONS,
    ),
    Backend(
        name="blocked", platforms=("cpu",), refuses=many_rows,
        operations={
            "matmul": blocked.matmul, "integer_matmul": blocked.integer_matmul,
            "grouped_matmul": blocked.grouped_matmul,
            "integer_grouped_matmul": blocked.integer_grouped_matmul, "top": blocked.top,
            "attend": blocked_attend.attend,
        },
    ),
    Backend(
        name="tpu", platforms=("tpu",), refuses=tpu_blocks.refuses,
        refuses_cached=tpu_attend.refuses, interpreted=True,
        operations={
            "matmul": tpu_products.matmul, "integer_matmul": tpu_products.integer_matmul,
            "grouped_matmul": tpu_grouped.grouped_matmul,
            "integer_grouped_matmul": tpu_grouped.integer_grouped_matmul, "top": tpu_top.top,
            "attend": tpu_attend.attend,
        },
    ),
    Backend(
        name="reference", platforms=(), refuses=lambda operation, problem: None,
        operations={
            "matmul": reference.matmul, "integer_matmul": reference.integer_matmul,
            "grouped_matmul": reference.grouped_matmul,
            "integer_grouped_matmul": reference.integer_grouped_matmul, "top": reference.top,
            "attend": reference.attend,
        },
    ),
)  # fmt: skip


def several_devices(problem: Problem | Cached) -> str | None:
    """Refuses, for every kernel, arrays that several devices hold: of those XLA cuts only the definition."""
    return f"arrays of {problem.devices} devices" if problem.devices > 1 else None


PLATFORMS = ("cpu", "tpu", "cuda")
"""Those for which a program may be lowered; a backend is chosen for each when it is traced."""

_forced: list[str] = []


@contextlib.contextmanager
def using(name: str | None) -> Iterator[None]:
    """Uses one backend, whatever the platform, in what is traced inside; None changes nothing.

    A function that was traced before is not traced again for it: whoever jits makes the name part of what is static.

    Raises: InputError when there is none of that name.
    """
    names = [backend.name for backend in BACKENDS]
    if name is not None and name not in names:
        raise unknown("backend", name, names)
    _forced.append(name or (_forced[-1] if _forced else ""))
    try:
        yield
    finally:
        _forced.pop()


def choose(operation: str, problem: Problem | Cached, platform: str) -> Choice:
    """Returns the backend for a problem on a platform, and why.

    Raises: InputError for a backend that was asked for (`using`) and refuses.
    """
    forced = _forced[-1] if _forced else ""
    passed: list[str] = []
    for backend in BACKENDS:
        if forced and backend.name != forced:
            continue
        if not forced and backend.platforms and platform not in backend.platforms:
            continue
        no = several_devices(problem) if backend.platforms else None
        no = f"{backend.name}: {no}" if no else backend.why_not(operation, problem)
        if no is None:
            return Choice(
                backend=backend, why="; ".join([*passed, f"{backend.name} takes it"]),
                interpret=backend.interpreted and platform not in backend.platforms,
            )  # fmt: skip
        passed.append(no)
    raise InputError(f"backend {forced} was asked for: {'; '.join(passed)}")
