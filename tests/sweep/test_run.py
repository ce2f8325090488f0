"""A sweep that runs: stopped, gone on with, run again, changed; and what its cells come to together."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_qat import api, training
from gemma_qat.cli.main import main
from gemma_qat.config import SweepConfig, load_sweep
from gemma_qat.errors import InputError, Stopped
from gemma_qat.evals import Resamples, TokenRecords, paired_difference, summarize
from gemma_qat.sweep import plan_of, run_cell, states
from gemma_qat.sweep.figures import figures_of
from gemma_qat.sweep.results import as_often, together
from gemma_qat.sweep.show import markdown

pytestmark = pytest.mark.usefixtures("quick_to_compile")

QAT = ("q4_0-qat-seed0", "q4_0-qat-seed1")


def kinds(sweep: SweepConfig) -> dict[str, str]:
    return {name: state.kind for name, state in states(plan_of(sweep)).items()}


def broken(sweep: SweepConfig) -> SweepConfig:
    """The sweep with a cell that cannot be run, found out late, and one that begins from it."""
    qat = next(cell for cell in sweep.cells if cell.name == QAT[0])
    bad = dataclasses.replace(
        qat, name="broken", config=dataclasses.replace(qat.config, teacher_cache="nowhere")
    )
    after = dataclasses.replace(
        qat, name="after", config=dataclasses.replace(qat.config, start="broken", teacher="float")
    )
    return dataclasses.replace(sweep, cells=(bad, after, *sweep.cells))


@dataclasses.dataclass(frozen=True)
class Ran:
    """A sweep that was stopped in its first cell and then run to the end, and what was seen on the way."""

    sweep: SweepConfig
    stopped: Mapping[str, str]
    step: int
    listed: str
    found: Mapping[str, Any]


@pytest.fixture(scope="module")
def ran(sweep_file: Path) -> Ran:
    sweep = load_sweep(sweep_file)
    with pytest.raises(Stopped):
        run_cell(sweep, "float", stop=lambda step: step >= 2)
    found = states(plan_of(sweep))
    stopped = {name: state.kind for name, state in found.items()}
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(words)))
        assert main(["sweep", str(sweep_file), "--list"]) == 0
    done = api.sweep(broken(sweep))
    return Ran(sweep, stopped, found["float"].step, "\n".join(lines), done)


def test_a_stopped_sweep_knows_where_it_is(ran: Ran) -> None:
    """If it fails, a sweep that was stopped begins again, or a person cannot see how far it is."""
    assert ran.stopped == {"float": "begun"} | dict.fromkeys(("q4_0-rtn", *QAT), "waiting")
    assert ran.step == 2
    words = [line.split(maxsplit=3) for line in ran.listed.splitlines()]
    assert words[0] == ["float", "float", "float", "at step 2 of 4"]
    assert words[1] == ["q4_0-rtn", "q4_0", "rtn", "waiting for float"]


def test_a_run_gone_on_with_did_all_its_steps_once(ran: Ran) -> None:
    """If it fails, a half-trained cell begins anew, or is taken to be done."""
    lines = (plan_of(ran.sweep).cells["float"].folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


def test_one_cell_that_fails_loses_no_other(ran: Ran) -> None:
    """If it fails, a night of cells is lost to the first that cannot be run."""
    assert sorted(ran.found["failed"]) == ["after", "broken"]
    assert "nowhere" in ran.found["failed"]["broken"]
    assert ran.found["failed"]["after"] == "cell after needs broken, which is not done"
    assert set(kinds(ran.sweep).values()) == {"done"}
    assert list(ran.found["groups"]) == ["q4_0/rtn", "q4_0/qat"]


def test_cells_are_runs_that_other_commands_read(ran: Ran) -> None:
    """If it fails, `export`, `evaluate` and `report` cannot take a cell up."""
    for name, planned in plan_of(ran.sweep).cells.items():
        model = api.load(planned.folder)
        assert bool(model.plans) == (name != "float")
        assert (planned.folder / "evaluation.json").is_file() == (name != "float")
        assert (planned.folder / "config.json").is_file()
        inside = {path.name for path in planned.folder.iterdir()}
        assert not [name for name in inside if name.startswith(".")]


def test_the_figures_are_those_of_evaluate(ran: Ran) -> None:
    """If it fails, a sweep's table says something else than `gemma-qat evaluate` of the same folders."""
    plan = plan_of(ran.sweep)
    texts = [corpus.path for corpus in ran.sweep.evaluation.text]
    how = api.EvaluationConfig(length=16, draws=50)
    folders = {name: plan.cells[name].folder for name in plan.measured}
    both = api.evaluate(folders, plan.reference, texts, config=how, own=dict.fromkeys(folders))
    for name in plan.measured:
        ours, theirs = ran.found["cells"][name]["summary"], both["models"][name]["summary"]
        assert ours["kl_mean"] == pytest.approx(theirs["kl_mean"])
    group = ran.found["groups"]["q4_0/qat"]
    assert (group["cells"], group["seeds"]) == (list(QAT), [0, 1])
    values = [ran.found["cells"][name]["summary"]["kl_mean"]["value"] for name in QAT]
    assert group["summary"]["kl_mean"]["value"] == pytest.approx(np.mean(values))
    assert group["over_seeds"]["kl_mean"]["deviation"] == pytest.approx(np.std(values, ddof=1))
    # Same seeds, same data: what differs between the two is what a seed moves.
    assert values[0] != values[1]
    pair = ran.found["differences"]["q4_0/qat-q4_0/rtn"]["kl_mean"]["value"]
    rtn = ran.found["cells"]["q4_0-rtn"]["summary"]["kl_mean"]["value"]
    assert pair == pytest.approx(np.mean(values) - rtn)
    assert {a: list(won) for a, won in ran.found["recovered"].items()} == {"q4_0/qat": ["q4_0/rtn"]}


