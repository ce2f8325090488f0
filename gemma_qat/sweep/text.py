"""What text a sweep is measured on, and that it is not what its models were calibrated on."""

from __future__ import annotations

from pathlib import Path

from gemma_qat.config import DataConfig, SweepConfig
from gemma_qat.data.held_out import Corpus, kind_of
from gemma_qat.data.kinds import KINDS
from gemma_qat.data.stdlib_corpus import SPLITS
from gemma_qat.errors import InputError, unknown


def corpora_of(sweep: SweepConfig) -> list[Corpus]:
    """Returns the text that a sweep is measured on.

    Raises: InputError when none is named, and the first cell's data has no part to take.
    """
    data, measure = sweep.cells[0].config.data, sweep.evaluation
    if measure.text:
        return list(measure.text)
    if not KINDS[data.kind].splits:
        raise InputError(
            f"evaluation.text: give held-out text, data of kind {data.kind} has no split of it"
        )
    if data.kind == "stdlib" and measure.split not in SPLITS:
        raise unknown("evaluation.split", measure.split, SPLITS)
    return [
        Corpus(
            path=data.path, kind=data.kind, format=data.format, field=data.field, split=measure.split
        )
    ]  # fmt: skip


def check_text(sweep: SweepConfig) -> None:
    """Refuses text that is not there, and a cell that is calibrated on what it is measured on.

    Raises: InputError; FileNotFoundError.
    """
    corpora = corpora_of(sweep)
    for corpus in corpora:
        if not Path(corpus.path).exists() and corpus.kind != "stdlib":
            raise FileNotFoundError(f"evaluation.text: {corpus.path} is not there")
    for cell in sweep.cells:
        if cell.config.recipe == "float":
            continue
        data, split = cell.config.data, cell.config.calibration.split
        for corpus in corpora:
            if _is_same(corpus, data, split if split != "train" else data.split):
                raise InputError(
                    f"cell {cell.name}: calibrated on what it is measured on, {corpus.path}"
                    + (f" {corpus.split}" if KINDS[data.kind].splits else "")
                )


def _is_same(corpus: Corpus, data: DataConfig, split: str) -> bool:
    """Whether a corpus is, or has a part of, split `split` of some data; two slices of a split may be apart."""
    if (corpus.kind or kind_of(Path(corpus.path))) != data.kind:
        return False
    if Path(corpus.path).resolve() != Path(data.path).resolve():
        return False
    if not KINDS[data.kind].splits or corpus.split == split:
        return True
    parts = corpus.split.split("["), split.split("[")
    return parts[0][0] == parts[1][0] and 1 in (len(parts[0]), len(parts[1]))
