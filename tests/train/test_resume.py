"""Training that is stopped and started again equals training that never stopped, bit for bit."""

from __future__ import annotations

import shutil
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


class Batches:
    """Batches that are a function of how many were taken."""

    def __init__(self, poison: int = -1) -> None:
        self.taken, self.poison = 0, poison

    def __next__(self) -> dict[str, np.ndarray]:
        self.taken += 1
        tokens = np.random.default_rng(self.taken).integers(0, 64, (2, 8)).astype(np.int32)
        weights = np.ones((2, 8), np.float32) * (np.nan if self.taken == self.poison else 1)
        where = np.tile(np.arange(8, dtype=np.int32), (2, 1))
        return {
            "tokens": tokens, "segments": np.ones_like(tokens), "positions": where,
            "targets": np.roll(tokens, -1, axis=1), "weights": weights,
        }  # fmt: skip

    def get_state(self) -> Any:
        return {"taken": self.taken}

    def set_state(self, state: Any) -> None:
        self.taken = state["taken"]


@pytest.fixture(scope="module")
def start() -> tuple[Fitted, dict[str, Any], dict[str, Any]]:
    reference = initialize(CONFIG, 0)
    fitted = fit(CONFIG, "q4_0", scales="learned")
    return fitted, reference, with_scales(reference, fitted, "mse")


def run(start: Any, directory: Path, batches: Batches | None = None) -> Trained:
    fitted, reference, masters = start
    how = TrainConfig(steps=6, batch_size=2, loss="kl", log_every=1, save_every=2, keep=3)
    return train(
        fitted,
        masters,
        batches or Batches(),
        how,
        OPTIMIZER,
        teacher=(CONFIG, reference),
        directory=directory,
    )


def test_resume_equals_not_stopping(start: Any, tmp_path: Path) -> None:
    whole = run(start, tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["2", "4", "6"]
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "6")
    again = run(start, tmp_path / "stopped")
    assert again.curves == whole.curves
    for path, leaf in whole.parameters.items():
        np.testing.assert_array_equal(again.parameters[path], leaf, err_msg=path)


def test_every_save_holds_the_codes_of_its_masters(start: Any, tmp_path: Path) -> None:
    trained = run(start, tmp_path)
    _, stored = load_quantized(tmp_path / "6")
    assert differing(stored, captured_codes(trained.parameters, start[0], row_length=8)) == {
        "codes": 0,
        "scales": 0,
    }


def test_nan_stops_and_leaves_the_last_good_save(start: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="step 5: the loss is nan"):
        run(start, tmp_path, Batches(poison=5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]


def test_a_save_of_another_model_is_refused(start: Any, tmp_path: Path) -> None:
    run(start, tmp_path)
    with pytest.raises(InputError, match="a checkpoint of another model or recipe"):
        train(
            CONFIG,
            start[1],
            Batches(),
            TrainConfig(steps=8, batch_size=2),
            OPTIMIZER,
            directory=tmp_path,
        )


def test_kl_without_a_teacher_is_refused(start: Any) -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        train(start[0], start[2], Batches(), TrainConfig(steps=1, loss="kl"), OPTIMIZER)


def test_the_teacher_and_the_start_are_left_alone(start: Any, tmp_path: Path) -> None:
    before = {path: np.array(leaf) for path, leaf in start[1].items()}
    run(start, tmp_path)
    for path, leaf in before.items():
        np.testing.assert_array_equal(start[1][path], leaf, err_msg=path)
    assert jnp.isfinite(start[2]["embed/table"]).all()