def test_run_again_it_only_prints(
    ran: Ran, sweep_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, finished work is done again, or the table is other the second time."""

    def never(*_: Any) -> None:
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(training, "run", never)
    monkeypatch.setattr(training, "quantize", never)
    monkeypatch.setattr("gemma_qat.sweep.measure.evaluate", never)
    folder = plan_of(ran.sweep).folder
    assert main(["sweep", str(sweep_file)]) == 0
    out = capsys.readouterr().out
    assert "q4_0" in out and "rtn" in out and " ± " in out
    written = json.loads((folder / "sweep.json").read_text())
    assert written["groups"] == json.loads(json.dumps(ran.found["groups"]))
    page = (folder / "sweep.md").read_text()
    assert "### q4_0, " in page and "| qat | 2 |" in page and "q4_0/qat-q4_0" not in page
    for plot in ("sweep.png", "methods.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    figures = json.loads((folder / "figures.json").read_text())
    assert figures == figures_of(written) and list(figures["groups"]) == list(ran.found["groups"])
    assert main(["sweep", str(sweep_file), "--collect"]) == 0


def test_a_changed_cell_is_refused_and_made_again_when_asked(
    ran: Ran, sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, results of an old config stand under a new one, or work is deleted unasked."""
    plan = plan_of(ran.sweep)
    save = plan.cells[QAT[0]].folder / "checkpoints" / "2"
    changed = [str(sweep_file), "calibration.batches=3"]
    assert main(["sweep", *changed]) == 2
    said = capsys.readouterr().err
    assert "another run there (calibration.batches=8 before, now 3), and 3 more cells" in said
    assert said.count("\n") == 1
    assert save.is_dir()
    ptq = next(cell for cell in ran.sweep.cells if cell.name == "q4_0-rtn")
    cells = tuple(
        dataclasses.replace(cell, method="mse") if cell is ptq else cell for cell in ran.sweep.cells
    )
    other = dataclasses.replace(ran.sweep, cells=cells)
    assert kinds(other) == kinds(ran.sweep) | {"q4_0-rtn": "changed"}
    with pytest.raises(InputError, match="--redo"):
        run_cell(other, "q4_0-rtn")
    before = plan.cells["q4_0-rtn"].folder / "checkpoints" / "0" / "manifest.json"
    stamp, kept = before.stat().st_mtime_ns, save.stat().st_mtime_ns
    assert run_cell(other, "q4_0-rtn", redo=True).kind == "done"
    assert before.stat().st_mtime_ns > stamp and save.stat().st_mtime_ns == kept
    assert kinds(other)["q4_0-rtn"] == "done"


def test_jobs_beside_one_another_do_not_run_the_reference_again(
    ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, every job of a sweep runs the reference, or reads what one kept of another text."""
    from gemma_qat.sweep.measure import Measure

    def never(*_: Any) -> None:
        raise AssertionError("the reference was run")

    monkeypatch.setattr("gemma_qat.evals.reference._fill", never)
    plan = plan_of(ran.sweep)
    measure = Measure(plan, shared=True)
    before = measure.evaluation("q4_0-rtn")
    measure.run("q4_0-rtn")
    assert measure.evaluation("q4_0-rtn")["models"] == before["models"]
    longer = dataclasses.replace(ran.sweep.evaluation, length=8)
    other = Measure(plan_of(dataclasses.replace(ran.sweep, evaluation=longer)), shared=True)
    with pytest.raises(AssertionError, match="the reference was run"):
        other.run("q4_0-rtn")


def test_text_that_changed_is_measured_anew(ran: Ran) -> None:
    """If it fails, figures of one text are shown as those of another."""
    from gemma_qat.sweep.measure import Measure

    plan = plan_of(ran.sweep)
    assert Measure(plan).is_kept(QAT[0])
    longer = dataclasses.replace(ran.sweep.evaluation, length=8)
    assert not Measure(plan_of(dataclasses.replace(ran.sweep, evaluation=longer))).is_kept(QAT[0])
    file = Path(ran.sweep.evaluation.text[0].path) / "0.txt"
    content = file.read_text()
    file.write_text(content + "more\n")
    assert not Measure(plan).is_kept(QAT[0])


def test_a_reference_that_changed_is_measured_against_anew(ran: Ran, tmp_path: Path) -> None:
    """If it fails, figures against one checkpoint are shown as those against the one that took its place."""
    from gemma_qat.sweep.measure import Measure

    folder = plan_of(ran.sweep).cells["float"].folder / "checkpoints" / "4"
    copy = shutil.copytree(folder, tmp_path / "reference")
    plan = plan_of(dataclasses.replace(ran.sweep, reference=str(copy)))
    before = Measure(plan)._digest(QAT[0])
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text() + " ")
    assert Measure(plan)._digest(QAT[0]) != before


def test_a_cell_that_could_not_be_measured_is_on_the_page() -> None:
    """If it fails, a cell that was made, and then not measured, is left out of the page without a word."""
    cells = {"a": {"state": "done"}, "b": {"state": "done"}, "c": {"state": "ready"}}
    document = {
        "name": "s", "cells": cells, "failed": {"b": "not finite"}, "differences": {}, "groups": {}
    }  # fmt: skip
    assert markdown(document).splitlines()[2:] == ["- b: done: not finite", "- c: ready"]


def some(seed: int, documents: int = 3) -> TokenRecords:
    random = np.random.default_rng(seed)
    document = np.repeat(np.arange(documents), (5, 7, 11)[:documents]).astype(np.int32)
    n = len(document)
    return TokenRecords(
        document=document, position=np.arange(n), nll=random.random(n), reference_nll=random.random(n),
        kl=random.random(n), agree=random.random(n) > 0.5, document_bytes=np.array([13, 17, 29]),
    )  # fmt: skip


def test_seeds_together_are_their_mean() -> None:
    """If it fails, what is said of several seeds is not their mean, or weighs one more than another."""
    seeds, draws = [some(0), some(1), some(2)], Resamples(3, seed=0, draws=20)
    both = summarize(together(seeds), draws)
    for key in ("nll", "kl_mean", "top1_agreement", "bits_per_byte", "loss_gap"):
        own = [summarize(one, draws)[key]["value"] for one in seeds]
        assert both[key]["value"] == pytest.approx(np.mean(own))
    # One of three counted three times is itself, intervals too.
    assert summarize(together([seeds[0]] * 3), draws)["kl_mean"] == pytest.approx(
        summarize(seeds[0], draws)["kl_mean"]
    )


def test_pairs_are_of_the_same_files_whatever_the_number_of_seeds() -> None:
    """If it fails, three seeds cannot be compared with one, or files are paired with other files."""
    draws = Resamples(3, seed=0, draws=20)
    one, three = [some(0)], [some(0), some(0), some(0)]
    found = paired_difference(*as_often(three, one), draws)
    assert found["kl_mean"]["value"] == pytest.approx(0, abs=1e-15)
    assert found["kl_mean"]["low"] == pytest.approx(0, abs=1e-15)
    two = paired_difference(*as_often([some(1), some(2)], [some(0), some(3), some(4)]), draws)
    means = [np.mean([some(s).kl.mean() for s in seeds]) for seeds in ((1, 2), (0, 3, 4))]
    assert two["kl_mean"]["value"] == pytest.approx(means[0] - means[1])
