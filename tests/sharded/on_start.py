"""Where a run begins, on eight devices against one: reading, drawing, and calibrating. Run by `eight.py`."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from twins import LENGTH, MESHES, TWINS, VOCAB, batch, model_of, parameters_of

from gemma_qat.checkpoint.native import _load_packed, load_parameters, save_model, save_packed
from gemma_qat.checkpoint.store import packed_arrays
from gemma_qat.convert import convert, parts
from gemma_qat.data.packing import pack as pack_rows
from gemma_qat.evals.score import score
from gemma_qat.export import Artifact, export_native
from gemma_qat.loading import load
from gemma_qat.models import (
    Fitted,
    fit,
    float_parameters,
    initialize,
    layer_shardings,
    quantize_parameters,
    static_scale_paths,
)
from gemma_qat.numerics import pack
from gemma_qat.sharding import MeshConfig, Placement, make_mesh
from gemma_qat.start import read_float, retained
from gemma_qat.train import with_scales

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = [
    "hugging face",
    "converted",
    "native",
    "fresh",
    "packed",
    "exported dense q4_0",
    "exported moe w4a16",
    "exported e_series mobile",
    "calibrated dense",
    "calibrated moe",
    "evaluated",
]
RESTORED = {
    "1": (1, MeshConfig(preset="fsdp")),
    "2, fsdp": (2, MeshConfig(preset="fsdp")),
    "2, tensor": (2, MeshConfig(preset="fsdp+tensor", fsdp=1, tensor=2)),
    "8, fsdp": (8, MeshConfig(preset="fsdp")),
    "8, decode": (8, MESHES["decode"]),
}
"""Devices, and the mesh over them, that an exported checkpoint is read onto."""

PLACEMENT = Placement(make_mesh(MESHES["fsdp"]), "fsdp")


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """How many arrays are not the same bits."""
    assert one.keys() == other.keys()
    return sum(
        one[path].dtype != other[path].dtype or not np.array_equal(one[path], other[path])
        for path in one
    )


def held(parameters: Mapping[str, jax.Array]) -> float:
    """The share of all bytes that the fullest device has; what was placed on one device counts whole."""
    here: dict[Any, int] = {}
    for leaf in parameters.values():
        for shard in leaf.addressable_shards:
            here[shard.device] = here.get(shard.device, 0) + shard.data.nbytes
    return max(here.values()) / sum(leaf.nbytes for leaf in parameters.values())


def case(name: str) -> dict[str, Any]:
    """How many arrays differ, and how much one device holds; for calibration how far scales are apart."""
    if name.startswith("exported"):
        return exported(*name.split()[1:])
    if name.startswith("calibrated"):
        return calibrated(name.split()[1])
    with tempfile.TemporaryDirectory() as folder:
        return evaluated(Path(folder)) if name == "evaluated" else _read(name, Path(folder))


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


def evaluated(folder: Path) -> dict[str, float]:
    """Experts packed as q4_0 beside their float model, over a mesh of 2 x 4, against the same on one device."""
    size = TWINS["moe"]
    floats, fitted = initialize(size, 3), fit(size, "q4_0")
    floats["embed/table"] = floats["embed/table"] * 99.0
    save_model(folder / "float", floats, size)
    codes = quantize_parameters(floats, fitted)
    save_packed(folder / "packed", codes, float_parameters(floats, fitted), fitted)
    documents = [np.arange(9 + i) * 7 % VOCAB for i in range(5)]
    rows, sizes = pack_rows(documents, LENGTH, mix=False), np.ones(VOCAB, np.int64)
    found = []
    for mesh in (None, MESHES["decode"]):
        reference = load(folder / "float", mesh=mesh)
        student = load(folder / "packed", mesh=mesh)
        found.append(score({"s": student}, reference, rows, sizes, batch_size=3)[1]["s"])
    one, other = found
    return {
        "tokens": other.tokens,
        "kl": float(one.kl.mean()),
        "apart": float(max(np.abs(one.kl - other.kl).max(), np.abs(one.nll - other.nll).max())),
    }


def exported(family: str, recipe: str) -> dict[str, dict[str, float]]:
    """Words, scales and floats of a packed checkpoint as they were written, against those read onto each mesh."""
    fitted = model_of(family, recipe)
    assert isinstance(fitted, Fitted)
    masters = parameters_of(fitted.config, fitted.plans)
    artifact = Artifact(
        config=fitted.config, recipe=fitted.recipe, plans=fitted.plans,
        quantized=quantize_parameters(masters, fitted), floats=float_parameters(masters, fitted),
    )  # fmt: skip
    packed = packed_arrays({path: pack(q) for path, q in artifact.quantized.items()})
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        export_native(artifact, Path(folder) / "out")
        for name, (devices, mesh) in RESTORED.items():
            placement = Placement(make_mesh(mesh, jax.devices()[:devices]), mesh.preset)
            words = packed_arrays(_load_packed(Path(folder) / "out", placement)[1])
            floats = load_parameters(Path(folder) / "out", placement)[1]
            over = {len(leaf.sharding.device_set) for leaf in (words | floats).values()}
            assert over == {devices}, over
            found[name] = {
                "differ": differing(packed | artifact.floats, words | floats),
                "held": held(words),
                "arrays": len(words),
            }
    return found


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
