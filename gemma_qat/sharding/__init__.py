"""Meshes, the rule table, where arrays lie, and what moves between devices."""

# The mesh.
from gemma_qat.sharding.collectives import Collective, collectives, summary
from gemma_qat.sharding.mesh import MeshConfig, abstract_mesh, make_mesh

# Where arrays lie.
from gemma_qat.sharding.placement import (
    Placement,
    batch_sharding,
    constrain,
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
from gemma_qat.sharding.rules import BATCH_AXES, MESH_AXES, PRESETS, Preset

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "PRESETS",
    "Collective",
    "MeshConfig",
    "Placement",
    "Preset",
    "abstract_mesh",
    "batch_parts",
    "batch_sharding",
    "batch_share",
    "collectives",
    "constrain",
    "from_host",
    "like_parameters",
    "make_mesh",
    "of_slice",
    "of_stack",
    "partition",
    "replicated",
    "sharding",
    "spec",
    "summary",
    "varying",
]
