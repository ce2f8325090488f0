"""A sweep small enough to run in a test: a float reference, PTQ of it, and QAT from it with two seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_qat.data import train_tokenizer

CONFIG = """
from dataclasses import replace

from gemma_qat.config import (
    DataConfig, ExperimentConfig, MeasureConfig, PtqCell, SweepConfig, TrainCell, grid
)
from gemma_qat.data.held_out import Corpus
from gemma_qat.models import SIZES, ModelConfig
from gemma_qat.train import OptimizerConfig, TrainConfig

SIZE = ModelConfig(
    name="small", layer_kinds=("full",), vocab_size=330, width=32, query_heads=2, kv_heads=1,
    global_kv_heads=1, head_width=16, global_head_width=32, ffn_width=32, window=4, max_positions=64,
)
SIZES[SIZE.name] = SIZE


def get_sweep(variant="default"):
    base = ExperimentConfig(
        name="", model="small",
        data=DataConfig(kind="text", path="{folder}/text", tokenizer="{folder}/t.model", length=16),
        train=TrainConfig(steps=4, batch_size=4, log_every=2, watch_codes=False),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup=1),
    )
    quantized = replace(base, recipe="q4_0", start="reference", scales="recomputed")
    cells = [PtqCell(name="q4_0-rtn", config=quantized, method="rtn")]
    for name, at in grid(recipe=("q4_0",), method=("qat",), seed=(0, 1)):
        train = replace(base.train, loss="kl", seed=at["seed"], steps=2)
        cells.append(TrainCell(name=name, config=replace(quantized, train=train)))
    cells.append(TrainCell(name="float", config=base))
    return SweepConfig(
        name="small", cells=tuple(cells), reference="float", directory="{folder}/runs",
        evaluation=MeasureConfig(text=(Corpus(path="{folder}/held"),), length=16, draws=50),
    )
"""


@pytest.fixture(scope="module", autouse=True)
def forget_sizes(known_sizes: None) -> None:
    """Configs here make a size known."""


@pytest.fixture(scope="session")
def sweep_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder's sweep.py, its text and tokenizer beside it; runs go to `runs/small`."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "text").mkdir()
    (folder / "held").mkdir()
    text = (
        "def add(left, right):\n    return left + right\n\n\nclass Point:\n    x, y = 0, 10\n" * 30
    )
    text += "".join(f"value_{i} = add({i}, {i * 7})\n" for i in range(200))
    (folder / "text" / "a.txt").write_text(text)
    for index in range(3):
        lines = (f"value_{i} = Point({i}, {index})\n" for i in range(index, index + 5))
        (folder / "held" / f"{index}.txt").write_text("".join(lines))
    train_tokenizer([text], 330, folder / "t.model")
    file = folder / "sweep.py"
    file.write_text(CONFIG.replace("{folder}", str(folder)))
    return file
