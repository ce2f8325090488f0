"""What text a sweep is measured on, and that it is not what its models were trained or calibrated on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gemma_qat.config import Cell, SweepConfig, TrainCell
from gemma_qat.config.experiment import SourceConfig
from gemma_qat.data.held_out import Corpus, kind_of
from gemma_qat.data.kinds import KINDS
from gemma_qat.data.splits import may_overlap
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
    """Refuses text that is not there, and a cell that is trained or calibrated on what it is measured on.

    Raises: InputError; FileNotFoundError.
    """
    corpora = corpora_of(sweep)
    for corpus in corpora:
        if not Path(corpus.path).exists() and corpus.kind != "stdlib":
            raise FileNotFoundError(f"evaluation.text: {corpus.path} is not there")
    for cell in sweep.cells:
        for how, source, split in _read_by(cell):
            for corpus in corpora:
                if _is_same(corpus, source, split):
                    raise InputError(
                        f"cell {cell.name}: {how} on what it is measured on, {corpus.path}"
                        + (f" {corpus.split}" if KINDS[source.kind].splits else "")
                    )


def _read_by(cell: Cell) -> Iterator[tuple[str, SourceConfig, str]]:
    """Yields how a cell reads each of its texts, the text, and which split of it.

    Raises: InputError for a split to calibrate on that there is none of.
    """
    data, split = cell.config.data, cell.config.calibration.split
    own = [(source, source.split) for source in (data, *data.blend)]
    if isinstance(cell, TrainCell):
        yield from (("trained", *one) for one in own)
    if cell.config.recipe == "float":
        return
    if split != "train":
        if data.kind == "stdlib" and split not in SPLITS:
            raise unknown("calibration.split", split, SPLITS)
        own = [(data, split)]
    yield from (("calibrated", *one) for one in own)


def _is_same(corpus: Corpus, source: SourceConfig, split: str) -> bool:
    """Whether a corpus may have documents of split `split` of some data."""
    if (corpus.kind or kind_of(Path(corpus.path))) != source.kind:
        return False
    one, other = Path(corpus.path).resolve(), Path(source.path).resolve()
    if KINDS[source.kind].splits:
        return one == other and may_overlap(corpus.split, split)
    return one == other or one in other.parents or other in one.parents
