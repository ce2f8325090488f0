"""One training run, as data: small frozen dataclasses, each owned by the package that uses it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gemma_qat.data import Format, Kind
from gemma_qat.errors import InputError, refuse_address, unknown
from gemma_qat.models import RunOptions
from gemma_qat.ptq import DATA_FREE, CalibrationConfig, PtqConfig
from gemma_qat.quant import ScaleMode
from gemma_qat.quant.plan import Gradient
from gemma_qat.sharding import MeshConfig
from gemma_qat.train import BlockwiseConfig, LoraConfig, OptimizerConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where documents are read from; docs/data.md has a row for every kind.

    `format` says what a document is: a text, a conversation (`messages` of `role` and `content`) in Gemma 4's turns, of
    which only the model's are learned, or token ids, read as they are. `field` is where it lies in a line, row or
    example; empty for `text`, `messages` or `ids`. `split` is of a TFDS dataset.
    """

    kind: Kind
    path: str
    format: Format = "text"
    field: str = ""
    split: str = "train"

    def __post_init__(self) -> None:
        refuse_address(self.path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlendConfig(SourceConfig):
    """A source beside the first: `weight` rows of it for each row of the first."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight > 0:
            raise ValueError(f"weight {self.weight} of {self.path}: more than 0 expected")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """Where text comes from and how it is cut into rows.

    `stdlib`: the running Python's standard library, kept under `path`, with a tokenizer of `vocab_size` trained on it
    unless `tokenizer` (a SentencePiece model or tokenizer.json) is given; other kinds need one. `blend` adds sources.
    `empty_thought` puts an empty thought before every answer in conversations, as 12B, 26B A4B and 31B expect with
    thinking off. `bos_in_every_piece`: where a text goes on in another row, that one begins with `bos` too, as held-out
    rows do. Tokenized rows are kept under `cache`, empty for `rows` beside the runs, and used again.
    Units: length in tokens per row.
    """

    kind: Kind = "stdlib"
    path: str = "runs/data"
    blend: tuple[BlendConfig, ...] = ()
    tokenizer: str = ""
    vocab_size: int = 1024
    length: int = 128
    empty_thought: bool = False
    bos_in_every_piece: bool = True
    cache: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for path in (self.tokenizer, self.cache):
            refuse_address(path)
        if self.length < 2:
            raise InputError(f"data.length={self.length}: at least 2 expected")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One training run.

    `recipe` "float" trains without quantization. `start` is a checkpoint (Hugging Face or native) to start from, empty
    for fresh parameters of the size `model`; `teacher` is the float checkpoint to distil from, empty for `start`, and
    `teacher_cache` a folder of `gemma-qat distill-cache` that stands in for it.
    `recipe` is a name or the path of a recipe's JSON file. `scales`, `scale_init`, `gradient` (of saturated weights)
    and `learn_activations` (static scales train on after calibration) apply to quantized recipes. A `start` that is
    quantized on the same grids keeps its scales; with scales=frozen it is fine-tuned on them. `ptq` is for cells of a
    sweep that quantize without training. `blockwise` reconstructs layers one after another before the run's own steps.
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
    teacher_cache: str = ""
    directory: str = "runs"
    calibration: CalibrationConfig = CalibrationConfig()
    ptq: PtqConfig = PtqConfig()
    blockwise: BlockwiseConfig = BlockwiseConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    options: RunOptions = RunOptions()

    def __post_init__(self) -> None:
        for path in (self.start, self.teacher, self.teacher_cache, self.directory):
            refuse_address(path)
        if self.scale_init not in DATA_FREE:
            raise unknown("scale_init", self.scale_init, DATA_FREE)
        if self.train.hidden_weight and self.teacher_cache:
            raise InputError(
                f"train.hidden_weight={self.train.hidden_weight:g}: teacher_cache={self.teacher_cache} keeps a "
                "teacher's words, not its hidden states: train.hidden_weight=0, or a teacher in its place"
            )

    @property
    def folder(self) -> Path:
        """The folder of the run.

        Raises: InputError for a name that leads to no folder below `directory`.
        """
        parts = Path(self.name).parts
        if not parts or ".." in parts or Path(self.name).is_absolute():
            raise InputError(
                f"name={self.name}: the name of a folder in directory={self.directory} expected"
            )
        return Path(self.directory) / self.name
