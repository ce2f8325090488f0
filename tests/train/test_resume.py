"""Training that is stopped and started again equals training that never stopped, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.checkpoint.native import load_quantized
from gemma_qat.errors import InputError
from gemma_qat.models import Fitted, ModelConfig, fit, initialize
from gemma_qat.models.capture import captured_codes, differing
from gemma_qat.train import OptimizerConfig, TrainConfig, Trained, train, with_scales

CONFIG = ModelConfig(
    name="two layers", layer_kinds=("sliding", "full"), vocab_size=64, width=32, query_heads=2, kv_heads=1,
    global_kv_heads=1, head_width=16, global_head_width=32, ffn_width=32, window=4, max_positions=64,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, scale_learning_rate=1e-3, warmup=2)


@pytest.fixture(scope="module")
def start() -> tuple[Fitted, dict[str, Any], dict[str, Any]]:
    reference = initialize(CONFIG, 0)
    fitted = fit(CONFIG, "q4_0", scales="learned")
    return fitted, reference, with_scales(reference, fitted, "mse")


@pytest.fixture(scope="module")
def run(start: Any, batches: Any) -> Callable[..., Trained]:
    fitted, reference, masters = start
    how = TrainConfig(steps=6, batch_size=2, loss="kl", log_every=1, save_every=2, keep=3)

    def begin(directory: Path, poison: int = -1) -> Trained:
        return train(
            fitted, masters, batches(poison), how, OPTIMIZER, teacher=(CONFIG, reference), directory=directory
        )  # fmt: skip

    return begin


@pytest.fixture(scope="module")
def whole(
    start: Any, run: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Trained, dict[str, np.ndarray]]:
    """The saves of a run that was never stopped, what it returned, and its teacher as it was before."""
    directory = tmp_path_factory.mktemp("whole")
    before = {path: np.array(leaf) for path, leaf in start[1].items()}
    return directory, run(directory), before


def test_resume_equals_not_stopping(whole: Any, run: Any, tmp_path: Path) -> None:
    directory, trained, _ = whole
    assert sorted(path.name for path in directory.iterdir()) == ["2", "4", "6"]
    shutil.copytree(directory, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "6")
    again = run(tmp_path / "stopped")
    assert again.curves == trained.curves
    for path, leaf in trained.parameters.items():
        np.testing.assert_array_equal(again.parameters[path], leaf, err_msg=path)


def test_every_save_holds_the_codes_of_its_masters(start: Any, whole: Any) -> None:
    directory, trained, _ = whole
    _, stored = load_quantized(directory / "6")
    assert differing(stored, captured_codes(trained.parameters, start[0], row_length=8)) == {
        "codes": 0,
        "scales": 0,
    }


def test_nan_stops_and_leaves_the_last_good_save(run: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="step 5: the loss is nan"):
        run(tmp_path, poison=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]


def test_a_save_of_another_model_is_refused(
    start: Any, whole: Any, batches: Any, tmp_path: Path
) -> None:
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    with pytest.raises(InputError, match="a checkpoint of another model or recipe"):
        how = TrainConfig(steps=8, batch_size=2)
        train(CONFIG, start[1], batches(), how, OPTIMIZER, directory=tmp_path)


def test_kl_without_a_teacher_is_refused(start: Any, batches: Any) -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        train(start[0], start[2], batches(), TrainConfig(steps=1, loss="kl"), OPTIMIZER)


def test_the_teacher_and_the_start_are_left_alone(start: Any, whole: Any) -> None:
    for path, leaf in whole[2].items():
        np.testing.assert_array_equal(start[1][path], leaf, err_msg=path)
    assert jnp.isfinite(start[2]["embed/table"]).all()
