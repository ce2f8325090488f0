"""A LiteRT model of a real size from random weights, drawn when they are written: how long, and how much memory.

python -m experiments.litert.size e2b [FOLDER]
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_qat.export.litert import LiteRTModel, write_model
from gemma_qat.models import Fitted, declare, fit, size_named, static_scale_paths
from gemma_qat.numerics import PackedArray
from gemma_qat.numerics.tiles import split_axes

GIB = 2**30


class Drawn:
    """An array that is drawn when it is looked at: all of it, or one layer of a table [V, L, ...]."""

    def __init__(
        self, shape: tuple[int, ...], make: Callable[[tuple[int, ...]], np.ndarray]
    ) -> None:
        self.shape, self._make = shape, make

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns the whole."""
        del copy
        whole = self._make(self.shape)
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def __getitem__(self, key: tuple[slice, int | slice]) -> np.ndarray:
        layers = (1,) if isinstance(key[1], slice) else ()
        return self._make((self.shape[0], *layers, *self.shape[2:]))


class Codes(Mapping[str, PackedArray]):
    """Random codes of every site, and scales as large as weights have them."""

    def __init__(self, fitted: Fitted, rng: np.random.Generator) -> None:
        self._fitted, self._rng = fitted, rng
        self._declared = declare(fitted.config)

    def __getitem__(self, path: str) -> PackedArray:
        parameter, grid = self._declared[path], self._fitted.plans[path].weight
        lead, length, trail = split_axes(parameter.shape, parameter.reduced)
        rows, bits = (*lead, *trail), grid.number.bits
        step = length**-0.5 / 2 ** (bits - 1)
        words = Drawn(
            (*rows, length * bits // 8), lambda shape: self._rng.integers(0, 256, shape, np.uint8)
        )
        scale = Drawn(
            (*rows, 1), lambda shape: self._rng.uniform(step, 2 * step, shape).astype(np.float32)
        )
        return PackedArray(
            words=words, scale=scale, grid=grid, shape=parameter.shape, reduced=parameter.reduced
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._fitted.plans)

    def __len__(self) -> int:
        return len(self._fitted.plans)


class Floats(Mapping[str, np.ndarray]):
    """Random floats as a model starts with, and static scales that fit them."""

    def __init__(self, fitted: Fitted, rng: np.random.Generator) -> None:
        self._rng, self._declared = rng, declare(fitted.config)
        floats = [path for path in self._declared if path not in fitted.plans]
        self._paths = [*floats, *static_scale_paths(fitted.plans)]

    def __getitem__(self, path: str) -> np.ndarray:
        if path not in self._declared:
            return np.full(1, 0.05, np.float32)
        parameter = self._declared[path]
        drawn = self._rng.standard_normal(parameter.shape, np.float32)
        return parameter.init_scale * (
            np.ones_like(drawn) if parameter.init == "constant" else drawn
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # Linux counts in KiB


def main(size: str, folder: Path) -> None:
    """Writes, loads and runs a model; prints seconds and the most memory so far."""
    fitted, rng = fit(size_named(size), "mobile"), np.random.default_rng(0)
    out = folder / f"{size}.tflite"
    print(f"{size}: {_memory():.2f} GiB before")
    before = time.perf_counter()
    written = write_model(
        out, fitted.config, fitted.plans, Codes(fitted, rng), Floats(fitted, rng), recipe="mobile"
    )
    seconds = time.perf_counter() - before
    print(f"{written:,} bytes written in {seconds:.1f} s, at most {_memory():.2f} GiB of memory")
    before = time.perf_counter()
    model = LiteRTModel(out, threads=2)
    caches = model.prefill(np.arange(1, 101, dtype=np.int32), model.empty())
    print(f"loaded, 100 tokens read: {time.perf_counter() - before:.1f} s, {_memory():.2f} GiB")
    spent = []
    for position in range(100, 110):
        before = time.perf_counter()
        _, caches = model.decode(position, position, caches)
        spent.append(time.perf_counter() - before)
    print(f"a token in {np.median(spent[2:]) * 1e3:.0f} ms (median of 8), {_memory():.2f} GiB")
    out.unlink()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "."))
