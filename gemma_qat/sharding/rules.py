"""One table: which mesh axes each logical axis of an array lies along.

Layers name logical axes (`width`, `heads`, `ffn`, ...); nothing else knows what a mesh is. A preset has two columns:

    stored       parameters, learned scales, optimizer state, teacher, packed words: how they rest in memory
    computed     activations: how they lie while a layer works on them

A logical axis maps to one mesh axis or to a tuple of them, in order of preference. An array uses each mesh axis at
most once (its first logical axis that fits gets it), an axis is only cut where every shard holds whole quantization
tiles (and whole packed words), and what does not fit is replicated: the one KV head of E2B is, under `tensor`. Arrays
of one dimension (norms, scalars) are always replicated: they weigh nothing, and a cut would cost a message per layer.

| preset | parameters | experts |
|---|---|---|
| `fsdp` | cut over `fsdp`, gathered when used | gathered when used |
| `fsdp+tensor` | heads and ffn over `tensor`, the rest over `fsdp` | over `tensor`: each does its own, same tokens |
| `fsdp+expert` | cut over `fsdp` and `expert` | over `expert`: tokens go to them and come back |
| `decode` | heads, ffn and tables over `tensor` | over `expert` and `tensor` |

Tables [V, D] are cut by rows over all of a preset's axes and never gathered: ids and hidden states go to them
(`nn/lookup.py`, `Gemma4.logits`).

`expert` and `fsdp` are also data axes: a batch is split over `BATCH_AXES` whatever the preset, and an axis of size 1
cuts nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

Axes = tuple[str, ...]

MESH_AXES: Axes = ("data", "fsdp", "tensor", "expert")

BATCH_AXES: Axes = ("data", "fsdp", "expert")
"""Mesh axes the batch is split over."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """One row of the table: mesh axes of every logical axis, for stored arrays and for activations."""

    stored: Mapping[str, Axes]
    computed: Mapping[str, Axes]
    spare: Mapping[str, Axes] = dataclasses.field(default_factory=dict)
    """Where a stored array is cut by mesh axes that `stored` found no use for.

    Under `fsdp+tensor` it is by fsdp only. With one scale per output channel the reduced axes of `attn/o` and
    `ffn/down` are one tile: they are whole on every `tensor` shard. Cut along the output, they would have to change
    places at every use, which the compiler does by gathering everything.
    """

    @property
    def activations(self) -> dict[str, Axes]:
        """`computed`, and what holds in every preset.

        `batch` rows of a batch; `rows` the same where a table's rows are cut over some of the batch's mesh axes and
        what is computed is cut like them (logits): those axes are left to the table.
        """
        tables = {name: axes for name, axes in self.stored.items() if name in TABLE_AXES}
        cut = {axis for axes in tables.values() for axis in axes}
        rows = tuple(axis for axis in BATCH_AXES if axis not in cut)
        return {**tables, "batch": BATCH_AXES, "rows": rows, **self.computed}


TABLE_AXES: Axes = ("vocab", "per_layer_vocab")
"""Logical axes of look-up tables; they lie in activations (logits) as they are stored."""


def _gathered(*axes: str) -> dict[str, Axes]:
    """Every logical axis of a parameter over the same mesh axes: the first that fits is cut."""
    names = (
        "vocab", "per_layer_vocab", "experts", "width", "ffn", "expert_ffn",
        "heads", "kv_heads", "head", "layer", "per_layer",
    )  # fmt: skip
    return {name: axes for name in names}


def _tables(*axes: str) -> dict[str, Axes]:
    return {name: axes for name in TABLE_AXES}


_HEADS: dict[str, Axes] = {"heads": ("tensor",), "kv_heads": ("tensor",), "ffn": ("tensor",)}

PRESETS: dict[str, Preset] = {
    "fsdp": Preset(stored=_gathered("fsdp"), computed={}),
    "fsdp+tensor": Preset(
        stored=_gathered("fsdp") | _HEADS | _tables("fsdp", "tensor") | {"experts": ("tensor", "fsdp")},
        computed=_HEADS | {"experts": ("tensor",)},
        spare=_gathered("fsdp"),
    ),
    "fsdp+expert": Preset(
        stored=_gathered("fsdp", "expert") | {"experts": ("expert", "fsdp")},
        computed={"experts": ("expert",)},
    ),
    "decode": Preset(
        stored=_HEADS | _tables("tensor") | {"experts": ("expert", "tensor")},
        computed=_HEADS | {"experts": ("expert", "tensor")},
        spare={"width": ("tensor",)},
    ),
}  # fmt: skip
