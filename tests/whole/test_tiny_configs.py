"""Every recipe trains: the tiny variant of a shipped config, from text to a checkpoint with codes.

Minutes in all, so marked slow:  bash launch/test.sh -m slow tests/whole
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma_qat.checkpoint.native import load_parameters, load_quantized
from gemma_qat.cli.main import main
from gemma_qat.models import quantize_parameters, uncalibrated
from gemma_qat.models.capture import differing
from gemma_qat.quant import RECIPE_NAMES

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SIZES = {
    "q4_0": "26b_a4b",
    "w4a8": "26b_a4b",
    "mobile": "e2b",
    "mobile_like": "26b_a4b",
    "w2": "e4b",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_the_tiny_variant_trains(recipe: str, data: Path, tmp_path: Path) -> None:
    """If it fails, a config we ship does not run, or what it saves is not what it trained."""
    name = f"{SIZES.get(recipe, '12b')}_{recipe}"
    overlays = [f"data.path={data}", f"directory={tmp_path}", "train.steps=4"]
    assert main(["train", str(CONFIGS / f"{name}.py"), "--variant", "tiny", *overlays]) == 0
    saved = tmp_path / f"tiny_{name}" / "checkpoints" / "4"
    manifest, parameters = load_parameters(saved)
    assert uncalibrated(parameters, manifest.plans) == []
    again = quantize_parameters(parameters, manifest.fitted)
    assert differing(again, load_quantized(saved)[1]) == {"codes": 0, "scales": 0}
    assert main(["train", str(CONFIGS / f"{name}.py"), "--variant", "tiny", *overlays]) == 0
    codes = json.loads((tmp_path / f"tiny_{name}" / "codes.json").read_text())
    assert codes["sites"].keys() == manifest.plans.keys()
    loads = codes.get("expert_load", {})
    assert list(loads) == (list("012345") if "26b" in name else [])
    assert all(sum(shares) == pytest.approx(1) for shares in loads.values())


def test_the_sweep_runs(data: Path, tmp_path: Path) -> None:
    """If it fails, the sweep we ship does not come to its table."""
    sweep = ["sweep", str(CONFIGS / "sweep_tiny.py"), "--variant", "tiny"]
    assert main([*sweep, f"data.path={data}", f"directory={tmp_path}"]) == 0
    found = json.loads((tmp_path / "sweep_tiny" / "sweep.json").read_text())
    assert list(found["groups"]) == ["q4_0/mse", "w4a16/mse", "q4_0/qat", "w4a16/qat"]
    assert found["failed"] == {}
