"""Plans of tiny twins: the arguments byte by byte, the estimate without a compiler, the real TPU compiler where it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest
from tpu_process import needs_compiler, printed

from gemma_qat.cli.main import main
from gemma_qat.errors import InputError
from gemma_qat.models import (
    Fitted,
    ModelConfig,
    RunOptions,
    fit,
    forward_flops_per_token,
    parameter_count,
    size_named,
)
from gemma_qat.plan import Workload, plan, search, topology_named, verdict
from gemma_qat.plan.estimate import estimate, model_flops
from gemma_qat.plan.program import arguments, by_part
from gemma_qat.plan.report import doubts
from gemma_qat.sharding import MeshConfig, abstract_mesh
from gemma_qat.train import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


def workload(model: ModelConfig | Fitted, **changes: Any) -> Workload:
    train = TrainConfig(batch_size=8, loss_chunk=32)
    return Workload(**({"name": "test", "model": model, "length": 64, "train": train} | changes))


def test_arguments_of_one_device_are_what_the_declarations_hold() -> None:
    """If it fails, the state that is planned is not the one that is trained."""
    config = size_named("tiny_12b")
    given = arguments(workload(config), abstract_mesh(MeshConfig(), 1))
    parts = by_part(given)
    assert parts["parameters"] == 4 * parameter_count(config)
    # Two moments as large as the parameters, and counters beside them.
    assert 0 < parts["optimizer"] - 2 * parts["parameters"] < 100
    assert parts["teacher"] == 0
    assert parts["batch"] == 5 * 8 * 64 * 4


def test_a_teacher_is_held_in_bfloat16_and_sharded() -> None:
    """If it fails, distillation is planned without its teacher, or with a whole one on every chip."""
    config = size_named("tiny_12b")
    train = TrainConfig(batch_size=8, loss="kl")
    distil = workload(fit(config, "q4_0"), teacher=config, train=train)
    whole = by_part(arguments(distil, abstract_mesh(MeshConfig(), 1)))["teacher"]
    split = by_part(arguments(distil, abstract_mesh(MeshConfig(), 4)))["teacher"]
    assert whole == 2 * parameter_count(config)
    assert split < 0.3 * whole


def test_without_a_compiler_the_plan_says_so() -> None:
    """If it fails, an estimate passes for a compiled program."""
    config = size_named("tiny_26b_a4b")
    found = plan(workload(config), topology_named("v5e:2x2"), compiles=False)
    assert (found.how, found.fits) == ("estimated", True)
    assert "not compiled" in found.notes[0]
    assert found.memory["peak"] == sum(
        size for part, size in found.memory.items() if part not in ("peak", "available")
    )
    assert "fits" in verdict(found)
    assert json.loads(json.dumps(found.to_json()))["model_flops"] == model_flops(workload(config))


def test_a_step_too_large_says_by_how_much() -> None:
    """If it fails, a person buys machines that the step does not fit."""
    config = size_named("31b")
    found = plan(workload(config), topology_named("v5e:2x2"), compiles=False)
    assert not found.fits
    assert verdict(found).startswith("does not fit: ")
    assert found.memory["parameters"] >= 4 * parameter_count(config) / 4


def test_remat_trades_memory_for_arithmetic() -> None:
    """If it fails, a search cannot tell what rematerialization is for."""
    one = workload(size_named("tiny_31b"))
    again = dataclasses.replace(one, options=RunOptions(remat="full"))
    slice_ = topology_named("v5e:2x2")
    without, remat = estimate(one, slice_), estimate(again, slice_)
    assert remat.peak < without.peak
    # One row a chip and step; every matrix but the head is multiplied once more.
    config = one.config
    head = 2 * config.vocab_size * config.width * one.tokens / 4
    assert remat.flops == pytest.approx(without.flops * 4 / 3 - head)


def test_a_count_that_is_off_is_said_to_be() -> None:
    """If it fails, a misread program passes for a plan."""
    assert doubts(1.0) == doubts(0.98) == doubts(0.7, remat="dots") == ()
    assert "1.400 of the declared" in doubts(1.4)[0]
    assert "0.820 of the declared" in doubts(0.82)[0]
    assert doubts(1.0, ("loop.7",)) == ("1 loops of unknown turns (first loop.7), counted once",)


def test_a_search_ranks_what_fits() -> None:
    """If it fails, the first row of the ranking is not the fastest, or does not fit."""
    found = search(workload(size_named("tiny_e4b")), topology_named("v5e:2x2"), compiles=False)
    speeds = [choice.tokens_per_second for choice in found]
    assert len(found) > 4
    assert speeds == sorted(speeds, reverse=True)
    assert all(choice.estimate.peak <= choice.topology.chip.hbm for choice in found)
    with pytest.raises(InputError, match="does not fit v5e:1x1 in any"):
        search(workload(size_named("31b")), topology_named("v5e:1x1"), compiles=False)


def test_the_verb_estimates_prints_and_saves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, `gemma-qat plan` has lost its table or its JSON."""
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE",
                 "ALLOW_MULTIPLE_LIBTPU_LOAD"):  # fmt: skip
        monkeypatch.setenv(name, "")  # the verb sets them: here they are to be forgotten again
    file = tmp_path / "plan.json"
    arguments = [
        "plan",
        str(ROOT / "configs/26b_a4b_q4_0.py"),
        "--variant",
        "tiny",
        "--topology",
        "v5e:2x2",
    ]
    assert main([*arguments, "train.batch_size=8", "--estimate", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "estimated from eval_shape" in shown and "memory of one chip" in shown
    assert json.loads(file.read_text())["batch_size"] == 8
    assert main([*arguments[:-1], "v5e:9x9"]) == 2
    assert "nearest slices of v5e" in capsys.readouterr().err


PROGRAM = """
import dataclasses, json, sys
from gemma_qat.models import RunOptions, size_named
from gemma_qat.plan import Workload, plan, topology_named
from gemma_qat.train import TrainConfig

size = dataclasses.replace(size_named("tiny_12b"), layer_kinds=("full",) * 3, vocab_size=256)
work = Workload(name="test", model=size, length=128, train=TrainConfig(batch_size=4, loss_chunk=32),
                options=RunOptions(dtype="bfloat16", remat="full"))
print(json.dumps(plan(work, topology_named("v5e:2x2")).to_json()))
"""


@needs_compiler
def test_the_real_step_compiles_for_chips_that_are_not_there() -> None:
    """If it fails, the step no longer compiles for TPUs, or its program is misread."""
    found = printed(PROGRAM)
    assert (found["how"], found["fits"], found["notes"]) == ("compiled", True, [])
    # Loops multiplied out: forward, its repetition (but for the head), and twice that backward, one row a chip.
    size = dataclasses.replace(size_named("tiny_12b"), layer_kinds=("full",) * 3, vocab_size=256)
    head = 2 * 256 * size.width
    assert found["flops_ratio"] == 1
    assert found["flops"] == 128 * (4 * forward_flops_per_token(size, 128, "full") - head)
    # Each chip holds a quarter of three arrays the size of the parameters; layouts pad small ones to whole tiles.
    assert found["memory"]["argument"] >= 3 * 4 * parameter_count(size) / 4
    assert found["memory"]["peak"] >= found["memory"]["argument"]
    assert {"all-gather"} <= set(found["collectives"])
    assert 0 < found["mfu"]["worst"] <= found["mfu"]["best"] < 1
    assert jax.devices()[0].platform == "cpu"


@needs_compiler
def test_the_compiler_knows_one_chip_and_several_slices() -> None:
    """If it fails, a machine that can be rented cannot be planned for."""
    program = """
import dataclasses, json
from gemma_qat.plan import topology_named
from gemma_qat.plan.compile import topology_devices
one = topology_named("v5e:1x1")
two = dataclasses.replace(topology_named("v5e:2x2"), slices=2)
print(json.dumps([[getattr(d, "slice_index", 0) for d in topology_devices(t)] for t in (one, two)]))
"""
    assert printed(program) == [[0], [0, 0, 0, 0, 1, 1, 1, 1]]
