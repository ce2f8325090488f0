"""Saves of a run: which are kept, what a failing one costs, and what happens to a loss that is not a number."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from gemma_qat.errors import InputError, Stopped
from gemma_qat.models import ModelConfig, initialize
from gemma_qat.runs import saves
from gemma_qat.train import OptimizerConfig, TrainConfig, Trained, train
from gemma_qat.train.record import AHEAD, Record
from gemma_qat.train.signals import stop_on_signals

CONFIG = ModelConfig(
    name="one layer", layer_kinds=("full",), vocab_size=64, width=32, query_heads=2, kv_heads=1,
    global_kv_heads=1, head_width=16, global_head_width=32, ffn_width=32, window=4, max_positions=64,
)  # fmt: skip
HOW = TrainConfig(steps=6, batch_size=2, log_every=2, save_every=1, keep=2)


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every run here is the same program: the others find what the first has compiled."""
    kept = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
    }
    before = {name: getattr(jax.config, name) for name in kept}
    for name, value in kept.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def start() -> dict[str, Any]:
    return initialize(CONFIG, 0)


@pytest.fixture
def run(start: dict[str, Any], batches: Any) -> Callable[..., Trained]:
    def begin(directory: Path, poison: int = -1, stop: Any = None, **changes: Any) -> Trained:
        return train(
            CONFIG, start, batches(poison), dataclasses.replace(HOW, **changes),
            OptimizerConfig(warmup=1), directory=directory, stop=stop,
        )  # fmt: skip

    return begin


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_newest_and_every_third_are_kept_and_leftovers_go(run: Any, tmp_path: Path) -> None:
    """If it fails, disks fill up, or saves are deleted that were to stay."""
    for left in ("3.orbax-checkpoint-tmp", ".2.old", ".1.abc"):
        (tmp_path / left).mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / ".keep").touch()
    run(tmp_path, steps=7, keep_every=3)
    assert names(tmp_path) == [".keep", "3", "6", "7", "notes"]


def test_the_curves_of_a_resumed_run_are_those_of_one_that_never_stopped(
    run: Any, tmp_path: Path
) -> None:
    """If it fails, a save between two points of a curve loses what was measured since the first."""
    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped, match="stopped after step 3, saved in .*/3; the same command"):
        run(tmp_path / "parts", stop=lambda step: step == 3)
    again = run(tmp_path / "parts")
    assert again.curves == whole.curves
    assert [step for step, _ in whole.curves["loss"]] == [2, 4, 6]
    for path, leaf in whole.parameters.items():
        np.testing.assert_array_equal(again.parameters[path], leaf, err_msg=path)


def test_nan_names_step_and_rows_and_keeps_what_was_good(run: Any, tmp_path: Path) -> None:
    """If it fails, a run goes on for nothing, or the last good state is gone."""
    said = "step 5: the loss is nan on rows 50, 51; nothing was saved over the last good step"
    with pytest.raises(InputError, match=said):
        run(tmp_path, poison=5)
    assert names(tmp_path)[-1] == "4"
    with pytest.raises(InputError, match="step 5"):
        run(tmp_path, poison=5, save_every=4)


def test_metrics_are_read_late_and_checked_all() -> None:
    """If it fails, reading a metric waits for the devices, or one that is not finite passes."""
    record = Record(log_every=1, steps=9)
    for step in range(1, 5):
        assert record.add(step, {"loss": jnp.float32(step)}) == (step > AHEAD)
    assert len(record.curves["loss"]) == 4 - AHEAD
    record.settle()
    assert record.curves == {"loss": [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]}
    record.add(5, {"loss": jnp.float32(1), "grad_norm": jnp.float32(np.inf)})
    with pytest.raises(InputError, match="step 5: the norm of the gradient is inf; nothing"):
        record.settle()


def test_a_damaged_save_names_the_one_before(run: Any, tmp_path: Path) -> None:
    """If it fails, there is no telling what to do about a save that cannot be read."""
    run(tmp_path, steps=2)
    (tmp_path / "2" / "data.json").write_text("{")
    said = f"2/data.json: cannot be restored .*; the save before it is {tmp_path}/1: move {tmp_path}/2 away"
    with pytest.raises(InputError, match=said):
        run(tmp_path)
    shutil.rmtree(tmp_path / "2" / "optimizer")
    (tmp_path / "2" / "data.json").write_text((tmp_path / "1" / "data.json").read_text())
    with pytest.raises(InputError, match="2/optimizer: no such checkpoint part; the save before"):
        run(tmp_path)
    (tmp_path / "2").rename(tmp_path / "damaged")
    run(tmp_path)
    assert [path.name for path in saves(tmp_path)] == ["5", "6"]


