"""The check before a run: what fits is ready, what does not is refused for every reason there is, nothing is left."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from gemma_qat.config import ExperimentConfig, experiment, to_json
from gemma_qat.launch.machines import machine_named
from gemma_qat.models import RunOptions
from gemma_qat.preflight import preflight
from gemma_qat.preflight.disk import saves_to_come
from gemma_qat.runs import marked_as_running
from gemma_qat.sharding import MeshConfig, abstract_mesh
from gemma_qat.start import model_of
from gemma_qat.train import TrainConfig
from gemma_qat.train.saves import save_shapes, saves
from gemma_qat.training import program_for

Config = Callable[..., ExperimentConfig]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_fits_is_ready_and_nothing_is_left_behind(config: Config, project: Path) -> None:
    """If it fails, a run that would start is refused, or the check leaves its trial files in somebody's folder."""
    before = files(project)
    found = preflight(config())
    assert (found.problems, found.warnings) == ((), ())
    assert files(project) == before
    assert found.step is not None and found.step.fits and found.step.best is None
    assert (found.begun, found.saves, found.saves_at_once) == (None, 2, 2)
    (looked,) = found.data
    assert looked.documents == 30 and looked.tokens > 100
    assert json.loads(json.dumps(found.to_json()))["save"]["parameters"] > 0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "recipe": ({"recipe": "q40"}, "nearest: q4_0"),
    "size": ({"model": "smal"}, "unknown size 'smal'"),
    "chunk of the loss": ({"train__loss_chunk": 5}, "train.loss_chunk=5 does not divide rows of 16"),
    "pattern": ({"train__only": ("nothing/*",)}, "unknown train.only pattern"),
    "mesh": ({"mesh__fsdp": 3}, "devices (or a multiple, with one size -1) wanted"),
    "corpus that is missing": ({"data__path": "NO/such"}, "NO/such: expected a file, or a folder with **/*.txt"),
    "corpus that is mistyped": ({"data__path": "PROJECT/texts"}, "texts: no such file or folder (nearest: text"),
    "corpus that is empty": ({"data__path": "PROJECT/empty"}, "expected a file, or a folder with **/*.txt"),
    "corpus of another kind": (
        {"data__kind": "jsonl", "data__path": "PROJECT/broken.jsonl"}, "broken.jsonl:1: expected one JSON object",
    ),
    "tokenizer that is missing": ({"data__tokenizer": "NO/t.model"}, "tokenizer NO/t.model: no such file"),
    "tokenizer that is none": ({"data__tokenizer": "PROJECT/broken.jsonl"}, "expected a SentencePiece model"),
    "other pieces": ({"data__tokenizer": "PROJECT/331.model"}, "331 pieces, the model a vocabulary of 330"),
    "start that is missing": ({"start": "NO/start"}, "NO/start: no such checkpoint"),
    "start that is mistyped": ({"start": "PROJECT/flot"}, "flot: no such checkpoint (nearest: float"),
    "start of another size": ({"start": "PROJECT/other"}, "other: not a checkpoint of small"),
    "start on other grids": ({"start": "PROJECT/quantized"}, "on other grids than those of q4_0"),
    "frozen scales": ({"scales": "frozen"}, "scales=frozen keeps the scales of a quantized start"),
    "no teacher": ({"train__loss": "kl"}, "train.loss=kl needs a float checkpoint to distil from"),
    "quantized teacher": (
        {"train__loss": "kl", "start": "PROJECT/float", "teacher": "PROJECT/quantized"}, "a float checkpoint expected",
    ),
    "teacher of other words": (
        {"train__loss": "kl", "start": "PROJECT/float", "teacher": "PROJECT/other"},
        "other: a vocabulary of 331, that of small is 330",
    ),
    "kept words": ({"train__loss": "kl", "teacher_cache": "NO/words"}, "NO/words: no kept words of a teacher"),
    "a name that leads elsewhere": ({"name": "../run"}, "name=../run: the name of a folder in directory="),
    "no name": ({"name": ""}, "name=: the name of a folder in directory="),
    "a file in the way": ({"directory": "PROJECT/broken.jsonl"}, "broken.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_every_reason_not_to_start_is_found(name: str, config: Config, project: Path) -> None:
    """If it fails, somebody finds out on the cluster."""
    changes, said = REFUSED[name]
    at = {key: str(v).replace("PROJECT", str(project)) if isinstance(v, str) else v for key, v in changes.items()}  # fmt: skip
    found = preflight(config(**at))
    assert any(said in problem for problem in found.problems), found.problems
    assert all("\n" not in problem for problem in found.problems)


def test_problems_do_not_hide_each_other(config: Config) -> None:
    """If it fails, a config is repaired once a submission."""
    found = preflight(
        config(data__path="NO", data__tokenizer="NO.model", start="NO/start", train__loss_chunk=5)
    )
    assert len(found.problems) == 4
    assert preflight(config(data__path="NO", start="NO"), paths=False).problems == ()


def test_a_folder_that_cannot_rename_is_refused(
    config: Config, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, the first save of a run on a flat bucket is the end of it."""

    def refuse(source: Any, target: Any) -> None:
        raise OSError(38, "Function not implemented")

    before = files(project)
    monkeypatch.setattr(os, "replace", refuse)
    (problem, *_) = preflight(config()).problems
    assert "cannot be renamed (Function not implemented)" in problem and "gcsfuse" in problem
    assert files(project) == before


def test_a_full_disk_is_refused_and_a_narrow_one_warned_of(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, a run fills the disk that others share, hours after it began."""
    needed = sum(space.total for space in preflight(config()).spaces)

    def free(share: float) -> Any:
        usage = shutil.disk_usage("/")._replace(free=int(needed * share))
        monkeypatch.setattr("gemma_qat.preflight.disk.shutil.disk_usage", lambda path: usage)
        return preflight(config())

    assert "fewer saves (train.keep, train.keep_every)" in free(0.5).problems[0]
    narrow = free(1.05)
    assert narrow.problems == () and "GiB are written" in narrow.warnings[0]
    assert free(2.0).warnings == ()


def test_the_bytes_of_a_save_are_those_on_disk(config: Config, trained: Path) -> None:
    """If it fails, the room that a run is said to need is not what it takes.

    Orbax compresses: float32 masters and moments come to some 0.9 of their bytes; manifests and lists are on top.
    """
    found = preflight(config("begun"))
    assert found.problems == () and found.begun == 2
    assert found.save is not None
    save = saves(trained / "checkpoints")[-1]
    for part, expected in found.save.items():
        entries = [path for path in (save / part).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in entries)
        assert 0.8 * expected < size < expected + 40 * 2**10, part
    assert set(found.save) == {path.name for path in save.iterdir() if path.is_dir()}


def test_a_run_that_is_being_trained_is_warned_of(config: Config, trained: Path) -> None:
    """If it fails, a run is submitted while another job still trains it, and their saves are mixed."""
    made = config("begun")
    (trained / "config.json").write_text(to_json(made), "utf-8")
    with marked_as_running(trained):
        (warning,) = preflight(made).warnings
    assert "is being trained" in warning
    (trained / "config.json").unlink()


def test_what_is_there_is_gone_on_from_or_refused(config: Config, trained: Path) -> None:
    """If it fails, a run is submitted that cannot read the save it would go on from."""
    assert preflight(config("begun", train__steps=2)).begun == 2
    (other,) = preflight(config("begun", recipe="w8a8")).problems
    assert (
        "a checkpoint of another model or recipe (small, q4_0); there is no save before it" in other
    )
    (seed,) = preflight(config("begun", train__seed=7)).problems
    assert "loader state: seed was 0 when saved, is 7 here" in seed
    manifest = trained / "checkpoints" / "2" / "manifest.json"
    whole = manifest.read_text("utf-8")
    manifest.write_text("{", "utf-8")
    try:
        (damaged,) = preflight(config("begun")).problems
    finally:
        manifest.write_text(whole, "utf-8")
    assert "not a checkpoint manifest" in damaged


def test_parts_of_a_save_that_went_away_are_missed(config: Config, trained: Path) -> None:
    """If it fails, a save of which half is deleted is found out after the machines are there."""
    part = trained / "checkpoints" / "2" / "optimizer"
    part.rename(trained / "away")
    try:
        (problem,) = preflight(config("begun")).problems
    finally:
        (trained / "away").rename(part)
    assert "optimizer: no such checkpoint part" in problem


@pytest.mark.parametrize(
    ("how", "there", "expected"),
    [
        (TrainConfig(steps=10), [], (1, 1)),
        (TrainConfig(steps=10, save_every=2, keep=2), [], (5, 3)),
        (TrainConfig(steps=10, save_every=3, keep=1), [], (4, 2)),
        (TrainConfig(steps=10, save_every=2, keep=1, keep_every=4), [], (5, 3)),
        (TrainConfig(steps=10, save_every=2, keep=2), [2, 4], (3, 3)),
        (TrainConfig(steps=10, save_every=2, keep=2), [8, 10], (0, 2)),
    ],
)
def test_how_many_saves_lie_there_at_once(
    how: TrainConfig, there: list[int], expected: tuple[int, int]
) -> None:
    """If it fails, room is asked for saves that are deleted, or none for the one being written.

    The fourth by hand, each time with the one being written: 2; 2 4; 4 6 (2 went); 4 6 8; 4 8 10 (6 went).
    """
    assert saves_to_come(how, there) == expected


def test_a_corpus_smaller_than_a_batch_is_warned_of(config: Config) -> None:
    """If it fails, a cluster makes the rows of a short corpus and refuses the first batch."""
    (warning,) = preflight(config("short", data__length=8, train__batch_size=10**6)).warnings
    assert "training refuses a batch larger than all rows" in warning


def full(recipe: str = "float", **changes: Any) -> ExperimentConfig:
    made = experiment("12b", "q4_0")
    train = dataclasses.replace(made.train, loss="ce", batch_size=128)
    return dataclasses.replace(made, recipe=recipe, train=train, **changes)


def test_a_model_too_large_is_refused_and_one_that_fits_is_timed() -> None:
    """If it fails, machines are rented that the step does not fit, or nobody knows for how long."""
    small = preflight(
        full(options=RunOptions()), machine_named("v5e:2x2"), paths=False, compiles=False
    )
    assert "of 15.75 GiB a device (estimated)" in small.problems[0]
    assert "options.dtype=float32" in small.warnings[0]
    large = preflight(full(), machine_named("v5p:2x4x4"), paths=False, compiles=False)
    assert large.problems == ()
    assert large.hours is not None and large.step is not None and large.step.best is not None
    assert large.hours[0] == pytest.approx(5000 * large.step.best / 3600)


def test_nothing_saved_for_hours_is_warned_of() -> None:
    """If it fails, a run of days loses them to one preemption, and nobody was told."""
    config = experiment("12b", "q4_0", "tiny")
    unsaved = dataclasses.replace(config.train, steps=10**10, save_every=0)
    config = dataclasses.replace(config, train=unsaved)
    found = preflight(config, machine_named("v5e:2x2"), paths=False, compiles=False)
    assert "train.save_every=0" in found.warnings[-1]


def test_gpus_are_estimated_and_say_so() -> None:
    """If it fails, a plan for GPUs passes for one that was compiled, or nodes have no network between them."""
    found = preflight(full(), machine_named("h100:16x8"), paths=False)
    assert found.step is not None and found.step.how == "estimated"
    assert "an estimate for GPUs" in found.step.notes[0]
    assert (found.devices, found.hosts) == (128, 16)
    assert found.step.available == pytest.approx(80e9 * 0.92)


def test_nodes_that_share_parts_of_a_batch_unevenly_are_refused() -> None:
    """If it fails, three nodes are rented of which the second belongs to two shares of the rows: training refuses it."""
    made = full(mesh=MeshConfig(tensor=12))
    for machine, expected in (("h100:3x8", True), ("h100:3x12", False)):
        problems = preflight(made, machine_named(machine), paths=False).problems
        assert (
            any("processes hold parts of a batch that overlap" in one for one in problems)
            == expected
        )


def test_shapes_of_a_save_allocate_nothing() -> None:
    """If it fails, the check of a full size needs the memory of the full size."""
    config = experiment("26b_a4b", "q4_0", "tiny")
    parts = save_shapes(model_of(config), program_for(config, abstract_mesh(config.mesh, 4)))
    assert set(parts) == {"parameters", "quantized", "optimizer"}
    leaves = [leaf for part in parts.values() for leaf in part.values()]
    assert {type(leaf) for leaf in leaves} == {jax.ShapeDtypeStruct}


@pytest.mark.parametrize(("joined", "there"), [(1, 2), (2, 1), (2, 2)])
def test_slices_are_those_that_the_mesh_joins(config: Config, joined: int, there: int) -> None:
    """If it fails, a run over two slices is checked for one, or one is found to fit twice the chips."""
    machine = machine_named("v5e:2x2", there)
    at = config(mesh__dcn_data=joined, train__batch_size=8)
    found = preflight(at, machine, paths=False, compiles=False)
    wrong = [
        problem for problem in found.problems if f"{joined} slices of v5e:2x2 wanted" in problem
    ]
    assert bool(wrong) == (joined != there)
    assert found.devices == 4 * there
    if joined == there:
        assert found.problems == () and found.mesh["data"] == 2 and found.mesh["fsdp"] == 4
        assert found.step and any("data-center network" in note for note in found.step.notes)
