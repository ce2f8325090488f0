"""A folder with everything a small run needs: a text, a tokenizer, a config file that makes its size known."""

from __future__ import annotations

from pathlib import Path

from gemma_qat.data import train_tokenizer

_CONFIG = """
from gemma_qat.config import DataConfig, ExperimentConfig
from gemma_qat.models import SIZES, ModelConfig
from gemma_qat.train import OptimizerConfig, TrainConfig

SIZE = ModelConfig(
    name="small", layer_kinds=("full", "full"), vocab_size=330, width=32, query_heads=2, kv_heads=1,
    global_kv_heads=1, head_width=16, global_head_width=32, ffn_width=32, window=4, max_positions=64,
)
SIZES[SIZE.name] = SIZE


def get_config(variant="default"):
    return ExperimentConfig(
        name="run", model="small", recipe="q4_0", scales="recomputed",
        data=DataConfig(kind="text", path="{folder}/text", tokenizer="{folder}/t.model", length=16),
        train=TrainConfig({train}, batch_size=4, tensorboard=False),
        optimizer=OptimizerConfig(warmup=2, decay="constant"),
    )
"""


def write_run(folder: Path, train: str) -> None:
    """Writes text/a.txt, t.model and config.py; `train` are arguments of its `TrainConfig`."""
    (folder / "text").mkdir()
    text = (
        "def add(left, right):\n    return left + right\n\n\nclass Point:\n    x, y = 0, 10\n" * 30
    )
    text += "".join(f"value_{i} = add({i}, {i * 7})\n" for i in range(200))
    (folder / "text" / "a.txt").write_text(text)
    train_tokenizer([text], 330, folder / "t.model")
    config = _CONFIG.replace("{folder}", str(folder)).replace("{train}", train)
    (folder / "config.py").write_text(config)
