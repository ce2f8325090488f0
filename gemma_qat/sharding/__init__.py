"""Meshes, the rule table, and where arrays lie."""

from gemma_qat.sharding.mesh import MeshConfig, abstract_mesh, make_mesh
from gemma_qat.sharding.placement import batch_sharding, like_parameters, replicated, sharding, spec
from gemma_qat.sharding.rules import BATCH_AXES, MESH_AXES, PRESETS

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "PRESETS",
    "MeshConfig",
    "abstract_mesh",
    "batch_sharding",
    "like_parameters",
    "make_mesh",
    "replicated",
    "sharding",
    "spec",
]
