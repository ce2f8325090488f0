"""Where every leaf of the five sizes lies, on meshes that are only described. Run by `eight.py`."""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import spec_tables

from gemma_qat.models import FULL_SIZES, SIZES, abstract_parameters, declare, fit, leaf_shardings
from gemma_qat.models.leaves import stack_layers
from gemma_qat.numerics import PackedArray, pack, quantize
from gemma_qat.quant import scale_path
from gemma_qat.sharding import PRESETS, MeshConfig, abstract_mesh

SHAPES_CHECKED = False
MESHES = [
    (MeshConfig(preset="fsdp", dcn_data=2), 512),
    (MeshConfig(preset="fsdp+tensor", tensor=8), 64),
    (MeshConfig(preset="fsdp+expert", expert=8, dcn_fsdp=2), 64),
    (MeshConfig(preset="decode", fsdp=1, tensor=4, expert=4), 16),
]
PAIRS = [(size, "q4_0") for size in FULL_SIZES]
PAIRS += [("12b", "q4_0_google"), ("e2b", "mobile"), ("26b_a4b", "mobile_like")]
"""Every kind of grid: tiles, super-blocks, whole channels, two to eight bits."""
CASES = [
    f"{what} {size} {recipe}"
    for what, pairs in (("stored", spec_tables.RECIPES), ("whole", PAIRS))
    for size, recipe in pairs
]


def case(name: str) -> str:
    """A table is the stored one, or no tile and no word lies on two devices."""
    what, size, recipe = name.split()
    if what == "whole":
        no_tile_and_no_word_straddles(size, recipe)
        return "whole"
    assert set(spec_tables.MESHES) == set(PRESETS) == {config.preset for config, _ in MESHES}
    stored = json.loads(spec_tables.path_of(size, recipe).read_text("utf-8"))
    assert spec_tables.tables(size, recipe) == stored
    return "stored"


def cuts(where: Any, rank: int) -> list[int]:
    """Into how many shards each dimension is cut."""
    entries = [*where.spec, *(None,) * (rank - len(where.spec))]
    axes = [(e,) if isinstance(e, str) else e or () for e in entries]
    used = [axis for names in axes for axis in names]
    assert len(used) == len(set(used)), f"a mesh axis twice: {where.spec}"
    return [math.prod(where.mesh.shape[axis] for axis in names) for names in axes]


def no_tile_and_no_word_straddles(size: str, recipe: str) -> None:
    """A shard holds whole tiles (or super-blocks) and whole bytes, its scales lie with it, and shards are equal."""
    model = fit(SIZES[size], recipe, scales="learned")
    config, plans = model.config, model.plans
    shapes = stack_layers(abstract_parameters(config, plans), config, plans)
    sites = stack_layers(declare(config), config, plans, join=lambda parts: parts[0])
    for mesh_config, devices in MESHES:
        mesh, preset = abstract_mesh(mesh_config, devices), mesh_config.preset
        lies = leaf_shardings(config, plans, mesh, preset)
        assert set(lies) == set(shapes)
        for path, shape in shapes.items():
            lies[path].shard_shape(shape.shape)  # raises where shards would not be equal
        by_group = stack_layers(dict(plans), config, plans, join=lambda parts: parts[0])
        packed = leaf_shardings(config, plans, mesh, preset, packed=True)
        for path, plan in by_group.items():
            stacked = int(path.startswith("groups"))
            check_tiles(path, sites[path], plan, lies, stacked)
            check_words(path, sites[path], plan, packed[path], stacked)


def check_tiles(path: str, site: Any, plan: Any, lies: dict[str, Any], stacked: int) -> None:
    pieces = cuts(lies[path], len(site.shape) + stacked)[stacked:]
    total = math.prod(site.shape[axis] for axis in site.reduced)
    tile = (plan.weight.tile or total) * plan.weight.number.super_tiles
    assert total // pieces[site.reduced[0]] % tile == 0, path
    assert all(pieces[axis] == 1 for axis in site.reduced[1:]), path
    kept = [n for axis, n in enumerate(pieces) if axis not in site.reduced[1:]]
    assert cuts(lies[scale_path(path)], len(kept) + stacked)[stacked:] == kept, path


def check_words(path: str, site: Any, plan: Any, where: Any, stacked: int) -> None:
    assert isinstance(where, PackedArray)
    words, scale = packed_shapes(site.shape, site.reduced, plan.weight)
    pieces = cuts(where.words, len(words) + stacked)
    assert pieces == cuts(where.scale, len(scale) + stacked), path
    number, codes = plan.weight.number, math.prod(site.shape[axis] for axis in site.reduced)
    block = {"ggml_nibbles": 32, "ggml_q6_k": 256}.get(number.layout, 8 // number.bits)
    assert codes // pieces[-1] % block == 0, path
    assert all(n % cut == 0 for n, cut in zip(words, pieces[stacked:], strict=True)), path
    assert all(n % cut == 0 for n, cut in zip(scale, pieces[stacked:], strict=True)), path


def packed_shapes(shape: tuple[int, ...], reduced: tuple[int, ...], grid: Any) -> tuple[Any, Any]:
    """Shapes of words and scales as `pack` makes them."""
    key = (shape, reduced, grid)
    if key not in _PACKED:
        leaf = jax.ShapeDtypeStruct(shape, "float32")
        found = jax.eval_shape(lambda w: pack(quantize(w, grid, reduced)), leaf)
        _PACKED[key] = (found.words.shape, found.scale.shape)
    return _PACKED[key]


_PACKED: dict[Any, Any] = {}
