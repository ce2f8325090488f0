"""Digests of packed weights; `python tests/frozen_layouts.py` writes them anew, which breaks every stored checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from gemma_qat.numerics import Grid, QArray, pack

GOLDEN = Path(__file__).parent / "golden" / "layouts.json"

GRIDS = {
    "q4_0": Grid(format="q4_0"), "q8_0": Grid(format="q8_0"), "q6_k": Grid(format="q6_k"),
    "int8": Grid(format="int8"), "int4": Grid(format="int4"), "int2": Grid(format="int2"),
    "int4 tile 32": Grid(format="int4", tile=32), "ternary": Grid(format="ternary"),
    "int2_no_zero": Grid(format="int2_no_zero"),
}  # fmt: skip

WEIGHTS = {
    "matrix [R, O]": ((256, 6), (0,)),
    "heads [D, N, H]": ((256, 2, 3), (0,)),
    "to the residual [N, H, D]": ((2, 128, 5), (0, 1)),
    "experts [E, R, O]": ((3, 256, 4), (1,)),
    "table [V, D]": ((7, 256), (1,)),
}


def digests() -> dict[str, str]:
    """Returns a digest of words, scales and their shapes for every grid and weight, from codes that count up."""
    out = {}
    for grid_name, grid in GRIDS.items():
        for name, (shape, reduced) in WEIGHTS.items():
            fmt = grid.number
            span = fmt.code_max - fmt.code_min + 1
            codes = (np.arange(np.prod(shape)) * 7 % span + fmt.code_min).astype(np.int8)
            tiles = list(shape)
            for axis in reduced[1:]:
                del tiles[axis]
            tiles[reduced[0]] = grid.tiles(int(np.prod([shape[axis] for axis in reduced])))
            scale = np.arange(1, np.prod(tiles) + 1, dtype=np.float32).reshape(tiles) / 64
            q = QArray(
                codes=jnp.asarray(codes.reshape(shape)), scale=jnp.asarray(scale.astype(grid.scale_dtype)), grid=grid, reduced=reduced
            )  # fmt: skip
            packed = pack(q)
            words, scale = np.asarray(packed.words), np.asarray(packed.scale)
            raw = words.tobytes() + scale.tobytes() + repr((words.shape, scale.shape)).encode()
            out[f"{grid_name}, {name}"] = hashlib.sha256(raw).hexdigest()[:16]
    return out


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(digests(), indent=1) + "\n", "utf-8")
