"""Converts a random checkpoint of a size and prints how much memory and time that takes.

    python experiments/convert/measure.py --size e2b --directory /tmp/convert

Random bfloat16 numbers in shards of about 2 GB, tensor by tensor; then, each in a process of its own: the interpreter with
what the command imports, `gemma-qat convert`, and a reading of everything that was written, compared with the digests.
Peak memory is the kernel's (ru_maxrss). The directory is removed unless --keep is given.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemma_qat.checkpoint.maps import foreign
from gemma_qat.checkpoint.safetensors_file import write_tensors
from gemma_qat.checkpoint.source import Leaf
from gemma_qat.models import ModelConfig, declare, size_named

SHARD = 2 * 10**9
"""Bytes; a larger tensor has a shard of its own."""

IMPORTS = "import jax, orbax.checkpoint, gemma_qat.cli.convert, gemma_qat.api; jax.devices()"

VERIFY = """
import sys
from pathlib import Path
import jax
from gemma_qat.checkpoint.store import parts_of, read_manifest, restore_arrays
from gemma_qat.convert.parts import digest
import numpy as np, orbax.checkpoint as ocp
out = Path(sys.argv[1])
digests, seen = read_manifest(out).origin.digests, 0
for part in parts_of(out / "parameters"):
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(part.absolute()).item_metadata.tree
    flat = {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    for path, leaf in flat.items():
        one = restore_arrays(part, {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in flat.items()}) if not seen else one
"""


def random_leaf(name: str, shape: tuple[int, ...], seed: int) -> Leaf:
    """A bfloat16 tensor of random bits, exponents of ordinary weights."""
    size = int(np.prod(shape))

    def read() -> np.ndarray:
        bits = np.frombuffer(np.random.default_rng(seed).bytes(2 * size), np.uint16)
        # Sign and mantissa stay, the exponent becomes one of 2^-15 ... 1.
        return ((bits & 0x87FF) | 0x3800).view(ml_dtypes.bfloat16).reshape(shape)

    return Leaf(path=name, shape=shape, dtype="bfloat16", bytes=2 * size, read=read)
