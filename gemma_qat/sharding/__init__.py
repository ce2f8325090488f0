"""Meshes, the rule table, and where arrays lie."""

from gemma_qat.sharding.mesh import MeshConfig, make_mesh
from gemma_qat.sharding.placement import batch_sharding, like_parameters, replicated, sharding, spec
from gemma_qat.sharding.processes import batch_parts, batch_share, of_slice, of_stack
from gemma_qat.sharding.rules import BATCH_AXES, MESH_AXES, PRESETS

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "PRESETS",
    "MeshConfig",
    "batch_parts",
    "batch_sharding",
    "batch_share",
    "like_parameters",
    "make_mesh",
    "of_slice",
    "of_stack",
    "replicated",
    "sharding",
    "spec",
]
