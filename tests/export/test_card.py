"""Model cards: if these fail, a person is told of a program that cannot read the files, or of a size that is not so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from gemma_qat.checkpoint.beside import Beside, Towers
from gemma_qat.export import (
    Artifact,
    HubOptions,
    export_compressed_tensors,
    export_huggingface,
    export_mobile,
    export_native,
)
from gemma_qat.models.declare import parameter_count

ALL = "vLLM, SGLang and transformers read these files."


def _card(export: Any, artifact: Artifact, out: Path, *options: HubOptions) -> str:
    export(artifact, out, *options)
    return (out / "README.md").read_text()


@pytest.mark.parametrize("tables", ["float", "packed"])
def test_packed_tables_are_not_for_every_program(case, tables: str, tmp_path: Path) -> None:
    """If it fails, transformers is named as a reader of what it cannot load, or is not where it can."""
    artifact = case.artifact(case.smallest(), "mobile")
    card = _card(export_compressed_tensors, artifact, tmp_path / "out", HubOptions(tables=tables))
    packed = tables == "packed"
    assert (ALL in card) != packed
    assert ("transformers 5.23 cannot load a packed embedding" in card) == packed
    assert ("SGLang reads zeros" in card) == packed


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"kind": "packed", "step": 0}, "stored in the checkpoint;"),
        ({"kind": "qat", "step": 0}, "stored in training;"),
        ({"kind": "packed", "step": 9}, "stored in training;"),
        ({"kind": "packed", "step": 0, "run": {}}, "stored in training;"),
    ],
)
def test_training_that_was_not(case, known: dict[str, Any], said: str, tmp_path: Path) -> None:
    """If it fails, a model that was quantized after training is said to be trained on its codes."""
    artifact = dataclasses.replace(case.artifact(case.smallest()), provenance=known)
    card = _card(export_huggingface, artifact, tmp_path / "out")
    assert f"the codes and scales that were {said}" in card


def test_weights_that_were_not_quantized(case, tmp_path: Path) -> None:
    """If it fails, the card of a float model speaks of codes."""
    card = _card(export_huggingface, case.float_artifact(case.smallest()), tmp_path / "out")
    assert "Written by gemma_qat from the weights that were stored in the checkpoint" in card


@pytest.mark.parametrize(
    ("export", "recipe"), [(export_compressed_tensors, "q4_0"), (export_mobile, "mobile")]
)
def test_an_untied_head_is_not_counted_with_the_model(
    case, export: Any, recipe: str, tmp_path: Path
) -> None:
    """If it fails, a model has more parameters in one format than in another."""
    config = case.smallest()
    card = _card(export, case.artifact(config, recipe), tmp_path / "out")
    count = f"{parameter_count(config):,} parameters and {64 * 64:,} of a head of its own, 4 layers"
    assert f"\n{count}" in card


@pytest.mark.parametrize("format", ["mobile", "native"])
def test_towers_that_are_left_out(case, format: str, tmp_path: Path) -> None:
    """If it fails, somebody looks in the files for vision and audio that are not there."""
    left = {"a.vision": "vision", "b.vision": "vision", "c.audio": "audio"}
    artifact = case.artifact(case.smallest(), "mobile")
    out = tmp_path / "out"
    if format == "native":
        towers = Towers(path=str(tmp_path), left=left)
        card = _card(
            export_native, dataclasses.replace(artifact, beside=Beside(towers=towers)), out
        )
    else:
        card = _card(export_mobile, artifact, out, HubOptions(left_out=left))
        facts = json.loads((out / "gemma_qat.json").read_text())
        assert facts["left_out"] == {"audio": 1, "vision": 2}
    assert "text only: 3 tensors (audio, vision) of the checkpoint it began from" in card
