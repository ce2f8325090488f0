"""Where a run begins, on eight devices against one: reading, drawing, and calibrating. Run by `eight.py`."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from twins import MESHES, TWINS, batch, model_of

from gemma_qat.checkpoint.native import save_model, save_packed
from gemma_qat.convert import convert, parts
from gemma_qat.models import (
    Fitted,
    fit,
    float_parameters,
    initialize,
    layer_shardings,
    quantize_parameters,
    static_scale_paths,
)
from gemma_qat.sharding import Placement, make_mesh
from gemma_qat.start import read_float, retained
from gemma_qat.train import with_scales

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = [
    "hugging face",
    "converted",
    "native",
    "fresh",
    "packed",
    "calibrated dense",
    "calibrated moe",
]
PLACEMENT = Placement(make_mesh(MESHES["fsdp"]), "fsdp")


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """How many arrays are not the same bits."""
    assert one.keys() == other.keys()
    return sum(not np.array_equal(one[path], other[path]) for path in one)


def held(parameters: Mapping[str, jax.Array]) -> float:
    """The share of all bytes that the fullest device has; what was placed on one device counts whole."""
    here: dict[Any, int] = {}
    for leaf in parameters.values():
        for shard in leaf.addressable_shards:
            here[shard.device] = here.get(shard.device, 0) + shard.data.nbytes
    return max(here.values()) / sum(leaf.nbytes for leaf in parameters.values())


def case(name: str) -> dict[str, float]:
    """How many arrays differ, and how much one device holds; for calibration how far scales are apart."""
    if name.startswith("calibrated"):
        return calibrated(name.split()[1])
    with tempfile.TemporaryDirectory() as folder:
        return _read(name, Path(folder))


def _read(name: str, folder: Path) -> dict[str, float]:
    if name in ("hugging face", "converted"):
        source = GOLDEN / "moe_hub"
        if name == "converted":
            parts._PART = 4000  # so that a tiny model has many
            convert(source, folder / "converted")
            source = folder / "converted"
        (_, whole), (_, cut) = read_float(source), read_float(source, PLACEMENT)
        return {"differ": differing(whole, cut), "held": held(cut)}
    size = TWINS["dense"]
    whole = initialize(size, 3)
    if name == "fresh":
        cut = initialize(size, 3, layer_shardings(size, {}, PLACEMENT.mesh, "fsdp"))
        return {"differ": differing(whole, cut), "held": held(cut)}
    if name == "native":
        save_model(folder / "float", whole, size)
        _, cut = read_float(folder / "float", PLACEMENT)
        return {"differ": differing(whole, cut), "held": held(cut)}
    fitted = model_of("dense", "q4_0")
    assert isinstance(fitted, Fitted)
    codes = quantize_parameters(whole, fitted)
    save_packed(folder / "packed", codes, float_parameters(whole, fitted), fitted)
    cut = retained(folder / "packed", fitted, PLACEMENT)
    return {"differ": differing(retained(folder / "packed", fitted), cut), "held": held(cut)}


def calibrated(family: str) -> dict[str, float]:
    """Static scales measured on a mesh, rows not a multiple of its parts, against those of one device."""
    kinds = TWINS[family].layer_kinds[:1] * 3  # The last third of layers has rules of its own.
    fitted = fit(dataclasses.replace(TWINS[family], layer_kinds=kinds), "mobile_like")
    few = [{name: x[:5] for name, x in batch().items()}]
    size = fitted.config
    where = layer_shardings(size, {}, PLACEMENT.mesh, "fsdp")
    one = with_scales(initialize(size, 0), fitted, "mse", few)
    other = with_scales(initialize(size, 0, where), fitted, "mse", few, placement=PLACEMENT)
    paths = static_scale_paths(fitted.plans)
    apart = [abs(float(other[p][0]) / float(one[p][0]) - 1) for p in paths]
    return {"scales": len(paths), "apart": max(apart), "held": held({p: other[p] for p in where})}
