"""Numbers of an optimizer that no run can use: if these pass through, it ends in nan, or uphill, hours later."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gemma_qat.errors import InputError
from gemma_qat.train import BlockwiseConfig, OptimizerConfig


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": -1e-3}, "learning_rate=-0.001: at least 0 expected"),
        ({"learning_rate": math.nan}, "learning_rate=nan: at least 0 expected"),
        ({"learning_rate": math.inf}, "learning_rate=inf: at least 0 expected"),
        ({"scale_learning_rate": 1.0}, "scale_learning_rate=1.0: at least 0 and less than 1 expected"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("config", [OptimizerConfig, BlockwiseConfig])
def test_rates_that_cannot_train_are_one_line(config: Any, change: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        config(**change)
    assert config(learning_rate=0.0, scale_learning_rate=0.0).learning_rate == 0.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"warmup": -1}, "optimizer.warmup=-1: at least 0 expected"),
        ({"b1": 1.0}, "optimizer.b1=1.0: at least 0 and less than 1 expected"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay=-0.1"),
        ({"clip": 0.0}, "optimizer.clip=0.0: more than 0 expected, inf for no clipping"),
        ({"clip": math.nan}, "optimizer.clip=nan"),
    ],
)
def test_the_rest_of_an_optimizer(change: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        OptimizerConfig(**change)
    assert OptimizerConfig(clip=math.inf).clip == math.inf
