"""E4B on the weight grids of the mobile schema: learned scales from an MSE start, the float checkpoint's
probabilities as targets.

Set `start` to the float checkpoint. Learning rates of 2e-5 to 1e-4 at 2 bits are what published fine-tunes of
this kind use.
"""

import dataclasses

from gemma_qat.config import DataConfig, ExperimentConfig, check_variant
from gemma_qat.train import OptimizerConfig, TrainConfig

RECIPE = "mobile"
CONFIG = ExperimentConfig(
    name=f"e4b_{RECIPE}",
    model="e4b",
    recipe=RECIPE,
    data=DataConfig(
        kind="jsonl", path="data/train.jsonl", tokenizer="data/tokenizer.model", length=4096
    ),
    optimizer=OptimizerConfig(learning_rate=1e-4, scale_learning_rate=1e-4, warmup=100),
    train=TrainConfig(steps=5000, batch_size=256, loss="kl", save_every=500, loss_chunk=512),
)


def get_config(variant: str = "default") -> ExperimentConfig:
    check_variant(variant)
    if variant == "default":
        return CONFIG
    return dataclasses.replace(
        CONFIG,
        name=f"tiny_e4b_{RECIPE}",
        model="tiny_e4b",
        data=DataConfig(kind="stdlib"),
        optimizer=OptimizerConfig(warmup=2),
        train=TrainConfig(
            steps=6, batch_size=4, loss="ce", log_every=2, save_every=3, loss_chunk=64
        ),
    )
