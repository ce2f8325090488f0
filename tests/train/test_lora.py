"""Adapters through the grid: the sum is what is rounded, what is saved and what a resumed run goes on from."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.checkpoint.native import load_quantized
from gemma_qat.errors import InputError
from gemma_qat.models import ModelConfig, fit, initialize, merge_adapters
from gemma_qat.models.ahead import round_ahead
from gemma_qat.models.capture import captured_codes, differing
from gemma_qat.models.gemma4 import RunOptions
from gemma_qat.train import (
    LoraConfig,
    OptimizerConfig,
    Student,
    TrainConfig,
    Trained,
    add_adapters,
    train,
    with_scales,
)
from gemma_qat.train.lora import adapter_shapes

pytestmark = pytest.mark.usefixtures("quick_to_compile")

CONFIG = ModelConfig(
    name="two layers", layer_kinds=("full", "full"), vocab_size=64, width=32, query_heads=2, kv_heads=1,
    global_kv_heads=1, head_width=16, global_head_width=32, ffn_width=32, window=4, max_positions=64,
)  # fmt: skip
LORA = LoraConfig(rank=2)
FITTED = fit(CONFIG, "q4_0", scales="learned")


@pytest.fixture(scope="module")
def start() -> dict[str, Any]:
    masters = with_scales(initialize(CONFIG, 0), FITTED, "rtn")
    return add_adapters(masters, CONFIG, LORA, seed=0)


@pytest.fixture
def run(start: dict[str, Any], batches: Any, compiled_once: None) -> Callable[..., Trained]:
    def begin(directory: Path, base: dict[str, Any] = start, **changes: Any) -> Trained:
        how = TrainConfig(steps=4, batch_size=2, log_every=1, save_every=2, keep=3)
        return train(
            FITTED, base, batches(), dataclasses.replace(how, **changes),
            OptimizerConfig(learning_rate=1e-2, warmup=1),
            directory=directory, lora=LORA,
        )  # fmt: skip

    return begin


def test_what_is_merged_is_what_was_trained(start: Any, run: Any, tmp_path: Path) -> None:
    """Codes of a save are those of w + a b; base and everything that has no adapter stay; a resume equals not stopping."""
    whole = run(tmp_path / "whole")
    assert not [path for path in whole.parameters if "lora" in path]
    _, stored = load_quantized(tmp_path / "whole" / "4")
    witness = captured_codes(whole.parameters, FITTED, row_length=8)
    assert differing(stored, witness) == {"codes": 0, "scales": 0}
    moved = {p for p, x in whole.parameters.items() if not np.array_equal(x, start[p])}
    assert "layers/0/attn/q/kernel" in moved and "layers/1/ffn/down/kernel_scale" in moved
    assert not moved & {"embed/table", "layers/0/scalar", "layers/1/pre_attn_norm/weight"}
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "4")
    again = run(tmp_path / "stopped")
    assert again.curves == whole.curves
    for path, leaf in whole.parameters.items():
        np.testing.assert_array_equal(again.parameters[path], leaf, err_msg=path)
    other = start | {"layers/1/attn/q/kernel": 2 * start["layers/1/attn/q/kernel"]}
    with pytest.raises(InputError, match="adapters were trained on another start"):
        run(tmp_path / "stopped", base=other, steps=5)


def test_fresh_adapters_change_nothing_and_a_sum_is_rounded_whole(start: Any) -> None:
    student = Student.of(FITTED)
    leaves = student.stack(start)
    merged = merge_adapters(leaves, CONFIG, FITTED.plans)
    for path, leaf in merged.items():
        np.testing.assert_array_equal(leaf, leaves[path])
    path = "groups/0/0/attn/o/kernel"
    rng = np.random.default_rng(0)
    b = jnp.asarray(rng.standard_normal(leaves[f"{path}_lora_b"].shape), jnp.float32)
    moved = leaves | {f"{path}_lora_b": b}
    a = np.asarray(leaves[f"{path}_lora_a"], np.float64)
    by_hand = np.asarray(leaves[path], np.float64) + (a @ np.asarray(b)).reshape(leaves[path].shape)
    ours = merge_adapters(moved, CONFIG, FITTED.plans)
    np.testing.assert_allclose(ours[path], by_hand, rtol=1e-5, atol=1e-6)
    values = [round_ahead(x, CONFIG, FITTED.plans, RunOptions())[0][path] for x in (moved, ours)]
    np.testing.assert_array_equal(*values)


def test_what_adapters_refuse(run: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown lora.sites pattern 'layers/\\*/atn/\\*'"):
        adapter_shapes(CONFIG, LoraConfig(rank=1, sites=("layers/*/atn/*",)))
    with pytest.raises(InputError, match="groups/0/0/attn/q/kernel has adapters, so it stays"):
        run(tmp_path, only=("layers/*/attn/q/kernel",))
    with pytest.raises(InputError, match="lora.rank=-1"):
        LoraConfig(rank=-1)
