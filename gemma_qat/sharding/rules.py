"""One table: which mesh axis each logical axis of an array lies along.

Layers name logical axes (`width`, `heads`, `ffn`, ...); nothing else knows what a mesh is. A preset lists, per logical
axis, the mesh axis it may be split over. An array uses each mesh axis at most once (its first axis that fits gets it),
and an axis is only split where every shard holds whole quantization tiles; otherwise it is replicated.
"""

from __future__ import annotations

MESH_AXES = ("data", "fsdp", "tensor", "expert")

PRESETS: dict[str, dict[str, str]] = {
    "fsdp": {
        "vocab": "fsdp",
        "per_layer_vocab": "fsdp",
        "experts": "fsdp",
        "width": "fsdp",
        "ffn": "fsdp",
    },
}

BATCH_AXES = ("data", "fsdp")
"""Mesh axes the batch is split over."""
