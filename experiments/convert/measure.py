"""Converts a random checkpoint of a size and prints how much memory and time that takes.

    python experiments/convert/measure.py --size e2b --directory /tmp/convert

Random bfloat16 numbers in shards of about 2 GB, written tensor by tensor; then, each in a process of its own: the
interpreter with what the command imports, and `gemma-qat convert`. Peak memory is the kernel's (ru_maxrss). At the end
every array is read back and compared with the digest of what was read from the source. The directory is removed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from gemma_qat.checkpoint.maps import foreign
from gemma_qat.checkpoint.safetensors_file import of_leaf, write_file
from gemma_qat.checkpoint.source import Leaf
from gemma_qat.checkpoint.store import parts_of, read_manifest, restore_arrays
from gemma_qat.convert.parts import digest
from gemma_qat.export.hub_config import config_json
from gemma_qat.models import ModelConfig, declare, size_named

SHARD = 2 * 10**9
"""Bytes; a larger tensor has a shard of its own."""

IMPORTS = "import jax, orbax.checkpoint, gemma_qat.api, gemma_qat.cli.convert; jax.devices()"


def random_leaf(name: str, shape: tuple[int, ...], seed: int) -> Leaf:
    """Returns a tensor of random bits whose exponents are those of ordinary weights."""
    size = int(np.prod(shape))

    def read() -> np.ndarray:
        bits = np.frombuffer(bytearray(np.random.default_rng(seed).bytes(2 * size)), np.uint16)
        bits &= 0x87FF  # sign, three bits of the exponent, fraction
        bits |= 0x3800  # 2^-15 and up
        return bits.view(ml_dtypes.bfloat16).reshape(shape)

    return Leaf(path=name, shape=shape, dtype="bfloat16", bytes=2 * size, read=read)


def write_source(directory: Path, config: ModelConfig) -> int:
    """Writes a released checkpoint's files with random numbers; returns their bytes."""
    shapes = {}
    for parameter in declare(config).values():
        place = foreign(parameter)
        shapes[f"model.language_model.{place.name}"] = place.move.shape(parameter)
    leaves = [random_leaf(name, shape, seed) for seed, (name, shape) in enumerate(shapes.items())]
    shards: list[list[Leaf]] = [[]]
    for leaf in leaves:
        if shards[-1] and sum(other.bytes for other in shards[-1]) + leaf.bytes > SHARD:
            shards.append([])
        shards[-1].append(leaf)
    directory.mkdir(parents=True)
    where = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(directory / name, [of_leaf(leaf) for leaf in shard])
        where |= {leaf.path: name for leaf in shard}
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({"text_config": config_json(config, "BF16")}))
    return sum(leaf.bytes for leaf in leaves)


def peak(command: list[str]) -> tuple[float, float]:
    """Runs a command; returns (peak GB of memory, seconds).

    Raises: SystemExit when it fails.
    """
    start = time.monotonic()
    child = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: failed")
    return usage.ru_maxrss * 1024 / 1e9, time.monotonic() - start


def differing(out: Path) -> tuple[int, int]:
    """Returns (arrays that are not what was read from the source, arrays), part by part."""
    origin = read_manifest(out).origin
    assert origin is not None
    wrong = seen = 0
    for part in parts_of(out / "parameters"):
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(part.absolute()).item_metadata.tree
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        paths = {"/".join(key.key for key in keys): leaf for keys, leaf in leaves}
        wanted = {p: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for p, leaf in paths.items()}
        for path, array in restore_arrays(part, wanted).items():
            wrong += digest(np.asarray(array)) != origin.digests[path]
            seen += 1
    return wrong, seen


def main() -> None:
    """Writes, converts, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="e2b")
    parser.add_argument("--directory", type=Path, required=True, help="must not exist")
    arguments = parser.parse_args()
    config = size_named(arguments.size)
    source, out = arguments.directory / "hf", arguments.directory / "out"
    try:
        start = time.monotonic()
        # In a process of its own: a child starts with its parent's peak.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            size = pool.apply(write_source, (source, config))
        print(
            f"source: {size / 1e9:.2f} GB written in {time.monotonic() - start:.0f} s", flush=True
        )
        largest = 2 * max(parameter.size for parameter in declare(config).values())
        empty, _ = peak([sys.executable, "-c", IMPORTS])
        command = [sys.executable, "-m", "gemma_qat", "convert", str(source), "--out", str(out)]
        most, seconds = peak(command)
        print(f"interpreter {empty:.2f} GB, conversion {most - empty:.2f} GB above it, "
              f"largest tensor {largest / 1e9:.2f} GB, bound {max(2 * largest / 1e9, 2):.2f} GB")  # fmt: skip
        print(f"{seconds:.0f} s, {size / 1e9 / seconds:.2f} GB/s of the source", flush=True)
        shutil.rmtree(source)
        print("arrays that differ: {} of {}".format(*differing(out)))
    finally:
        shutil.rmtree(arguments.directory, ignore_errors=True)


if __name__ == "__main__":
    main()
