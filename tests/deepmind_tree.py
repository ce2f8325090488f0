"""DeepMind's Orbax trees of tiny twins, written here from the maps that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from gemma_qat.checkpoint.deepmind_map import places
from gemma_qat.checkpoint.maps import gathered
from gemma_qat.models import ModelConfig, declare

BARE = ("input_embedding", "per_layer_embeddings", "skip_scale", "gating_einsum", "linear", "router_logits",
        "router_scale", "per_expert_scale", "scale")  # fmt: skip
"""Last names of leaves that carry no `w` of their own."""


def tensors_of(
    parameters: dict[str, np.ndarray], config: ModelConfig, stacks: bool
) -> dict[str, np.ndarray]:
    """Foreign arrays by name; zeros where layers that share keys and values have none of ours."""
    declared, found = declare(config), places(config, stacks=stacks)
    out = {}
    for name, paths in gathered(found).items():
        parameter, move = declared[paths[0]], found[paths[0]].move
        parts = [np.zeros_like(parameters[paths[0]])] * move.parts
        for path in paths:
            parts[found[path].move.part] = parameters[path]
        out[name] = np.ascontiguousarray(move.write(parts, parameter))
    return out


def tree_of(tensors: dict[str, np.ndarray], layout: str) -> dict[str, Any]:
    """The arrays as DeepMind nests them: `flat` keeps a module's whole path as one key."""
    tree: dict[str, Any] = {}
    for name, array in tensors.items():
        full = name if name.split("/")[-1] in BARE else f"{name}/w"
        if layout == "flat":
            module, _, leaf = f"transformer/{full}".rpartition("/")
            tree.setdefault(module, {})[leaf] = array
            continue
        *above, last = full.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = array
    return {"rlx_networks": {"policy_network": tree}} if layout == "prefixed" else tree


def write(directory: Path, tree: dict[str, Any], **options: Any) -> Path:
    """Saves a tree; `options` are Orbax's: use_ocdbt, use_zarr3."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(directory.absolute(), tree)
    return directory
