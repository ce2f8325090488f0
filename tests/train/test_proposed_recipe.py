"""From a float checkpoint to a mixed recipe under a budget to a run on it, by the commands a person gives."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

import gemma_qat
from gemma_qat.checkpoint.native import load_quantized, save_model
from gemma_qat.cli.main import main
from gemma_qat.models import SIZES, initialize


@pytest.fixture
def small(project: Any) -> Any:
    """The size of the project's config, which stands in the table of sizes for this test alone."""
    yield runpy.run_path(str(project.folder / "config.py"))["SIZE"]
    SIZES.pop("small")


@pytest.mark.usefixtures("quick_to_compile")
def test_what_is_proposed_trains(small: Any, project: Any, tmp_path: Path) -> None:
    """If it fails, the recipe file that a study ends in is refused, or trains on other formats than it names."""
    floats, file, figure = tmp_path / "float", tmp_path / "mix.json", tmp_path / "bars.svg"
    save_model(floats, initialize(small, 0), small)
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text in texts:
        text.write_text("def add(left, right):\n    return left + right\n" * 3)
    study = [
        "evaluate",
        "--sensitivity",
        "--reference",
        floats,
        "--tokenizer",
        project.folder / "t.model",
    ]
    study += [
        "--text",
        *texts,
        "--length",
        16,
        "--draws",
        20,
        "--method",
        "rtn",
        "--budget",
        "0.35x",
    ]
    study += ["--propose", file, "--json", tmp_path / "s.json", "--plot", figure]
    assert main([str(word) for word in study]) == 0
    proposal = json.loads((tmp_path / "s.json").read_text())["proposal"]
    assert sum(row["bytes"] for row in gemma_qat.coverage(small, str(file))) == proposal["bytes"]
    assert proposal["bytes"] <= proposal["budget"]
    assert figure.read_text().startswith("<?xml")
    run = [
        str(project.folder / "config.py"),
        f"recipe={file}",
        f"start={floats}",
        f"directory={tmp_path}",
    ]
    assert main(["train", *run, "train.steps=1", "train.save_every=1"]) == 0
    manifest, codes = load_quantized(tmp_path / "run" / "checkpoints" / "1")
    assert manifest.recipe == "mix"
    of_role = {one["class"]: one["format"] for one in proposal["chosen"]}
    assert len(set(of_role.values())) > 1
    assert codes["layers/0/ffn/up/kernel"].grid.format == of_role["ffn_up"]
