"""What quantization-aware training costs: step time and memory of one shape, recipe beside float, in turn.

All programs live in one process and take turns, one step each a round, so that whatever else the machine does falls on
all of them alike. A figure is the median over rounds; ratios of time are medians of those to the float step of the same
round, with their quartiles. The float step holds its narrow copy too.

Memory is what the compiler lays out for a step: arguments and temporaries, donated buffers counted once.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gemma_qat.models import Fitted, ModelConfig, RunOptions, fit, initialize
from gemma_qat.quant import families_of
from gemma_qat.sharding import MeshConfig, make_mesh
from gemma_qat.train import OptimizerConfig, TrainConfig, program_of, with_scales

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What is trained: a size, rows of tokens, and how the step is run.

    Units: rows a step, length in tokens, chunk in positions of a row (0: all).
    """

    size: ModelConfig
    rows: int = 8
    length: int = 128
    chunk: int = 0
    microbatches: int = 1
    options: RunOptions = RunOptions()
    mesh: MeshConfig = MeshConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """One program's figures. Units: seconds a step (median, least, most), bytes of a step at its peak."""

    name: str
    seconds: float
    least: float
    most: float
    bytes: int
    time_ratio: float
    time_ratio_low: float
    time_ratio_high: float
    memory_ratio: float


def bench_train(
    shape: Shape,
    recipes: Sequence[str],
    *,
    distils: Sequence[str] = (),
    rounds: int = 15,
    progress: Progress | None = None,
) -> list[Cost]:
    """Returns the cost of a float step, of every recipe's, and of `distils` beside a float teacher of the same size.

    Recipes that do not apply to the size are left out: `families_of` says which do.
    """
    fits = [name for name in recipes if shape.size.family in families_of(name)]
    TrainConfig(loss_chunk=shape.chunk).check_length(shape.length)
    kinds = [("float", "float", "ce"), *((name, name, "ce") for name in fits)]
    kinds += [(f"{name}, distilled", name, "kl") for name in distils if name in fits]
    say = progress or (lambda what, done, total: None)
    programs: dict[str, _Program] = {}
    for index, (label, recipe, loss) in enumerate(kinds):
        programs[label] = _Program(shape, recipe, loss)
        say("compile", index + 1, len(kinds))
    seconds: dict[str, list[float]] = {label: [] for label in programs}
    for round_ in range(rounds):
        for label, program in programs.items():
            seconds[label].append(program.step())
        say("measure", round_ + 1, rounds)
    costs = []
    for label, taken in seconds.items():
        low, ratio, high = np.quantile(
            np.divide(taken, seconds["float"]), (0.25, 0.5, 0.75)
        ).tolist()
        costs.append(
            Cost(
                name=label, seconds=float(np.median(taken)), least=min(taken), most=max(taken),
                time_ratio=ratio, time_ratio_low=low, time_ratio_high=high,
                bytes=programs[label].bytes, memory_ratio=programs[label].bytes / programs["float"].bytes,
            )
        )  # fmt: skip
    return costs


def random_batch(size: ModelConfig, rows: int, length: int) -> dict[str, np.ndarray]:
    """Returns rows of random tokens, one segment each, every position a target."""
    tokens = np.random.default_rng(0).integers(0, size.vocab_size, (rows, length)).astype(np.int32)
    where = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy()
    return {
        "tokens": tokens, "segments": np.ones_like(tokens), "positions": where,
        "targets": np.roll(tokens, -1, axis=1), "weights": np.ones(tokens.shape, np.float32),
    }  # fmt: skip


class _Program:
    """One compiled step with its state."""

    def __init__(self, shape: Shape, recipe: str, loss: str) -> None:
        self._batch = random_batch(shape.size, shape.rows, shape.length)
        reference = initialize(shape.size, 0)
        model: Fitted | ModelConfig = shape.size
        parameters: dict[str, Any] = reference
        if recipe != "float":
            # AQT recomputes its scales; everywhere else learned ones are the default of the configs.
            model = fit(
                shape.size, recipe, "recomputed" if recipe == "int8_training" else "learned"
            )
            parameters = with_scales(reference, model, "rtn", [self._batch])
        config = TrainConfig(
            batch_size=shape.rows,
            microbatches=shape.microbatches,
            loss=loss,
            loss_chunk=shape.chunk,
        )
        program = program_of(
            model, config, OptimizerConfig(), make_mesh(shape.mesh), mesh_config=shape.mesh,
            options=shape.options, teacher=shape.size if loss == "kl" else None,
        )  # fmt: skip
        guide = None
        if program.teacher:
            guide = program.ready_teacher(program.teacher.stack(reference))
        phase = config.phase(0)
        self._state = program.start(program.student.stack(parameters))
        self._fixed = program.fixed(self._state, guide, phase)
        step = program.step(phase)
        self._compiled = step.lower(self._state, self._batch, self._fixed).compile()
        memory = self._compiled.memory_analysis()
        self.bytes = int(
            memory.argument_size_in_bytes + memory.temp_size_in_bytes
            + memory.output_size_in_bytes - memory.alias_size_in_bytes
        )  # fmt: skip
        self.step()  # The first call also loads the program.

    def step(self) -> float:
        """Takes one step and returns its seconds."""
        begin = time.perf_counter()
        self._state, metrics = self._compiled(self._state, self._batch, self._fixed)
        jax.block_until_ready(metrics)
        return time.perf_counter() - begin
