"""What a sweep is before it runs: names, order, what each cell is made from, and what makes it another."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_qat.cli.main import main
from gemma_qat.config import (
    PtqCell,
    SweepConfig,
    TrainCell,
    apply,
    grid,
    load_sweep,
    overlaid,
)
from gemma_qat.errors import InputError
from gemma_qat.quant import recipe_named, write_recipe
from gemma_qat.sweep import plan_of

Change = Callable[[SweepConfig], SweepConfig]


@pytest.fixture
def sweep(sweep_file: Path) -> SweepConfig:
    return load_sweep(sweep_file)


def with_cell(sweep: SweepConfig, name: str, *overlays: str, of: str = "") -> SweepConfig:
    """The sweep with one cell's name and config changed, or one more."""
    (like,) = (cell for cell in sweep.cells if cell.name == (of or name))
    new = dataclasses.replace(like, name=name, config=apply(like.config, overlays))
    if of:
        return dataclasses.replace(sweep, cells=(*sweep.cells, new))
    cells = tuple(new if cell is like else cell for cell in sweep.cells)
    return dataclasses.replace(sweep, cells=cells)


def test_a_grid_is_every_combination_by_a_name() -> None:
    """If it fails, cells of a sweep are missing, or their names do not say which they are."""
    found = dict(grid(recipe=("q4_0", "my/own.json"), rate=(1e-3,), seed=(0, 1)))
    assert list(found) == [
        f"{recipe}-rate0.001-seed{seed}" for recipe in ("q4_0", "own") for seed in (0, 1)
    ]
    assert found["own-rate0.001-seed1"] == {"recipe": "my/own.json", "rate": 1e-3, "seed": 1}


def test_cells_come_after_what_they_need(sweep: SweepConfig) -> None:
    """If it fails, a cell is started before the run it begins from, or from another path."""
    plan = plan_of(sweep)
    assert list(plan.cells) == ["float", "q4_0-rtn", "q4_0-qat-seed0", "q4_0-qat-seed1"]
    assert plan.cells["float"].needs == ()
    for name in plan.measured:
        assert plan.cells[name].needs == ("float",)
        assert plan.cells[name].cell.config.start == str(plan.cells["float"].folder)
    assert plan.cells["q4_0-rtn"].folder == plan.folder / "q4_0-rtn"


def test_what_the_reference_comes_from_does_not_wait_for_it(sweep: SweepConfig) -> None:
    """If it fails, a reference that is trained on from another cell is a circle."""
    sweep = with_cell(sweep, "before", of="float")
    plan = plan_of(with_cell(sweep, "float", "start=before"))
    assert plan.cells["before"].needs == ()
    assert plan.cells["float"].needs == ("before",)
    assert "before" in plan.measured


def test_a_change_makes_stale_what_follows_from_it(sweep: SweepConfig) -> None:
    """If it fails, a result is kept that another config gave, or lost because a sweep was moved."""

    def digests(changed: SweepConfig) -> dict[str, str]:
        return {name: planned.digest for name, planned in plan_of(changed).cells.items()}

    before = digests(sweep)
    moved = ["directory=elsewhere", "name=other", "mesh.fsdp=1", "data.cache=kept"]
    assert digests(overlaid(sweep, moved)) == before
    one = digests(with_cell(sweep, "q4_0-qat-seed0", "optimizer.learning_rate=0.5"))
    assert [name for name in before if one[name] != before[name]] == ["q4_0-qat-seed0"]
    root = digests(with_cell(sweep, "float", "train.steps=5"))
    assert not set(root.values()) & set(before.values())
    # PTQ has no optimizer: its codes are what they were.
    ptq = digests(with_cell(sweep, "q4_0-rtn", "optimizer.learning_rate=0.5"))
    assert ptq == before


def test_what_a_recipe_file_says_is_part_of_a_cell(sweep: SweepConfig, tmp_path: Path) -> None:
    """If it fails, a cell is done that another recipe under the same name made."""
    file = tmp_path / "own.json"
    sweep = with_cell(sweep, "q4_0-rtn", f"recipe={file}")
    write_recipe(recipe_named("q4_0", "dense"), file)
    before = plan_of(sweep).cells["q4_0-rtn"].digest
    write_recipe(recipe_named("w4a16", "dense"), file)
    assert plan_of(sweep).cells["q4_0-rtn"].digest != before


def test_cells_that_differ_by_their_seed_are_one_group(sweep: SweepConfig) -> None:
    """If it fails, seeds are shown as methods, or methods are averaged as if they were seeds."""
    sweep = with_cell(sweep, "slow", "optimizer.learning_rate=0.5", of="q4_0-qat-seed1")
    groups = {name: planned.group for name, planned in plan_of(sweep).cells.items()}
    assert groups["q4_0-qat-seed0"] == groups["q4_0-qat-seed1"]
    assert len(set(groups.values())) == 4


def test_overlays_are_for_all_cells_or_for_the_sweep(sweep: SweepConfig) -> None:
    """If it fails, an overlay reaches one cell and not another."""
    found = overlaid(sweep, ["train.batch_size=8", "evaluation.length=32", "reference=there"])
    assert {cell.config.train.batch_size for cell in found.cells} == {8}
    assert (found.evaluation.length, found.reference) == (32, "there")
    with pytest.raises(InputError, match="unknown key 'train.btach_size'"):
        overlaid(sweep, ["train.btach_size=8"])


