"""One training run, as data: small frozen dataclasses, each owned by the package that uses it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gemma_qat.models import RunOptions
from gemma_qat.ptq import CalibrationConfig
from gemma_qat.quant import ScaleMode
from gemma_qat.quant.plan import Gradient
from gemma_qat.sharding import MeshConfig
from gemma_qat.train import OptimizerConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it is cut into rows.

    `stdlib`: the running Python's standard library, with a tokenizer trained on it, kept under `path`.
    `text`, `jsonl`: files or a folder at `path`, with the SentencePiece model at `tokenizer`.
    Units: length in tokens per row.
    """

    kind: Literal["stdlib", "text", "jsonl"] = "stdlib"
    path: str = "runs/data"
    tokenizer: str = ""
    vocab_size: int = 1024
    length: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One training run.

    `recipe` "float" trains without quantization. `start` is a checkpoint (Hugging Face or native) to start from, empty
    for fresh parameters of the size `model`; `teacher` is the float checkpoint to distil from, empty for `start`.
    `recipe` is a name or the path of a recipe's JSON file. `scales`, `scale_init`, `gradient` (of saturated weights)
    and `learn_activations` (static scales train on after calibration) apply to quantized recipes. A `start` that is
    quantized on the same grids keeps its scales; with scales=frozen it is fine-tuned on them.
    """

    name: str
    model: str
    recipe: str = "float"
    scales: ScaleMode = "learned"
    scale_init: str = "mse"
    gradient: Gradient = "clipped"
    learn_activations: bool = False
    start: str = ""
    teacher: str = ""
    directory: str = "runs"
    calibration: CalibrationConfig = CalibrationConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    options: RunOptions = RunOptions()
