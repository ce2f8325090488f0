"""The experiment of a size and a recipe, with the defaults that published runs of this kind used.

Targets are the float checkpoint's probabilities, scales start from a search for the least squared error and are
learned, weights do not decay. What depends on the recipe is how far training has to move the weights:

| narrowest matrix | learning rate | steps |
|---|---|---|
| 8 bits | 1e-5 | 2,000 |
| 4 bits | 2e-5 | 5,000 |
| 2 bits and ternary | 5e-5 | 10,000 |

Masters are float32, activations bfloat16, and each period of layers is computed again in the backward pass. Scales
learn in relative steps of 1e-4; static scales of activations stay as calibrated. `int8_training` recomputes its
scales at every step, as AQT does.

Sources: Gemma 3 technical report (arXiv 2503.19786): about 5,000 steps towards the float model's probabilities;
torchao's QAT recipes (lr 2e-5 at 4 bits); ParetoQ (arXiv 2502.02631): 2 bits and below rebuild the weights rather than
adjust them, and need more steps at higher rates.
"""

from __future__ import annotations

import dataclasses

from gemma_qat.config.experiment import DataConfig, ExperimentConfig
from gemma_qat.config.files import check_variant
from gemma_qat.models import RunOptions, fit, size_named
from gemma_qat.ptq import CalibrationConfig
from gemma_qat.train import OptimizerConfig, TrainConfig

_BY_BITS = {8: (1e-5, 2_000), 4: (2e-5, 5_000), 2: (5e-5, 10_000)}
"""Learning rate and steps by the bits of the narrowest matrix."""


def experiment(size: str, recipe: str, variant: str = "default") -> ExperimentConfig:
    """Returns the experiment of a full size and a recipe; `start` is left for the float checkpoint to train.

    Variant `tiny`: the same path on the size's twin, fresh parameters, the standard library's source, in seconds.
    Raises: InputError for an unknown size, recipe or variant, or a recipe that does not apply to the size.
    """
    check_variant(variant)
    plans = fit(size_named(size), recipe).plans
    layers = [plan for path, plan in plans.items() if path.startswith("layers/")]
    rate, steps = _BY_BITS[min(plan.weight.number.bits for plan in layers)]
    integer = any(plan.backward is not None for plan in layers)
    config = ExperimentConfig(
        name=f"{size}_{recipe}",
        model=size,
        recipe=recipe,
        scales="recomputed" if integer else "learned",
        data=DataConfig(
            kind="jsonl", path="data/train.jsonl", tokenizer="data/tokenizer.model", length=4096
        ),
        optimizer=OptimizerConfig(learning_rate=rate, scale_learning_rate=1e-4, warmup=100),
        train=TrainConfig(steps=steps, batch_size=256, loss="kl", save_every=500, loss_chunk=512),
        options=RunOptions(dtype="bfloat16", remat="full"),
    )
    return config if variant == "default" else _tiny(config)


def _tiny(config: ExperimentConfig) -> ExperimentConfig:
    return dataclasses.replace(
        config,
        name=f"tiny_{config.name}",
        model=f"tiny_{config.model}",
        calibration=CalibrationConfig(batches=2),
        data=DataConfig(kind="stdlib"),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=3e-4, warmup=2),
        train=TrainConfig(
            steps=6, batch_size=4, loss="ce", log_every=2, save_every=3, loss_chunk=64
        ),
        options=RunOptions(),
    )
