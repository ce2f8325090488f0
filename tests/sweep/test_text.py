"""What text a sweep is measured on, and that nothing was trained or calibrated on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gemma_qat.config import (
    BlendConfig,
    DataConfig,
    ExperimentConfig,
    MeasureConfig,
    PtqCell,
    SweepConfig,
    TrainCell,
    overlaid,
)
from gemma_qat.data.held_out import Corpus
from gemma_qat.errors import InputError
from gemma_qat.sweep.text import check_text, corpora_of


@pytest.fixture
def sweep(tmp_path: Path) -> SweepConfig:
    base = ExperimentConfig(name="", model="tiny_e2b", data=DataConfig(path=str(tmp_path)))
    quantized = dataclasses.replace(base, recipe="mobile", start="float")
    cells = (TrainCell(name="float", config=base), PtqCell(name="mse", config=quantized))
    return SweepConfig(name="s", cells=cells, reference="float")


def test_settings_can_be_picked_on_another_split_than_the_test(sweep: SweepConfig) -> None:
    """If it fails, whoever picks settings has to look at the test text."""
    assert [corpus.split for corpus in corpora_of(sweep)] == ["test"]
    picking = overlaid(sweep, ["evaluation.split=validation"])
    assert [corpus.split for corpus in corpora_of(picking)] == ["validation"]
    check_text(picking)
    with pytest.raises(InputError, match=r"evaluation.split.*validaton.*validation"):
        check_text(overlaid(sweep, ["evaluation.split=validaton"]))


def test_nothing_is_calibrated_on_what_it_is_measured_on(sweep: SweepConfig) -> None:
    """If it fails, PTQ's static scales are fitted to the text that PTQ is praised for."""
    check_text(overlaid(sweep, ["calibration.split=validation"]))
    same = ["calibration.split=validation", "evaluation.split=validation"]
    with pytest.raises(
        InputError, match=r"^cell mse: calibrated on what it is measured on, .* validation$"
    ):
        check_text(overlaid(sweep, same))  # fmt: skip
    for split in ("test", "test[:9]", "train+test", "all"):
        with pytest.raises(InputError, match="what models are measured on is not calibrated on"):
            overlaid(sweep, [f"calibration.split={split}"])
    with pytest.raises(InputError, match=r"calibration.split 'validaton'.*validation"):
        check_text(overlaid(sweep, ["calibration.split=validaton"]))
    ptq = dataclasses.replace(sweep, cells=sweep.cells[1:], reference="elsewhere")
    with pytest.raises(InputError, match="cell mse: calibrated on what it is measured on"):
        check_text(overlaid(ptq, ["evaluation.split=train"]))


def test_nothing_is_trained_on_what_it_is_measured_on(sweep: SweepConfig, tmp_path: Path) -> None:
    """If it fails, training on the test text looks like a method that wins: also in float, or of a blend's part."""
    said = r"^cell float: trained on what it is measured on, .* test$"
    with pytest.raises(InputError, match=said):
        check_text(overlaid(sweep, ["data.split=test", "calibration.split=validation"]))
    lines = tmp_path / "lines"
    lines.mkdir()
    (lines / "a.jsonl").write_text('{"text": "a"}\n', "utf-8")
    blend = (BlendConfig(kind="jsonl", path=str(lines), weight=1.0),)
    cells = tuple(
        dataclasses.replace(
            cell,
            config=dataclasses.replace(
                cell.config, data=dataclasses.replace(cell.config.data, blend=blend)
            ),
        )
        for cell in sweep.cells
    )
    text = (Corpus(path=str(lines / "a.jsonl")),)
    sweep = dataclasses.replace(sweep, cells=cells, evaluation=MeasureConfig(text=text))
    with pytest.raises(InputError, match=r"^cell float: trained on .*a.jsonl$"):
        check_text(sweep)


@pytest.mark.parametrize(
    ("calibrated", "measured", "is_refused"),
    [
        ("train[:90%]", "train[90%:]", False),
        ("train", "train[90%:]", True),
        ("train[:90%]", "train", True),
        ("train", "validation", False),
        ("train[:90%]", "train[50%:]", True),
        ("train[10%:]", "train[:10]", True),
        ("train[:-5]", "train[-5:]", False),
        ("train[:90%]", "train[-10%:]", False),
        ("train+validation", "validation", True),
        ("all", "test", True),
    ],
)
def test_parts_of_a_split(
    sweep: SweepConfig, tmp_path: Path, calibrated: str, measured: str, is_refused: bool
) -> None:
    """If it fails, a slice of a split counts as other text than the split that it is of, or as the same as its rest."""
    text = Corpus(path=str(tmp_path), kind="tfds", split=measured)
    sweep = dataclasses.replace(sweep, evaluation=MeasureConfig(text=(text,)))
    sweep = overlaid(sweep, ["data.kind=tfds", f"data.split={calibrated}"])
    if is_refused:
        with pytest.raises(InputError, match="trained on what it is measured on"):
            check_text(sweep)
    else:
        check_text(sweep)
