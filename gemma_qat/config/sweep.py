"""A sweep, as data: cells, each a run of its own, and what all of them are measured with.

A cell that begins from another, or learns from it, says so by name: where `config.start` or `config.teacher` is the
name of a cell, its run's path stands there when the sweep is run; `reference` stands for the sweep's reference. Any
other text is a checkpoint's path. `name` and `directory` of a cell's config are the sweep's to fill in.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from gemma_qat.config.experiment import ExperimentConfig
from gemma_qat.config.overlay import apply
from gemma_qat.data.held_out import Corpus
from gemma_qat.errors import refuse_outside, unknown
from gemma_qat.ptq import METHODS
from gemma_qat.train import TrainConfig

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCell:
    """A training run. `method` is what tables call it; "" leaves that to its recipe and loss."""

    name: str
    config: ExperimentConfig
    method: str = ""

    @property
    def label(self) -> str:
        """What tables call the method."""
        if self.config.recipe == "float":
            otherwise = "float_control" if self.config.start else "float"
        else:
            otherwise = _trained(self.config.train)
        return self.method or otherwise


def _trained(how: TrainConfig) -> str:
    """`qat` is distillation by the forward divergence, `qat_LOSS` any other, with `+hidden` where states count too."""
    if how.hidden_weight:
        return f"qat_{how.loss}+hidden"
    return "qat" if how.loss == "kl" else f"qat_{how.loss}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PtqCell:
    """`config.start` on the grid of `config.recipe` without training: `method` is a key of `ptq.METHODS`.

    `called` is what tables call it; "" leaves that to its method and importance.
    Static scales are calibrated on `config.data` as `config.calibration` says.
    """

    name: str
    config: ExperimentConfig
    method: str = "mse"
    called: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("PTQ method", self.method, METHODS)

    @property
    def label(self) -> str:
        """What tables call the method."""
        otherwise = f"{self.method}+importance" if self.config.ptq.importance else self.method
        return self.called or otherwise


Cell = TrainCell | PtqCell


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Held-out text, and how models are measured on it.

    Without `text` it is a part of the first cell's data (kinds `stdlib` and `tfds`): `split`, which is `validation`
    while settings are picked. `length` is tokens a row, `rows_per_document` caps the rows of a document (0: all of
    them), `draws` are bootstrap resamples.
    """

    text: tuple[Corpus, ...] = ()
    split: str = "test"
    length: int = 512
    rows_per_document: int = 0
    batch_size: int = 16
    draws: int = 2000
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, least in (
            ("length", 2),
            ("rows_per_document", 0),
            ("batch_size", 1),
            ("draws", 1),
        ):
            refuse_outside(f"evaluation.{name}", getattr(self, name), least)
        if self.dtype not in DTYPES:
            raise unknown("evaluation.dtype", self.dtype, DTYPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Cells, and the float model they are measured against: `reference` is a cell's name or a checkpoint's path.

    Files go to `directory/name`, a folder a cell.
    """

    name: str
    cells: tuple[Cell, ...]
    reference: str
    directory: str = "runs"
    evaluation: MeasureConfig = MeasureConfig()


def overlaid(sweep: SweepConfig, overlays: Sequence[str]) -> SweepConfig:
    """Returns the sweep with `path=value` applied to every cell's config, or to itself where it has that field.

    Raises: InputError as `apply` does, and for the fields of a cell that the sweep fills in.
    """
    own = {field.name for field in dataclasses.fields(sweep)}
    for overlay in overlays:
        if overlay.partition("=")[0].split(".")[0] in own:
            sweep = apply(sweep, [overlay])
        else:
            cells = tuple(
                dataclasses.replace(cell, config=apply(cell.config, [overlay]))
                for cell in sweep.cells
            )
            sweep = dataclasses.replace(sweep, cells=cells)
    return sweep


def grid(**axes: Sequence[Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns every combination of the values of some axes, each with a name: `q4_0-qat-seed1`.

    Words stand for themselves, of a path the last part without its ending; other values follow the name of their axis.
    """
    combined = [
        dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
    ]
    return [("-".join(_word(*item) for item in at.items()), at) for at in combined]


def _word(axis: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{axis}{value:g}"
    return (
        PurePath(value).name.removesuffix(".json") if isinstance(value, str) else f"{axis}{value}"
    )
