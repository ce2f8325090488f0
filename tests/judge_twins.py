"""Tiny twins that judges are given: trained a little on Python's library, with a vocabulary that GGUF can carry."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from gemma_qat import api
from gemma_qat.checkpoint.native import load_parameters
from gemma_qat.config import experiment
from gemma_qat.data import Tokenizer
from gemma_qat.export import Artifact, artifact_of
from gemma_qat.models import declare
from gemma_qat.train import OptimizerConfig

STEPS = 60

UNSEEN = Path(__file__).parents[1] / "LICENSE"
"""English, where the twins learned from Python's library."""


@dataclasses.dataclass(frozen=True)
class Twin:
    """A trained twin: its masters, its stored codes with its tokenizer, a folder for files."""

    masters: dict[str, np.ndarray]
    artifact: Artifact
    directory: Path

    @property
    def tokenizer(self) -> Tokenizer:
        assert isinstance(self.artifact.tokenizer, Tokenizer)
        return self.artifact.tokenizer


def trained(family: str, directory: Path, data: Path, recipe: str = "q4_0") -> Twin:
    """Trains the tiny twin of a family in `directory`; tokens of its corpus are kept in `data`."""
    config = experiment(family, recipe, "tiny")
    config = dataclasses.replace(
        config,
        directory=str(directory),
        data=dataclasses.replace(config.data, path=str(data)),
        train=dataclasses.replace(config.train, steps=STEPS, batch_size=8, save_every=STEPS),
        optimizer=OptimizerConfig(learning_rate=3e-3, scale_learning_rate=1e-4, warmup=5),
    )
    api.train(config)
    saved = api.resolve_checkpoint(directory / config.name)
    (model,) = data.rglob("*.model")
    artifact = artifact_of(saved, Tokenizer.load(model))
    parameters = load_parameters(saved)[1]
    masters = {path: np.asarray(parameters[path], np.float32) for path in declare(artifact.config)}
    return Twin(masters, artifact, directory)


def as_floats(twin: Twin, floats: dict[str, np.ndarray]) -> Artifact:
    """What an exporter writes of a twin as a float model with these leaves."""
    return Artifact(
        config=twin.artifact.config, recipe="float", plans={}, quantized={}, floats=floats,
        tokenizer=twin.artifact.tokenizer,
    )  # fmt: skip


def dequantized(twin: Twin) -> dict[str, np.ndarray]:
    """The weights that a twin's codes stand for."""
    whole = {path: np.asarray(q.dequantize()) for path, q in twin.artifact.quantized.items()}
    return whole | {path: np.asarray(x) for path, x in twin.artifact.floats.items()}
