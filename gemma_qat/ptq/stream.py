"""A float model is quantized layer by layer, and each layer sees what the quantized ones before it make.

    tables, per-layer projection      then   calibration batches in front of layer 0
    layer 0: moments of its inputs -> codes -> the batches behind it, run with those codes;   layer 1, ...
    head                              by the hidden states behind the last layer

Leaves are asked for when their turn comes, float32 while they are worked on, and let go; so are moments. Batches wait
between layers in host memory. What is there at a time is a layer, or a table as it is stored, and what was made of it.

Within a layer all sites are told what the float weights of their own layer make of its input. Telling each stage (q k
v, o, gate and up, down) what the codes of those before it make costs a pass for each, and on a tiny twin (KL to float,
x 1000; one seed) it was no better: q4_0 10.88 against 10.84, mobile 178 against 181, w2 81.3 against 79.6.

A tied table is multiplied at the end and looked up at the beginning: its moments are those of the float
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
from gemma_qat.ptq.layer import LayerTask, Quantized, Seen, finite
from gemma_qat.ptq.methods import Method
from gemma_qat.quant.plan import within

TIED_DAMPING = 0.5
"""Damping of a tied table at least, in means of the diagonal: a row that is looked up is wanted as it is.

KL to float x 1000 of q4_0 on a tiny twin: 10.88 at 0.01, 10.62 at 0.1, 10.33 at 0.5, 10.60 at 2, 11.49 at 10; 11.62
with the table rounded to nearest.
"""

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
        self.names = frozenset(self.parameters)  # asking a mapping for a path would read the array
        self.full = self.method.looks_at(self.config) == "full"
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
                small[path] = rows_of(piece.codes.get(path, leaf), ids if _is_table(path) else None)
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
        done = self._by_site(task) if self.method.layer is None else self.method.layer(task)
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

    def _by_site(self, task: LayerTask) -> Quantized:
        codes: dict[str, QArray] = {}
        notes: list[str] = []
        seen: dict[str, Seen] = {}
        if self.listens and task.plans:
            seen, told = task.seen(tuple(task.plans), full=self.full)
            notes += told
        for name, plan in task.plans.items():
            given = (task.leaves[name], plan.weight, task.reduced[name], seen.get(name))
            codes[name], said = self.method.site(*given, self.config)
            notes += [f"layers/{task.index}/{name}: {line}" for line in said]
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
        copied = path == "head/table" and path not in self.names
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
        return finite(_mean(found), "per_layer/projection/kernel")

    def _of_tied_head(self, ids: np.ndarray) -> Seen | None:
        """What a tied table is multiplied with in the float model; None where nobody asks."""
        tied = self.fitted.config.ties_head and "embed/table" in self.fitted.plans
        if not tied or not self.listens:
            return None
        small = {}
        for path in _before(self.declared):
            small[path] = rows_of(self._read(path), ids if _is_table(path) else None)
        flows = [jax.device_get(self._begin(small, ids, batch)) for batch in self.batches]
        for index in range(self.fitted.config.layers):
            flows = self._behind_float(index, flows)
        return self._of_hidden(flows)

    def _behind_float(self, index: int, flows: list[Flow]) -> list[Flow]:
        """The batches behind a layer of the float model; its leaves are gone when this returns."""
        at = f"layers/{index}/"
        leaves = {
            p[len(at) :]: jnp.asarray(self._read(p), jnp.float32)
            for p in self.declared
            if p.startswith(at)
        }
        return [jax.device_get(self.walk.layer(index, leaves, flow)) for flow in flows]

    def _of_hidden(self, flows: list[Flow]) -> Seen:
        norm = {"final_norm/weight": jnp.asarray(self._read("final_norm/weight"), jnp.float32)}
        found = []
        for flow in flows:
            hidden = self.walk.finish(norm, flow)
            found.append(moments_of(hidden, 1, jnp.asarray(flow.segments) > 0, full=self.full))
        head = "head/table" if "head/table" in self.declared else "embed/table"
        return finite(_mean(found), head)


def _before(declared: Mapping[str, Any]) -> list[str]:
    """Paths of what comes before the layers, in the order in which it is computed."""
    return [p for p in declared if p == "embed/table" or p.startswith("per_layer/")]


def _is_table(path: str) -> bool:
    return path.endswith("/table")


def rows_of(leaf: Any, ids: np.ndarray | None) -> jax.Array:
    """The values of an array, or of some rows of it, float32."""
    if ids is not None:  # A per-layer table may be shorter than the vocabulary: then its row 0.
        ids = np.where(ids < leaf.shape[0], ids, 0)
    if isinstance(leaf, QArray):
        if ids is not None:
            codes, scale = (jnp.asarray(array[ids]) for array in (leaf.codes, leaf.scale))
            leaf = dataclasses.replace(leaf, codes=codes, scale=scale)
        return leaf.dequantize()
    return jnp.asarray(leaf if ids is None else leaf[ids], jnp.float32)


def _mean(found: list[dict[str, jax.Array]]) -> Seen:
    total = jax.tree.map(lambda *parts: sum(parts), *found)
    count = total["count"]
    return Seen(moments=total["sum"] / jnp.maximum(count, 1), tokens=count)
