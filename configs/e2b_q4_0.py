"""E2B on the Q4_0 grid: learned scales from an MSE start, the float checkpoint's probabilities as targets.

Set `start` to the float checkpoint. 4-bit learning rates of 1e-5 to 2e-5 are what published fine-tunes of this
kind use.
"""

import dataclasses

from gemma_qat.config import DataConfig, ExperimentConfig, check_variant
from gemma_qat.train import OptimizerConfig, TrainConfig

RECIPE = "q4_0"
CONFIG = ExperimentConfig(
    name=f"e2b_{RECIPE}",
    model="e2b",
    recipe=RECIPE,
    data=DataConfig(
        kind="jsonl", path="data/train.jsonl", tokenizer="data/tokenizer.model", length=4096
    ),
    optimizer=OptimizerConfig(learning_rate=2e-5, scale_learning_rate=1e-4, warmup=100),
    train=TrainConfig(steps=5000, batch_size=256, loss="kl", save_every=500, loss_chunk=512),
)


def get_config(variant: str = "default") -> ExperimentConfig:
    check_variant(variant)
    if variant == "default":
        return CONFIG
    return dataclasses.replace(
        CONFIG,
        name=f"tiny_e2b_{RECIPE}",
        model="tiny_e2b",
        data=DataConfig(kind="stdlib"),
        optimizer=OptimizerConfig(warmup=2),
        train=TrainConfig(
            steps=6, batch_size=4, loss="ce", log_every=2, save_every=3, loss_chunk=64
        ),
    )
