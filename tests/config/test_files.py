"""Config files: every one in configs/ loads in both variants, and a bad one ends in one line."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from gemma_qat.config import (
    ExperimentConfig,
    QuickstartConfig,
    TrainCell,
    apply,
    from_json,
    load_config,
    load_sweep,
    to_json,
)
from gemma_qat.config.files import VARIANTS
from gemma_qat.errors import InputError
from gemma_qat.models import size_named
from gemma_qat.sweep import plan_of
from gemma_qat.sweep.cost import cost_of

FILES = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.py"))
SWEEPS = [path for path in FILES if "def get_sweep" in path.read_text("utf-8")]
CONFIGS = [path for path in FILES if path not in SWEEPS]


def test_there_are_configs() -> None:
    """If it fails, the tests below test nothing."""
    assert "26b_a4b_q4_0" in [path.stem for path in CONFIGS]


@pytest.mark.parametrize("variant", ["default", "tiny"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_reads_back_equal(path: Path, variant: str) -> None:
    """If it fails, a config we ship does not load, or its record beside a checkpoint differs from it."""
    config = load_config(path, variant)
    assert from_json(ExperimentConfig, to_json(config)) == config
    model, recipe = size_named(config.model).name, config.recipe
    assert f"{model}_{recipe}" == ("tiny_" if variant == "tiny" else "") + path.stem
    assert config.name == f"{model}_{recipe}"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_fits_together(path: Path) -> None:
    """If it fails, a sweep we ship is refused, or its variants would write over one another."""
    variants = runpy.run_path(str(path)).get("VARIANTS", VARIANTS)
    assert set(variants) >= set(VARIANTS)
    plans = [plan_of(load_sweep(path, variant)) for variant in variants]
    assert all(plan.measured for plan in plans)
    # What the table at the end asks of every cell.
    assert all(cost_of(plan, [name])["steps"] >= 0 for plan in plans for name in plan.cells)
    assert len({plan.folder for plan in plans}) == len(variants)
    with pytest.raises(InputError, match=f"expected one of {', '.join(variants)}$"):
        load_sweep(path, "tiyn")


def test_what_is_compared_trains_on_as_many_tokens() -> None:
    """If it fails, a method wins by more data, or a control of the comparison is none."""
    (path,) = (path for path in SWEEPS if path.stem == "compare_methods")
    for variant in ("default", "moe"):
        sweep = load_sweep(path, variant)
        cells = [
            cell for cell in sweep.cells if isinstance(cell, TrainCell) and cell.name != "float"
        ]
        steps = {cell.config.train.steps + cell.config.blockwise.steps for cell in cells}
        rows = {cell.config.train.batch_size for cell in cells}
        assert (len(steps), rows) == (1, {8})
        assert {cell.config.blockwise.batch_size for cell in cells} == {8}
        optimizers = {c.config.optimizer for c in cells if c.config.recipe == "float"}
        # The second phase of the reconstruction trains scales alone, at a rate of its own.
        # So does LSQ's start train its scales.
        whole = [c for c in cells if not c.config.blockwise.steps and c.method != "lsq"]
        assert {c.config.optimizer for c in whole} == optimizers
        by_weights = {c.config.optimizer.learning_rate for c in cells if c.method == "lsq"}
        assert by_weights <= {o.learning_rate for o in optimizers}
        assert sweep.evaluation.split == "test"


def test_the_quickstart_reads_back_equal() -> None:
    """If it fails, the quickstart's record cannot be run again."""
    config = apply(QuickstartConfig(), ["q4_0.train.steps=11", "seed=3", "mesh.fsdp=1"])
    assert config.q4_0.train.steps == 11
    assert from_json(QuickstartConfig, to_json(config)) == config


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1", "no get_config(variant) in it"),
        ("def get_config(variant): return 3", "get_config returned int, ExperimentConfig expected"),
        ("def get_config(:", "cannot be imported"),
        ("import no_such_module", "cannot be imported"),
        (
            "from gemma_qat.config import check_variant\nget_config = check_variant",
            "unknown variant 'tiyn': expected one of default, tiny",
        ),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, source: str, said: str) -> None:
    """If it fails, a mistake in a config ends in a traceback, or in a run of something else."""
    path = tmp_path / "config.py"
    path.write_text(source, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_config(path, "tiyn")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """If it fails, a wrong path is reported as something else."""
    with pytest.raises(FileNotFoundError, match=r"nothing\.py: no such config file"):
        load_config(tmp_path / "nothing.py")
    (tmp_path / "nothings.py").write_text("")
    with pytest.raises(FileNotFoundError, match=r"nearest: nothings\.py"):
        load_config(tmp_path / "nothing.py")
