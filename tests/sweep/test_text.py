"""What text a sweep is measured on, and that nothing was calibrated on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gemma_qat.config import (
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
    with pytest.raises(InputError, match=r"calibration.split=test: what models are measured on"):
        overlaid(sweep, ["calibration.split=test"])
    with pytest.raises(InputError, match="cell mse: calibrated on what it is measured on"):
        check_text(overlaid(sweep, ["evaluation.split=train"]))


@pytest.mark.parametrize(
    ("calibrated", "measured", "is_refused"),
    [
        ("train[:90%]", "train[90%:]", False),
        ("train", "train[90%:]", True),
        ("train[:90%]", "train", True),
        ("train", "validation", False),
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
        with pytest.raises(InputError, match="calibrated on what it is measured on"):
            check_text(sweep)
    else:
        check_text(sweep)
