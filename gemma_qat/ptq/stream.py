"""A float model is quantized layer by layer, and each layer sees what the quantized ones before it make.

    tables, per-layer projection      then   calibration batches in front of layer 0
    layer 0: moments of its inputs -> codes -> the batches behind it, run with those codes;   layer 1, ...
    head                              by the hidden states behind the last layer

Leaves are asked for when their turn comes, float32 while they are worked on, and let go; so are moments. Batches wait
between layers in host memory. What is there at a time is a layer, or a table as it is stored, and what was made of it.

Within a layer sites are done in the order in which they are computed (`STAGES`), each stage with the codes of those
before it. A tied table is multiplied at the end and looked up at the beginning: its moments are those of the float
model's hidden states, which costs one more pass. Look-ups know no moments: rows do not share scales, so how often a
token occurs changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.models import Fitted, Flow, Layerwise, RunOptions, declare
from gemma_qat.models.gemma4 import embedded
from gemma_qat.nn.contract import Weight
from gemma_qat.nn.moments import moments_of
from gemma_qat.numerics import QArray, refuse_nonfinite
from gemma_qat.ptq.calibrate import Batch
from gemma_qat.ptq.config import PtqConfig
from gemma_qat.ptq.layer import LayerTask, Quantized, Seen
from gemma_qat.ptq.methods import Method
from gemma_qat.quant.plan import within

STAGES = (
    ("attn/q/kernel", "attn/k/kernel", "attn/v/kernel"),
    ("attn/o/kernel",),
    ("ffn/gate/kernel", "ffn/up/kernel", "router/proj/kernel", "experts/gate/kernel", "experts/up/kernel"),
    ("ffn/down/kernel", "experts/down/kernel"),
    ("per_layer/gate/kernel",),
    ("per_layer/projection/kernel",),
)  # fmt: skip
"""Sites of a layer in the order in which they are computed."""

TIED_DAMPING = 0.01
"""Damping of a tied table at least, in means of the diagonal: a row that is looked up is wanted as it is."""

_PART = 2**24
"""Elements of a table that are worked on at once."""

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """What is done: codes by site and what stays in float, by checkpoint path, and what there is to tell."""

    codes: dict[str, QArray] = dataclasses.field(default_factory=dict)
    floats: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(kw_only=True)
class Stream:
    """A quantization under way.

    `parameters` may read an array whenever it is asked for one; each is asked for once, or twice where a tied head is
    told what it is multiplied with.
    """

    parameters: Mapping[str, Any]
    fitted: Fitted
    method: Method
    config: PtqConfig
    batches: Sequence[Batch]
    options: RunOptions = RunOptions()
    progress: Progress | None = None
    done: int = 0

    def __post_init__(self) -> None:
        self.walk = Layerwise(self.fitted.config, {}, self.options)
        self.declared = declare(self.fitted.config)
        self.needs = self.method.looks_at(self.config)
        self.full = self.needs == "full"
        self.listens = self.method.wants_text(self.config)

    def pieces(self) -> Iterator[Piece]:
        """Yields the whole model in pieces: what comes before the layers, each layer, what comes behind.

        Raises: InputError naming a site whose weights, or scales, are not finite.
        """
        flows: list[Flow] = []
        yield from self._in_front(flows)
        for index in range(self.fitted.config.layers):
            piece, flows = self._layer(index, flows)
            yield piece
        yield from self._behind(flows)

    def _in_front(self, flows: list[Flow]) -> Iterator[Piece]:
        """Yields what comes before the layers; `flows` then holds the batches in front of layer 0."""
        ids = self._ids()
        tied = self._of_tied_head(ids)
        small: dict[str, Any] = {}
        for path in _before(self.declared):
            leaf, seen = self._read(path), tied if path == "embed/table" else None
            if path == "per_layer/projection/kernel" and self.listens and path in self.fitted.plans:
                seen = self._of_embedded(small["embed/table"], ids)
            piece = self._site(path, leaf, seen)
            if self.listens:
                small[path] = _rows(piece.codes.get(path, leaf), ids if _is_table(path) else None)
            yield piece
        if self.listens:
            flows += [jax.device_get(self._begin(small, ids, batch)) for batch in self.batches]

    def _layer(self, index: int, flows: list[Flow]) -> tuple[Piece, list[Flow]]:
        """Returns (a layer, the batches behind it)."""
        at = f"layers/{index}/"
        stored = {p[len(at) :]: self._read(p) for p in self.declared if p.startswith(at)}
        task = LayerTask(
            index=index, walk=self.walk, plans=within(self.fitted.plans, f"layers/{index}"),
            leaves={name: jnp.asarray(leaf, jnp.float32) for name, leaf in stored.items()},
            reduced={name: self.declared[at + name].reduced for name in stored},
            flows=flows, config=self.config,
        )  # fmt: skip
        for name in task.plans:
            refuse_nonfinite(task.leaves[name], at + name)
        done = self._by_stage(task) if self.method.layer is None else self.method.layer(task)
        for name, q in done.codes.items():
            self._check(at + name, q)
        last = index + 1 == self.fitted.config.layers
        if self.listens and not (last and not self._head_listens):
            flows = list(task.outputs(done.codes, done.changed))
        floats = {name: leaf for name, leaf in stored.items() if name not in task.plans}
        floats |= {name: leaf for name, leaf in done.changed.items() if name in floats}
        return Piece(
            codes={at + name: q for name, q in done.codes.items()},
            floats={at + name: leaf for name, leaf in floats.items()}, notes=done.notes,
        ), flows  # fmt: skip

    def _behind(self, flows: list[Flow]) -> Iterator[Piece]:
        """Yields what comes behind the layers."""
        norm = {"final_norm/weight": self._read("final_norm/weight")}
        yield Piece(floats=norm)
        if "head/table" in self.declared:
            seen = self._of_hidden(flows) if self._head_listens else None
            yield self._site("head/table", self._read("head/table"), seen)

    def _by_stage(self, task: LayerTask) -> Quantized:
        codes: dict[str, QArray] = {}
        notes: list[str] = []
        for stage in STAGES:
            names = [name for name in stage if name in task.plans]
            seen: dict[str, Seen] = {}
            if names and self.listens:
                seen, said = task.seen(names, codes, full=self.full)
                notes += said
            made = {}
            for name in names:
                grid, leaf = task.plans[name].weight, task.leaves[name]
                given = (leaf, grid, task.reduced[name], seen.get(name), self.config)
                made[name], said = self.method.site(*given)
                notes += [f"layers/{task.index}/{name}: {line}" for line in said]
            codes |= made
        return Quantized(codes=codes, notes=tuple(notes))

    def _site(self, path: str, leaf: Any, seen: Seen | None) -> Piece:
        """Returns an array that lies outside the layers; a table by rows, some at a time."""
        plan = self.fitted.plans.get(path)
        if plan is None:
            return Piece(floats={path: leaf})
        config = self.config
        if path == "embed/table" and seen is not None:
            config = dataclasses.replace(config, damping=max(config.damping, TIED_DAMPING))
        rows = leaf.shape[0]
        size = max(1, _PART // max(1, leaf.size // rows)) if _is_table(path) else rows
        made: list[QArray] = []
        notes: dict[str, None] = {}
        for start in range(0, rows, size):
            w = jnp.asarray(leaf[start : start + size], jnp.float32)
            refuse_nonfinite(w, path)
            q, said = self.method.site(w, plan.weight, self.declared[path].reduced, seen, config)
            made.append(q if rows <= size else jax.device_get(q))
            notes |= dict.fromkeys(said)
        q = made[0]
        if len(made) > 1:
            codes, scale = (
                np.concatenate([getattr(q, name) for q in made]) for name in ("codes", "scale")
            )
            q = dataclasses.replace(q, codes=codes, scale=scale)
        self._check(path, q)
        return Piece(codes={path: q}, notes=tuple(f"{path}: {line}" for line in notes))

    def _check(self, path: str, q: QArray) -> None:
        refuse_nonfinite(q.scale, f"{path}: scales as {q.grid.scale_dtype}")
        self.done += 1
        if self.progress:
            self.progress(f"ptq {self.method.name}", self.done, len(self.fitted.plans))

    @property
    def _head_listens(self) -> bool:
        return self.listens and "head/table" in self.fitted.plans

    def _read(self, path: str) -> Any:
        # A head of its own that the checkpoint does not have is a copy of the embedding.
        copied = path == "head/table" and path not in self.parameters
        return self.parameters["embed/table" if copied else path]

    def _ids(self) -> np.ndarray:
        """The tokens of all batches: only their rows of tables are needed to run them."""
        return np.unique([token for b in self.batches for token in np.unique(b["tokens"])])

    def _begin(self, small: Mapping[str, Any], ids: np.ndarray, batch: Batch) -> Flow:
        """A batch in front of layer 0, from the rows of tables that `ids` have."""
        walk, config = self.walk, self.walk.config
        if config.per_layer_width:
            own = dataclasses.replace(config, per_layer_vocab=len(ids))
            walk = dataclasses.replace(walk, config=own)
        tokens = np.searchsorted(ids, batch["tokens"]).astype(np.int32)
        return walk.begin(small, {**batch, "tokens": tokens})

    def _of_embedded(self, table: jax.Array, ids: np.ndarray) -> Seen:
        """What the projection of per-layer inputs is multiplied with."""
        weight, found = Weight("table", {"table": table}, (1,), None), []
        for batch in self.batches:
            tokens = jnp.asarray(np.searchsorted(ids, batch["tokens"]))
            x = embedded(weight, tokens, self.fitted.config, self.options.dtype)
            found.append(moments_of(x, 1, jnp.asarray(batch["segments"]) > 0, full=self.full))
        return _mean(found)

    def _of_tied_head(self, ids: np.ndarray) -> Seen | None:
        """What a tied table is multiplied with in the float model; None where nobody asks."""
        tied = self.fitted.config.ties_head and "embed/table" in self.fitted.plans
        if not tied or not self.listens:
            return None
        small = {}
        for path in _before(self.declared):
            small[path] = _rows(self._read(path), ids if _is_table(path) else None)
        flows = [jax.device_get(self._begin(small, ids, batch)) for batch in self.batches]
        for index in range(self.fitted.config.layers):
            at = f"layers/{index}/"
            leaves = {p[len(at) :]: self._read(p) for p in self.declared if p.startswith(at)}
            wide = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in leaves.items()}
            flows = [jax.device_get(self.walk.layer(index, wide, flow)) for flow in flows]
        return self._of_hidden(flows)

    def _of_hidden(self, flows: list[Flow]) -> Seen:
        norm = {"final_norm/weight": jnp.asarray(self._read("final_norm/weight"), jnp.float32)}
        found = []
        for flow in flows:
            hidden = self.walk.finish(norm, flow)
            found.append(moments_of(hidden, 1, jnp.asarray(flow.segments) > 0, full=self.full))
        return _mean(found)


def _before(declared: Mapping[str, Any]) -> list[str]:
    """Paths of what comes before the layers, in the order in which it is computed."""
    return [p for p in declared if p == "embed/table" or p.startswith("per_layer/")]


def _is_table(path: str) -> bool:
    return path.endswith("/table")


def _rows(leaf: Any, ids: np.ndarray | None) -> jax.Array:
    """The values of an array, or of some rows of it, float32."""
    if isinstance(leaf, QArray):
        if ids is not None:
            leaf = dataclasses.replace(leaf, codes=leaf.codes[ids], scale=leaf.scale[ids])
        return leaf.dequantize()
    return jnp.asarray(
        leaf if ids is None else leaf[np.where(ids < leaf.shape[0], ids, 0)], jnp.float32
    )


def _mean(found: list[dict[str, jax.Array]]) -> Seen:
    total = jax.tree.map(lambda *parts: sum(parts), *found)
    count = total["count"]
    return Seen(moments=total["sum"] / jnp.maximum(count, 1), tokens=count)
