"""How fast packed operations run: time, bytes a second, and beside the same operation on floats, in turn.

A measurement calls an operation on several weights, one call after another inside one program, each waiting for the
one before: no weight is still in a cache when it is read again (but small ones, of which there are too few), and
starting a program costs next to nothing. Packed weights lie in a stack, where the model has them, and are read there;
float ones lie apart, since a slice of a stack would be copied before it is multiplied. Both programs take turns in one
process; figures are medians over rounds. The yardstick is a copy of a large array on the same device and process.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat import kernels
from gemma_qat.evals import bench_device
from gemma_qat.evals.bench_cases import KINDS, MOST_STACKED, Case, Side, cases_of
from gemma_qat.models import ModelConfig
from gemma_qat.numerics import PackedArray

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """One operation on one shape. Units: seconds for one call, bytes that it reads, bytes a second."""

    size: str
    kind: str
    """Of `bench_cases.KINDS`."""
    name: str
    dims: dict[str, int]
    format: str
    rows: int
    backend: str
    why: str
    seconds: float
    bytes: int
    bandwidth: float
    share: float
    """Of the measured bandwidth of a copy."""
    plain_dtype: str
    plain_seconds: float | None
    """None where its weights do not fit: `note` says so."""
    speedup: float | None
    """The time of the plain operation over this one's."""
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """How it is measured: rounds in turn, bytes that one of them reads, memory to stay within, the copy's bytes/s."""

    dtype: str
    rounds: int
    bytes: int
    memory: int
    bandwidth: float


def bench_decode(
    config: ModelConfig,
    formats: Sequence[str],
    batches: Sequence[int],
    measure: Measure,
    *,
    kinds: Sequence[str] = KINDS,
    cache_length: int = 4096,
    progress: Progress | None = None,
) -> list[Speed]:
    """Returns the speed of every operation on every shape of a model, in every format that it can have."""
    say = progress or (lambda what, done, total: None)
    cases = cases_of(config, kinds, formats, batches, measure.dtype, cache_length)
    out = []
    for number, case in enumerate(cases):
        say(f"{config.name}: operations", number, len(cases))
        out.append(_speed(config.name, case.make(), measure))
    say(f"{config.name}: operations", len(cases), len(cases))
    return out


def _speed(size: str, case: Case, measure: Measure) -> Speed:
    room = bench_device.SHARE * measure.memory
    packed = _Program(case.packed, case.choice.backend.name, case.inputs, case, measure, room / 2)
    programs = [packed]
    room -= packed.bytes
    what = f"the {measure.dtype} weight"
    note = bench_device.short_of(what, case.plain.bytes + packed.bytes, measure.memory)
    if not note:
        programs.append(_Program(case.plain, None, case.plain_inputs, case, measure, room))
    seconds, *other = in_turn([p.run for p in programs], measure.rounds)
    seconds /= packed.calls
    plain = other[0] / programs[1].calls if other else None
    return Speed(
        size=size, kind=case.kind, name=case.name, dims=case.dims, format=case.format,
        rows=case.rows, backend=case.choice.backend.name, why=case.choice.why, seconds=seconds,
        bytes=case.bytes, bandwidth=case.bytes / seconds,
        share=case.bytes / seconds / measure.bandwidth, plain_dtype=measure.dtype,
        plain_seconds=plain, speedup=None if plain is None else plain / seconds, note=note,
    )  # fmt: skip


def in_turn(programs: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Returns the median seconds of each program, which take turns; what compiles them is not counted."""
    for run in programs:
        jax.block_until_ready(run())
    taken: list[list[float]] = [[] for _ in programs]
    for _ in range(rounds):
        for run, times in zip(programs, taken, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - start)
    return [float(np.median(times)) for times in taken]


class _Program:
    """One side of a case with its weights, as many as are wanted and fit into `room` bytes."""

    def __init__(
        self, side: Side, backend: str | None, inputs: Any, case: Case, measure: Measure, room: float
    ) -> None:  # fmt: skip
        wanted = math.ceil(measure.bytes / side.bytes)
        count = max(1, min(wanted, side.most, int(room // side.bytes)))
        self.weights = side.make(jax.random.key(1, impl="rbg"), count)
        self.bytes = count * side.bytes
        read = side.bytes // case.turns
        repeats = min(math.ceil(measure.bytes / (count * read)), max(1, MOST_STACKED // count))
        self.calls = count * repeats
        self.run = functools.partial(
            _calls, side.call, backend, count, repeats, inputs, self.weights
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _calls(
    call: Callable[..., jax.Array], backend: str | None, count: int, repeats: int,
    inputs: tuple[jax.Array, ...], weights: Any,
) -> jax.Array:  # fmt: skip
    """`repeats` times a call on each of `count` weights, by one backend, each waiting for the one before."""
    x, *rest = inputs

    def on_stack(number: jax.Array, x: jax.Array) -> jax.Array:
        weight = dataclasses.replace(weights, layer=number % count)
        return _after(x, call(weight, number, x, *rest))

    def on_all(number: jax.Array, x: jax.Array) -> jax.Array:
        for place, weight in enumerate(weights):
            # Or what is made of a weight alone, unpacked codes above all, would be made once, before the loop.
            x, weight = jax.lax.optimization_barrier((x, weight))
            x = _after(x, call(weight, number * count + place, x, *rest))
        return x

    with kernels.using(backend):
        if isinstance(weights, PackedArray):
            return jax.lax.fori_loop(0, count * repeats, on_stack, x)
        return jax.lax.fori_loop(0, repeats, on_all, x)


def _after(x: jax.Array, out: jax.Array) -> jax.Array:
    """Returns `x`, but not before `out` is there: the compiler cannot know that what is added is 0."""
    most = jnp.max(out)
    if jnp.issubdtype(out.dtype, jnp.integer):
        return x + (most == jnp.iinfo(out.dtype).min).astype(x.dtype)
    return x + (most * 0).astype(x.dtype)