def test_an_only_save_that_cannot_be_read(run: Any, tmp_path: Path) -> None:
    """If it fails, a run with one save ends in a traceback; there is nothing before it to name."""
    run(tmp_path, steps=1)
    (tmp_path / "1" / "data.json").write_text("{")
    with pytest.raises(InputError, match="cannot be restored .*; there is no save before it"):
        run(tmp_path)


def test_a_signal_stops_and_a_second_interrupt_ends() -> None:
    """If it fails, a run cannot be asked to stop, or cannot be made to."""
    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in caught]
    for number in caught:
        with stop_on_signals() as stop:
            assert not stop(1)
            os.kill(os.getpid(), number)
            assert stop(2)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    assert before == [signal.getsignal(number) for number in caught]


MESHES = """
import sys
from pathlib import Path
import jax, numpy as np
from gemma_qat.checkpoint.native import codes_of, load_parameters, load_quantized
from gemma_qat.models import ModelConfig, fit, initialize, quantize_parameters
from gemma_qat.models.capture import differing
from gemma_qat.sharding import MeshConfig, make_mesh
from gemma_qat.train import OptimizerConfig, TrainConfig, program_of
from gemma_qat.train.saves import Saves

fitted = fit(
    ModelConfig(
        name="two", layer_kinds=("full", "full"), vocab_size=256, width=64, query_heads=2, kv_heads=1,
        global_kv_heads=1, head_width=16, global_head_width=32, ffn_width=256, window=4, max_positions=64,
    ),
    "q4_0",
)

def on(devices, **sizes):
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:devices])
    program = program_of(fitted, TrainConfig(steps=10), OptimizerConfig(), mesh)
    return program, Saves(Path(sys.argv[1]), fitted, program, 2, 0)

program, saves = on(8, fsdp=4, data=2)
state = program.start({path: np.asarray(leaf) for path, leaf in program.student.stack(initialize(fitted.config, 0)).items()})
text = saves.cut.lower(state.parameters).compile().as_text()
assert not [word for word in ("all-gather", "all-reduce", "all-to-all") if word in text], text
apart = saves.cut(state.parameters)
table = apart["layers/1/ffn/up/kernel"]
assert table.addressable_shards[0].data.size * 4 == table.size, table.sharding
words = codes_of(apart, fitted)["layers/1/ffn/up/kernel/words"]
assert words.addressable_shards[0].data.size * 4 == words.size, words.sharding
with saves:
    saves.save(state, 3, {})
names = (Path(sys.argv[1]) / "3" / "optimizer" / "_METADATA").read_text()
assert "mu['layers|1|ffn|up|kernel']" in names and "groups" not in names

want = jax.tree.map(np.asarray, state)
for devices, sizes in ((8, {"fsdp": 8}), (2, {"fsdp": 1, "data": 2}), (1, {"fsdp": 1})):
    program, saves = on(devices, **sizes)
    again, step, data = saves.restore({})
    assert (step, data) == (3, {})
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, (again.parameters, again.optimizer)), (want.parameters, want.optimizer))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), again, program.where))
_, parameters = load_parameters(Path(sys.argv[1]) / "3")
codes = quantize_parameters(parameters, fitted)
assert differing(load_quantized(Path(sys.argv[1]) / "3")[1], codes) == {"codes": 0, "scales": 0}
"""


def test_a_sharded_save_gathers_nothing_and_comes_back_on_any_mesh(tmp_path: Path) -> None:
    """If it fails, a model that only fits the mesh cannot be saved, or is tied to the mesh it was saved from."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", MESHES, str(tmp_path)], capture_output=True, text=True, check=False,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "train.steps=0: at"),
        ({"keep": 0}, "train.keep=0"),
        ({"save_every": -1}, "at least 0"),
    ],
)
def test_counts_that_make_no_sense(change: dict[str, int], said: str) -> None:
    """If it fails, a run with nothing to keep deletes the save it has just made."""
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(HOW, **change)
