"""What a sweep says of trained groups beside PTQ: which is best, what was won back, what it cost, the figures kept."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from gemma_qat.config import SweepConfig, TrainCell, load_sweep, overlaid
from gemma_qat.evals import methods_by_recipe
from gemma_qat.sweep import plan_of
from gemma_qat.sweep.cost import cost_of
from gemma_qat.sweep.figures import figures_of
from gemma_qat.sweep.results import _against_best, _control
from gemma_qat.sweep.tables import recipe_tables

STUDY = Path(__file__).resolve().parents[2] / "experiments" / "methods"


@pytest.fixture
def sweep(sweep_file: Path) -> SweepConfig:
    return load_sweep(sweep_file)


def estimate(value: float | None, spread: float = 0.0) -> dict[str, Any]:
    if value is None:
        return {"value": None, "low": None, "high": None, "reason": "nothing was lost"}
    return {"value": value, "low": value - spread, "high": value + spread}


def group(recipe: str, method: str, kl: float, gap: float, **more: Any) -> dict[str, Any]:
    kind = "ptq" if method in ("rtn", "gptq") else "trained"
    cost = {"steps": 3, "tokens": 0 if kind == "ptq" else 300, "calibration_tokens": 0}
    summary = {
        "kl_mean": estimate(kl, kl / 10), "loss_gap": estimate(gap, 0.01),
        "nll": estimate(1 + gap), "top1_agreement": estimate(0.75), "bits_per_byte": estimate(2.0),
        "kl_p99": estimate(9.0),
    }  # fmt: skip
    return {
        "recipe": recipe, "method": method, "kind": kind, "cells": ["here"], "seeds": [0, 1],
        "bytes": 1_500_000, "float_bytes": 4_000_000, "cost": cost, "summary": summary, **more,
    }  # fmt: skip


def document() -> dict[str, Any]:
    """A recipe where another PTQ is best in KL than in loss, and training loses to one of them."""
    groups = {
        "w2/rtn": group("w2", "rtn", 0.5, 0.25),
        "w2/gptq": group("w2", "gptq", 0.25, 0.4),
        "w2/qat": group("w2", "qat", 0.125, 0.3, control="float/float_control"),
        "float/float_control": group("float", "float_control", 0.05, -0.05),
    }
    shares = {"kl_mean": estimate(50.0, 4.0), "loss_gap": estimate(None)}
    apart = {"kl_mean": estimate(-0.125, 0.02), "nll": estimate(0.05, 0.01)}
    differences = {
        f"w2/qat-{other}": {
            key: one | {"excludes_zero": other != "w2/gptq" or key == "kl_mean"}
            for key, one in apart.items()
        }
        for other in groups
    }
    found = {
        "kind": "sweep", "name": "s", "groups": groups, "differences": differences,
        "recovered": {"w2/qat": {"w2/rtn": shares, "w2/gptq": shares}, "w2/rtn": {"w2/gptq": shares}},
        "environment": {"jax": "1"}, "cells": {"here": {"path": "/secret"}}, "failed": {},
        "text": {"documents": 3, "tokens": 1 / 3, "length": 16, "digest": "x"},
        "reference": {
            "name": "float", "path": "/secret", "size": "small", "bytes": 4, "recipe": "float",
            "summary": {"draws": 50, "nll": estimate(1.0), "bits_per_byte": estimate(2.0)},
        },
    }  # fmt: skip
    return found | {"against_best": _against_best(found)}


def test_the_best_ptq_is_the_best_in_what_is_compared() -> None:
    """If it fails, training is compared with a PTQ that another one beats."""
    found = document()["against_best"]
    assert list(found) == ["w2/qat"]
    assert {key: one["ptq"] for key, one in found["w2/qat"].items()} == {
        "kl_mean": "w2/gptq", "loss_gap": "w2/rtn"
    }  # fmt: skip
    assert found["w2/qat"]["loss_gap"]["difference"]["value"] == 0.05  # of the losses


def test_a_table_says_who_is_ahead() -> None:
    """If it fails, a reader cannot see which differences are real, or reads another's share."""
    lines = recipe_tables(document())
    (row,) = (line for line in lines if line.startswith("| qat | 2 "))
    assert "| 50 [46, 54] % of gptq, ahead | nothing to win back of rtn; behind |" in row
    assert "| qat | 50 / – | 50 / – |" in lines
    assert sum(line.startswith("### ") for line in lines) == 2


