"""How the leaves of the five sizes lie, as short tables. `python tests/sharded/spec_tables.py` writes `specs/` anew.

A line of a table says for all leaves of one name (`attn/q/kernel`; `*` stands for the group and the position in its
period) how each dimension is cut: `.` not at all, else the mesh axes. Leaves of one name may lie differently (wider
layers, other plans): then every way has its own groups. Nothing is allocated and no device is needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma_qat.models import FULL_SIZES, SIZES, Fitted, fit, leaf_shardings
from gemma_qat.numerics import PackedArray
from gemma_qat.sharding import MeshConfig, abstract_mesh

SPECS = Path(__file__).with_name("specs")
MESHES: dict[str, tuple[MeshConfig, int]] = {
    "fsdp": (MeshConfig(preset="fsdp"), 64),
    "fsdp+tensor": (MeshConfig(preset="fsdp+tensor", tensor=4), 64),
    "fsdp+expert": (MeshConfig(preset="fsdp+expert", expert=8, dcn_data=2), 128),
    "decode": (MeshConfig(preset="decode", fsdp=1, tensor=8), 8),
}
RECIPES = [(size, "q4_0") for size in FULL_SIZES] + [("e2b", "mobile")]


def fitted(size: str, recipe: str) -> Fitted:
    """The size with a recipe whose scales are leaves, so that they have specs too."""
    return fit(SIZES[size], recipe, scales="learned")


def shardings(model: Fitted, preset: str) -> dict[str, Any]:
    """Shardings of all leaves on the preset's mesh, packed for `decode`."""
    config, devices = MESHES[preset]
    mesh = abstract_mesh(config, devices)
    return leaf_shardings(model.config, model.plans, mesh, preset, packed=preset == "decode")


def said(where: Any) -> str:
    """A sharding in short: `. fsdp+expert`."""
    if isinstance(where, PackedArray):
        return f"words {said(where.words)}"
    entries = [("+".join(e) if isinstance(e, tuple) else e) or "." for e in where.spec]
    return " ".join(entries) or "whole"


def table(model: Fitted, preset: str) -> dict[str, Any]:
    """By name of leaf, how it lies; a dict of ways and groups where leaves of that name differ."""
    ways: dict[str, dict[str, list[str]]] = {}
    for path, where in shardings(model, preset).items():
        parts = path.split("/")
        grouped = parts[0] == "groups"
        name = "*/" + "/".join(parts[3:]) if grouped else path
        at = "/".join(parts[1:3]) if grouped else ""
        ways.setdefault(name, {}).setdefault(said(where), []).append(at)
    return {
        name: next(iter(found)) if len(found) == 1 else {w: " ".join(at) for w, at in found.items()}
        for name, found in sorted(ways.items())
    }


def tables(size: str, recipe: str) -> dict[str, Any]:
    """The tables of one size and recipe, by preset, with the sizes of the mesh they are for."""
    model = fitted(size, recipe)
    out = {}
    for preset, (config, devices) in MESHES.items():
        mesh = {axis: n for axis, n in abstract_mesh(config, devices).shape.items() if n > 1}
        out[preset] = {"mesh": mesh, "leaves": table(model, preset)}
    return out


def path_of(size: str, recipe: str) -> Path:
    """The file that holds the tables of a size and recipe."""
    return SPECS / f"{size}_{recipe}.json"


if __name__ == "__main__":
    SPECS.mkdir(exist_ok=True)
    for pair in RECIPES:
        path_of(*pair).write_text(json.dumps(tables(*pair), indent=1) + "\n", "utf-8")
