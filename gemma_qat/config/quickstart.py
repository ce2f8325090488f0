"""The quickstart, as data. Learning rates were chosen on the validation split; the test split was not looked at.

Units: steps are updates of `batch_size` rows of `length` tokens.
"""

from __future__ import annotations

import dataclasses

from gemma_qat.ptq import CalibrationConfig
from gemma_qat.sharding import MeshConfig
from gemma_qat.train import OptimizerConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """Training of one recipe from the float checkpoint."""

    train: TrainConfig
    optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Everything the quickstart does.

    `cross_entropy` adds, per recipe, training on plain cross-entropy beside a float control trained the same
    extra steps.
    `calibration` finds the static scales of activations, keys and values, for PTQ and as QAT's start;
    `learn_activations` trains them on.
    `rows_per_document` caps the held-out rows of each file (0: all of them). `draws` are bootstrap resamples.
    """

    directory: str = "runs/quickstart"
    model: str = "tiny_e2b"
    seed: int = 0
    vocab_size: int = 1024
    length: int = 128
    rows_per_document: int = 32
    new_tokens: int = 48
    draws: int = 2000
    cross_entropy: bool = False
    scale_init: str = "mse"
    calibration: CalibrationConfig = CalibrationConfig()
    learn_activations: bool = True
    mesh: MeshConfig = MeshConfig()
    float_reference: RecipeConfig = RecipeConfig(
        train=TrainConfig(steps=1000, batch_size=8, loss="ce", log_every=20),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=50),
    )
    q4_0: RecipeConfig = RecipeConfig(
        train=TrainConfig(steps=220, batch_size=8, loss="kl", log_every=10, seed=1),
        optimizer=OptimizerConfig(learning_rate=3e-4, scale_learning_rate=1e-3, warmup=20),
    )
    mobile: RecipeConfig = RecipeConfig(
        train=TrainConfig(steps=220, batch_size=8, loss="kl", log_every=10, seed=1),
        optimizer=OptimizerConfig(learning_rate=1e-3, scale_learning_rate=5e-3, warmup=20),
    )