def test_a_loss_that_learns_is_held_against_its_control() -> None:
    """If it fails, what cross-entropy learned on the way is said to be won back from rounding."""
    found = document()
    found["groups"]["w2/qat"]["loss"] = "ce"
    lines = recipe_tables(found)
    (row,) = (line for line in lines if line.startswith("| qat | 2 "))
    assert "ahead | learns the text | +0.0500 [+0.0400, +0.0600] | 300 |" in row
    assert "| qat | 50 / – | 50 / – |" in lines
    assert "beside its control" not in "".join(recipe_tables(document()))


def test_figures_are_small_and_say_no_path() -> None:
    """If it fails, what is committed has a machine's paths in it, or figures that no table needs."""
    found = figures_of(document())
    assert "secret" not in json.dumps(found) and "kl_p99" not in json.dumps(found)
    assert found["text"] == {"documents": 3, "tokens": 0.333333, "length": 16}
    assert list(found["differences"]) == ["w2/qat-w2/qat", "w2/qat-float/float_control"]
    assert recipe_tables(found) == recipe_tables(document())
    assert methods_by_recipe(found, "svg").startswith(b"<?xml")


def test_the_control_trains_as_what_it_controls(sweep: SweepConfig) -> None:
    """If it fails, what longer training alone does is read off a control that trained otherwise."""
    (qat,) = (cell for cell in sweep.cells if cell.name == "q4_0-qat-seed0")
    own = dataclasses.replace(qat.config, recipe="float")
    fast = dataclasses.replace(own.optimizer, learning_rate=0.5)
    more = dataclasses.replace(own.train, batch_size=2 * own.train.batch_size)
    controls = (
        TrainCell(name="fast", config=dataclasses.replace(own, optimizer=fast)),
        TrainCell(name="more", config=dataclasses.replace(own, train=more)),
        TrainCell(name="same", config=own),
    )
    plan = plan_of(dataclasses.replace(sweep, cells=(*sweep.cells, *controls)))
    groups = {name: [name] for name in plan.measured}
    assert _control(plan, ["q4_0-qat-seed0"], groups) == "same"
    assert _control(plan, ["q4_0-rtn"], groups) is None
    assert _control(plan, ["same"], groups) is None


def test_steps_are_timed_against_the_reference(sweep: SweepConfig, tmp_path: Path) -> None:
    """If it fails, compilation is part of a step's time, or tokens of training are not counted."""
    plan = plan_of(overlaid(sweep, [f"directory={tmp_path}"]))
    seconds = {"float": [9.0, 2.0, 2.0], "q4_0-qat-seed0": [9.0, 3.0], "q4_0-qat-seed1": [9.0, 5.0]}
    for name, reports in seconds.items():
        plan.cells[name].folder.mkdir(parents=True)
        lines = "".join(f'{{"step": 1, "seconds": {one}}}\n' for one in reports)
        (plan.cells[name].folder / "metrics.jsonl").write_text(lines)
    assert cost_of(plan, ["q4_0-qat-seed0", "q4_0-qat-seed1"]) == {
        "steps": 2, "tokens": 2 * 4 * 16, "calibration_tokens": 0, "seconds": 4.0, "over_float": 2.0,
    }  # fmt: skip
    assert cost_of(plan, ["q4_0-rtn"])["tokens"] == 0


def test_the_study_says_what_its_figures_say() -> None:
    """If it fails, a table in experiments/methods is not of the figures beside it: run its summary.py."""
    study = runpy.run_path(str(STUDY / "summary.py"))
    text = (STUDY / "README.md").read_text("utf-8")
    for name in study["NAMES"]:
        file = STUDY / f"{name}.json"
        if file.is_file():
            assert study["with_part"](text, name, study["part"](name, file)) == text
        else:
            begin, end = study["markers"](name)
            assert text.split(begin)[1].split(end)[0].strip() == "Not run yet."


def test_the_study_is_written_from_sweeps(tmp_path: Path) -> None:
    """If it fails, the study's tables cannot be made again from a sweep."""
    study = runpy.run_path(str(STUDY / "summary.py"))
    text = (STUDY / "README.md").read_text("utf-8")
    (tmp_path / "README.md").write_text(study["with_part"](text, "dense", "Not run yet."), "utf-8")
    found = document()
    found["groups"]["w2/qat"]["method"] = "qat_kl"
    found |= {"environment": {"jax": "1", "python": "3", "device": "1 x cpu"}}
    (tmp_path / "figures.json").write_text(json.dumps(figures_of(found)))
    study["main"]([f"moe={tmp_path}"], tmp_path)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "| w2 | – | 50 [46, 54] | – | 50 [46, 54] | nothing to win back of rtn; behind |" in text
    assert "Not run yet" in text.split("<!-- dense: end -->")[0]
    assert (tmp_path / "moe.png").is_file() and not (tmp_path / "dense.png").exists()
    with pytest.raises(SystemExit):
        study["main"]([f"mow={tmp_path}"], tmp_path)