def test_methods_have_names(sweep: SweepConfig) -> None:
    """If it fails, a table calls a float control QAT, or PTQ what it is not."""
    cells = {cell.name: cell for cell in sweep.cells}
    qat = cells["q4_0-qat-seed0"]
    assert [cells[name].label for name in ("float", "q4_0-rtn")] == ["float", "rtn"]
    assert qat.label == "qat"
    ce = apply(qat.config, ["train.loss=ce"])
    assert TrainCell(name="a", config=ce).label == "qat_ce"
    for loss, label in (("js", "qat_js"), ("kl", "qat"), ("cakld", "qat_cakld")):
        other = apply(qat.config, [f"train.loss={loss}"])
        assert TrainCell(name="a", config=other).label == label
        hidden = apply(other, ["train.hidden_weight=0.5"])
        assert (
            TrainCell(name="a", config=hidden).label
            == ("qat_kl" if loss == "kl" else label) + "+hidden"
        )
    control = apply(ce, ["recipe=float"])
    assert TrainCell(name="a", config=control).label == "float_control"
    assert TrainCell(name="a", config=control, method="mine").label == "mine"
    with pytest.raises(InputError, match="unknown PTQ method 'mes'"):
        PtqCell(name="a", config=ce, method="mes")


QAT = "q4_0-qat-seed0"
WRONG: dict[str, tuple[Change, str]] = {
    "two of a name": (lambda s: with_cell(s, "float", of=QAT), "cell float: there are two"),
    "a taken name": (lambda s: with_cell(s, "rows", of=QAT), "cell 'rows': the name of a folder"),
    "no name": (lambda s: with_cell(s, "../up", of=QAT), "cell '../up': the name of a folder"),
    "no cells": (lambda s: dataclasses.replace(s, cells=()), "sweep small: no cells"),
    "a circle": (
        lambda s: with_cell(with_cell(s, "float", f"start={QAT}"), QAT, "recipe=float"),
        f"cells need one another in a circle: float -> {QAT} -> float",
    ),
    "an unknown start": (
        lambda s: with_cell(s, QAT, "start=flaot"),
        f"cell {QAT}: start flaot: neither a cell nor a checkpoint (nearest cell: float)",
    ),
    "an unknown recipe": (lambda s: with_cell(s, QAT, "recipe=q40"), f"cell {QAT}: unknown recipe"),
    "an unknown size": (lambda s: with_cell(s, QAT, "model=smal"), f"cell {QAT}: unknown"),
    "another size": (
        lambda s: with_cell(s, QAT, "model=tiny_e2b"),
        f"cell {QAT}: start float is a small, not a tiny_e2b",
    ),
    "nothing to quantize": (
        lambda s: with_cell(s, "q4_0-rtn", "start="),
        "cell q4_0-rtn: PTQ needs a recipe, and a start",
    ),
    "PTQ of codes": (
        lambda s: with_cell(s, "q4_0-rtn", f"start={QAT}"),
        f"cell q4_0-rtn: start {QAT} is of recipe q4_0, a float cell expected",
    ),
    "no teacher": (lambda s: with_cell(s, QAT, "start="), f"cell {QAT}: train.loss=kl needs"),
    "a chunk that does not fit": (
        lambda s: with_cell(s, QAT, "train.loss_chunk=5"),
        f"cell {QAT}: train.loss_chunk=5 does not divide",
    ),
    "rows that do not fill batches": (
        lambda s: with_cell(s, QAT, "blockwise.steps=1", "blockwise.rows=9"),
        f"cell {QAT}: blockwise.rows=9: a multiple of blockwise.batch_size=8",
    ),
    "float to be reconstructed": (
        lambda s: with_cell(s, "float", "blockwise.steps=1"),
        "cell float: blockwise.steps=1 with recipe=float",
    ),
    "an unknown dtype": (
        lambda s: overlaid(s, ["evaluation.dtype=float7"]),
        "evaluation.dtype=float7: unknown evaluation.dtype 'float7'",
    ),
    "no reference": (
        lambda s: dataclasses.replace(s, reference="no/where"),
        "reference no/where: neither a cell",
    ),
    "a quantized reference": (
        lambda s: with_cell(dataclasses.replace(s, reference=QAT), QAT, "start=float"),
        f"reference {QAT}: a float cell expected",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_together_is_one_line(what: str, sweep: SweepConfig) -> None:
    """If it fails, a sweep dies hours later, at the cell that never could run."""
    change, said = WRONG[what]
    with pytest.raises((InputError, FileNotFoundError)) as caught:
        plan_of(change(sweep))
    assert str(caught.value).startswith(said), str(caught.value)
    assert "\n" not in str(caught.value)


def test_jobs_are_lines_a_launcher_can_run(
    sweep_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, launchers start something else than the sweep would, or in another order."""
    out = tmp_path / "jobs.jsonl"
    there = f"directory={tmp_path}/runs"
    assert main(["sweep", str(sweep_file), there, "--emit", str(out)]) == 0
    jobs = [json.loads(line) for line in out.read_text().splitlines()]
    base = ["gemma-qat", "sweep", str(sweep_file), there]
    assert [job["command"] for job in jobs] == [[*base, "--cell", job["name"]] for job in jobs]
    assert [(job["name"], job["needs"]) for job in jobs[:2]] == [
        ("float", []),
        ("q4_0-rtn", ["float"]),
    ]
    assert f"{' '.join(base)} --collect" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert main(jobs[1]["command"][1:]) == 2
    assert "cell q4_0-rtn needs float, which is not done" in capsys.readouterr().err
    assert main([*base[1:], "--cell", "floot"]) == 2
    assert "unknown cell 'floot'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
