"""Step time of every recipe over the float step, in one process and in turn: medians and their ratio."""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma_qat.models import SIZES, ModelConfig, fit, initialize
from gemma_qat.quant import RECIPE_NAMES, families_of
from gemma_qat.sharding import MeshConfig, make_mesh
from gemma_qat.train import OptimizerConfig, Student, make_optimizer, make_step, with_scales
from gemma_qat.train.state import start, state_shardings


def batch(vocab: int, rows: int, length: int) -> dict[str, np.ndarray]:
    """Random tokens, one segment a row."""
    tokens = np.random.default_rng(0).integers(0, vocab, (rows, length)).astype(np.int32)
    where = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy()
    return {
        "tokens": tokens, "segments": np.ones_like(tokens), "positions": where,
        "targets": np.roll(tokens, -1, axis=1), "weights": np.ones(tokens.shape, np.float32),
    }  # fmt: skip


def runner(model: Any, parameters: Any, data: dict[str, np.ndarray]) -> Any:
    """Returns a function that takes one step and returns its seconds."""
    student, mesh = Student.of(model), make_mesh(MeshConfig())
    leaves = student.stack(parameters)
    optimizer = make_optimizer(OptimizerConfig(), 1000, leaves)
    where = state_shardings(student, optimizer, leaves, mesh, "fsdp")
    step = make_step(student, optimizer, where, mesh, loss="ce")
    state = [start(optimizer, leaves, where)]

    def once() -> float:
        begin = time.perf_counter()
        state[0], metrics = step(state[0], data, None)
        jax.block_until_ready(metrics)
        return time.perf_counter() - begin

    once()
    return once


def main() -> None:
    """Measures and writes result.json and a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="tiny_e2b")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    size: ModelConfig = SIZES[arguments.size]
    data = batch(size.vocab_size, arguments.rows, arguments.length)
    reference = initialize(size, 0)
    steps = {"float": runner(size, reference, data)}
    for recipe in RECIPE_NAMES:
        if size.family not in families_of(recipe):
            continue
        scales = "recomputed" if recipe == "int8_training" else "learned"
        fitted = fit(size, recipe, scales)
        steps[recipe] = runner(fitted, with_scales(reference, fitted, "rtn", [data]), data)
        print(f"{recipe}: compiled", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, once in steps.items():
            seconds[name].append(once())
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    ratios = {name: round(value / median["float"], 2) for name, value in median.items()}
    result = {
        "size": size.name, "rows": arguments.rows, "length": arguments.length, "rounds": arguments.rounds,
        "float_seconds": round(median["float"], 4), "ratio_to_float": ratios, "jax": jax.__version__,
        "python": platform.python_version(), "device": jax.devices()[0].device_kind,
    }  # fmt: skip
    out = Path(__file__).with_name(f"result_{size.name}.json")
    out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
