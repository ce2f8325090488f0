"""The face of the package: verbs that two parts of it share their names with."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import gemma_qat
from gemma_qat import api
from gemma_qat.train import TrainConfig


@pytest.mark.parametrize("name", gemma_qat.__all__)
def test_a_verb_is_called_whatever_was_imported_before(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, `gemma_qat.train(config)` is 'module' object is not callable after a part of it was imported."""
    monkeypatch.setattr(api, name, lambda *positional, **named: (positional, named))
    for _ in range(2):
        assert getattr(gemma_qat, name)(1, two=3) == ((1,), {"two": 3})


def test_parts_of_the_same_name_stay_parts() -> None:
    """If it fails, making a part callable took its contents away."""
    assert isinstance(gemma_qat.train, ModuleType) and isinstance(gemma_qat.export, ModuleType)
    assert gemma_qat.train.TrainConfig is TrainConfig


@pytest.mark.parametrize("first", ["gemma_qat.train", "gemma_qat.export.gguf"])
def test_a_fresh_process_finds_the_verb(first: str) -> None:
    """If it fails, what can be called depends on what was imported first."""
    part = first.split(".")[1]
    line = f"import {first}, gemma_qat; print(callable(gemma_qat.{part}))"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr
