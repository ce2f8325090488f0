"""Decodes from a random packed checkpoint of a size and prints how much memory that takes.

    python experiments/decode_memory/measure.py --size e2b --recipe mobile --directory /tmp/decode

Random words, scales that keep activations of ordinary size, and a tokenizer of as many made-up pieces are written part
by part, as a conversion writes them; then, each in a process of its own: the interpreter with what the command imports,
and `gemma-qat decode`. Peak memory is the kernel's (ru_maxrss). The directory is removed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma_qat.checkpoint.manifest import Manifest
from gemma_qat.checkpoint.native import abstract_packed
from gemma_qat.checkpoint.store import packed_arrays, save_part, write_json
from gemma_qat.models import abstract_parameters, declare, fit, float_parameters, size_named

PART = 2**29
"""Bytes of a part; a larger array has one of its own."""

IMPORTS = "import jax, orbax.checkpoint, gemma_qat.api, gemma_qat.cli.decode; jax.devices()"


def write_packed(directory: Path, size: str, recipe: str) -> int:
    """Writes a packed checkpoint and a tokenizer; returns the bytes of words and scales."""
    fitted = fit(size_named(size), recipe)
    manifest = Manifest(
        kind="packed", config=fitted.config, recipe=fitted.recipe, plans=fitted.plans
    )
    declared = declare(fitted.config)
    rng = np.random.default_rng(0)
    floats = {}
    for path, leaf in float_parameters(
        abstract_parameters(fitted.config, fitted.plans), fitted
    ).items():
        parameter = declared.get(path)
        if parameter is None:  # a static scale
            floats[path] = np.full(leaf.shape, 0.1, np.float32)
        elif parameter.init == "constant":
            floats[path] = np.full(leaf.shape, parameter.init_scale, np.float32)
        else:
            drawn = rng.standard_normal(leaf.shape, np.float32)
            floats[path] = parameter.init_scale * drawn
    packed = abstract_packed(manifest)
    save_part(directory / "parameters", floats)
    part: dict[str, np.ndarray] = {}
    total = number = 0
    (directory / "quantized").mkdir()

    def flush() -> None:
        nonlocal number, part
        if part:
            save_part(directory / "quantized" / f"{number:05}", part)
            number, part = number + 1, {}

    for path, array in packed_arrays(packed).items():
        site = packed[path.rpartition("/")[0]]
        made = _array(path, array, site, declared[path.rpartition("/")[0]].init_scale, rng)
        if part and sum(other.nbytes for other in part.values()) + made.nbytes > PART:
            flush()
        part[path] = made
        total += made.nbytes
    flush()
    write_json(directory / "manifest.json", manifest.to_json())
    _write_tokenizer(directory / "tokenizer.model", fitted.config.vocab_size)
    return total


def _array(path: str, array: Any, site: Any, spread: float, rng: np.random.Generator) -> np.ndarray:
    if path.endswith("/words"):
        return np.frombuffer(rng.bytes(int(np.prod(array.shape))), np.uint8).reshape(array.shape)
    codes = 2**site.grid.number.bits / 12**0.5  # standard deviation of equally likely codes
    return np.full(array.shape, spread / codes, array.dtype)


def _write_tokenizer(path: Path, pieces: int) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    special = [("<pad>", 3), ("</s>", 3), ("<s>", 3), ("<unk>", 2)]
    special += [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    for number in range(pieces):
        name, kind = special[number] if number < len(special) else (f"w{number}", 1)
        model.pieces.add(piece=name, score=-float(number), type=kind)
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = pieces
    for name, number in (("pad_id", 0), ("eos_id", 1), ("bos_id", 2), ("unk_id", 3)):
        setattr(model.trainer_spec, name, number)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(model.SerializeToString())


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


def main() -> None:
    """Writes, decodes, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="e2b")
    parser.add_argument("--recipe", default="mobile")
    parser.add_argument("--directory", type=Path, required=True, help="must not exist")
    parser.add_argument("decode", nargs="*", help="more arguments of gemma-qat decode, after --")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True)
    try:
        # In a process of its own: a child starts with its parent's peak.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            given = (arguments.directory, arguments.size, arguments.recipe)
            total = pool.apply(write_packed, given)
        print(f"jax {jax.__version__}, {arguments.size} {arguments.recipe}: "
              f"{total / 1e9:.2f} GB of words and scales", flush=True)  # fmt: skip
        empty, _ = peak([sys.executable, "-c", IMPORTS])
        command = [sys.executable, "-m", "gemma_qat", "decode", "--ckpt", str(arguments.directory)]
        command += ["--tokenizer", str(arguments.directory / "tokenizer.model")]
        command += ["--prompt", "def main(", "--max-new-tokens", "8", "--stats", *arguments.decode]
        most, seconds = peak(command)
        print(f"interpreter {empty:.2f} GB; decoding {most:.2f} GB at most, {seconds:.0f} s")
    finally:
        shutil.rmtree(arguments.directory, ignore_errors=True)


if __name__ == "__main__":
    main()
