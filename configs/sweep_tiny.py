"""PTQ against QAT on the tiny twin of E2B: a float reference first, then each recipe rounded and trained.

Minutes on a CPU; variant tiny, the same with few steps, about two minutes of one core. Nothing has to be downloaded.
"""

from dataclasses import replace

from gemma_qat.config import (
    DataConfig,
    ExperimentConfig,
    MeasureConfig,
    PtqCell,
    SweepConfig,
    TrainCell,
    check_variant,
    grid,
)
from gemma_qat.train import OptimizerConfig, TrainConfig


def get_sweep(variant: str = "default") -> SweepConfig:
    check_variant(variant)
    is_tiny = variant == "tiny"
    reference = ExperimentConfig(
        name="", model="tiny_e2b", data=DataConfig(kind="stdlib", length=128),
        train=TrainConfig(steps=20 if is_tiny else 600, batch_size=8, log_every=10),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=10 if is_tiny else 50),
    )  # fmt: skip
    cells: list[TrainCell | PtqCell] = [TrainCell(name="float", config=reference)]
    recipes = ("q4_0", "w4a16")
    for recipe in recipes:
        config = replace(reference, recipe=recipe, start="float")
        cells.append(PtqCell(name=f"{recipe}-mse", config=config, method="mse"))
    for name, at in grid(recipe=recipes, method=("qat",), seed=(1,) if is_tiny else (1, 2)):
        config = replace(
            reference, recipe=at["recipe"], start="float",
            train=replace(reference.train, loss="kl", seed=at["seed"], steps=10 if is_tiny else 200),
            optimizer=OptimizerConfig(learning_rate=3e-4, scale_learning_rate=1e-3, warmup=5),
        )  # fmt: skip
        cells.append(TrainCell(name=name, config=config))
    return SweepConfig(
        name="sweep_tiny" if is_tiny else "sweep", cells=tuple(cells), reference="float",
        evaluation=MeasureConfig(length=128, rows_per_document=2 if is_tiny else 32),
    )  # fmt: skip
