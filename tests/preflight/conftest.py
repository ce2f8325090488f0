"""A small project to check: a config, texts, a tokenizer, a save of a run, checkpoints that do not fit it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.checkpoint.native import save_model
from gemma_qat.config import DataConfig, ExperimentConfig
from gemma_qat.data import train_tokenizer
from gemma_qat.data.files import training_rows
from gemma_qat.data.loader import make_loader
from gemma_qat.models import SIZES, ModelConfig, fit, initialize
from gemma_qat.sharding import make_mesh
from gemma_qat.start import model_of
from gemma_qat.train import OptimizerConfig, TrainConfig
from gemma_qat.train.saves import Saves
from gemma_qat.training import program_for

SIZE = ModelConfig(
    name="small", layer_kinds=("full",), vocab_size=330, width=64, query_heads=2, kv_heads=1,
    global_kv_heads=1, head_width=32, global_head_width=32, ffn_width=64, window=4, max_positions=64,
)  # fmt: skip
OTHER = dataclasses.replace(SIZE, name="other", vocab_size=331)

Config = Callable[..., ExperimentConfig]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, known_sizes: None) -> Path:
    """Texts in three kinds, two tokenizers, and checkpoints of three kinds."""
    SIZES[SIZE.name], SIZES[OTHER.name] = SIZE, OTHER
    folder = tmp_path_factory.mktemp("project")
    texts = [f"{n} words of a text, the same again and again, {n * n}. " * 9 for n in range(30)]
    (folder / "text").mkdir()
    for n, text in enumerate(texts):
        (folder / "text" / f"{n}.txt").write_text(text, "utf-8")
    (folder / "empty").mkdir()
    (folder / "broken.jsonl").write_text("no json\n", "utf-8")
    for pieces in (SIZE.vocab_size, OTHER.vocab_size):
        train_tokenizer(texts, pieces, folder / f"{pieces}.model")
    save_model(folder / "other", initialize(OTHER, 0), OTHER)
    fitted = fit(SIZE, "w8a8", "recomputed")
    save_model(folder / "quantized", fitted.adopt(initialize(SIZE, 0)), fitted)
    save_model(folder / "float", initialize(SIZE, 0), SIZE)
    return folder


@pytest.fixture(scope="module")
def config(project: Path) -> Config:
    """Makes the config with changes by path, such as `train.steps`."""

    def make(name: str = "run", **changes: Any) -> ExperimentConfig:
        made = ExperimentConfig(
            name=name, model="small", recipe="q4_0", scales="recomputed", directory=str(project / "runs"),
            data=DataConfig(
                kind="text", path=str(project / "text"), tokenizer=str(project / "330.model"), length=16
            ),
            train=TrainConfig(steps=4, batch_size=4, save_every=2, tensorboard=False),
            optimizer=OptimizerConfig(warmup=1),
        )  # fmt: skip
        for path, value in changes.items():
            group, _, field = path.rpartition("__")
            if group:
                value = dataclasses.replace(getattr(made, group), **{field: value})
            made = dataclasses.replace(made, **{group or field: value})
        return made

    return make


@pytest.fixture(scope="module")
def trained(config: Config, project: Path) -> Path:
    """The folder of a run with a save of step 2: moments of random numbers, as training leaves them."""
    begun = config("begun")
    model, folder = model_of(begun), project / "runs" / "begun"
    program = program_for(begun, make_mesh(begun.mesh))
    state = program.start(program.student.stack(initialize(SIZE, 0)))
    draw = np.random.default_rng(0).normal
    moments = jax.tree.map(
        lambda x: jnp.asarray(draw(size=x.shape), x.dtype) if x.dtype == jnp.float32 else x, state.optimizer
    )  # fmt: skip
    rows = training_rows(begun.data, project / "runs" / "rows")
    loader = make_loader(rows, batch_size=begun.train.batch_size, seed=begun.train.seed)
    with Saves(folder / "checkpoints", model, program, begun.train.keep, 0) as saves:
        state = dataclasses.replace(state, optimizer=moments)
        saves.save(state, 2, {"loader": loader.get_state()})
    return folder
