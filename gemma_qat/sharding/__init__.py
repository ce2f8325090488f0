"""Meshes, the rule table, and where arrays lie."""

# The mesh.
from gemma_qat.sharding.mesh import MeshConfig, abstract_mesh, make_mesh

# Where arrays lie.
from gemma_qat.sharding.placement import (
    Cut,
    Placement,
    batch_sharding,
    constrain,
    cut_of,
    like_parameters,
    partition,
    replicated,
    sharding,
    spec,
    varying,
)

# Who holds what.
from gemma_qat.sharding.processes import batch_parts, batch_share, from_host, of_slice, of_stack

# The table.
from gemma_qat.sharding.rules import BATCH_AXES, MESH_AXES, PRESETS, Axes, Preset

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "PRESETS",
    "Axes",
    "Cut",
    "MeshConfig",
    "Placement",
    "Preset",
    "abstract_mesh",
    "batch_parts",
    "batch_sharding",
    "batch_share",
    "constrain",
    "cut_of",
    "from_host",
    "like_parameters",
    "make_mesh",
    "of_slice",
    "of_stack",
    "partition",
    "replicated",
    "sharding",
    "spec",
    "varying",
]
