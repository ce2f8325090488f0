"""The decoder's layers: groups of equal periods, each group one scan.

The natural unit is the period of the local/global pattern. Layers are cut into consecutive periods; consecutive periods
with equal layers (shapes and plans) form a group whose leaves carry a leading axis of repeats, and the group is one
`lax.scan`: compile time does not grow with depth.

    E2B, 35 layers, period 5 (s s s s f):   | 2 x period | 1 x period (its K/V are read below) | 4 x KV-sharing period |

Layers that share keys and values read those of the last layer of their kind that owns some. The period that holds these
sources stands alone (a group of one), so that its K/V leave the loop once and are constants of the loops after it.

Caches of a group lie stacked, too, and go through its scan from layer to layer: as inputs and outputs of it they would
be cut out, put together and copied at every token.

In memory a leaf is `groups/<g>/<position in the period>/<name>` with the leading axis of repeats; outside (checkpoints,
recipes, coverage) it is `layers/<number>/<name>`, one layer each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
from jaxtyping import Array, Float

from gemma_qat.nn.attention import Context
from gemma_qat.nn.block import Block
from gemma_qat.nn.cache import KeyValues
from gemma_qat.nn.module import Leaves, Module, ModuleList, merge, split
from gemma_qat.nn.shapes import LayerShape
from gemma_qat.nn.taps import Taps, fresh
from gemma_qat.numerics import PackedArray, is_packed
from gemma_qat.quant.plan import Plans, within

Remat = Literal["none", "dots", "full", "offload"]
"""What the backward pass recomputes: nothing; all but the results of matrix products; all of a period; all of a period
but for named intermediates, which wait in host memory."""

Sources = dict[str, KeyValues]
"""Keys and values that KV-sharing layers read, by layer kind."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Consecutive equal periods: layers first .. first + repeats * len(period) - 1."""

    first: int
    repeats: int
    period: tuple[LayerShape, ...]
    sources: tuple[tuple[str, int], ...] = ()
    """(kind, position) of layers whose keys and values later layers read; only where repeats == 1."""

    def layer(self, repeat: int, position: int) -> int:
        """Returns the number of a layer."""
        return self.first + repeat * len(self.period) + position


def kv_sources(shapes: tuple[LayerShape, ...]) -> dict[str, int]:
    """Returns, by kind, the layer whose keys and values the KV-sharing layers of that kind read.

    Raises: ValueError when a sharing layer has no earlier layer of its kind that owns keys and values.
    """
    needed = {shape.kind for shape in shapes if shape.shares_kv}
    owners: dict[str, int] = {
        s.kind: i for i, s in enumerate(shapes) if not s.shares_kv and s.kind in needed
    }
    for kind in needed - owners.keys():
        raise ValueError(f"KV-sharing {kind} layers have no {kind} layer that owns keys and values")
    return owners


def schedule(shapes: tuple[LayerShape, ...], plans: Plans | None = None) -> tuple[Group, ...]:
    """Returns the groups of a stack; layers are equal when their shapes and their plans are.

    Layers that own keys and values and layers that share them are cut into periods separately, each section by the
    shortest period of its local/global pattern that divides it.
    """
    owning = sum(not shape.shares_kv for shape in shapes)
    sources = kv_sources(shapes)
    groups: list[Group] = []
    for start, stop in ((0, owning), (owning, len(shapes))):
        length = _period(tuple(shape.kind for shape in shapes[start:stop]))
        for first in range(start, stop, length or 1):
            layers = range(first, first + length)
            inside = tuple((kind, i - first) for kind, i in sources.items() if i in layers)
            group = Group(first, 1, tuple(shapes[i] for i in layers), inside)
            if groups and _continues(groups[-1], group, plans or {}):
                groups[-1] = dataclasses.replace(groups[-1], repeats=groups[-1].repeats + 1)
            else:
                groups.append(group)
    return tuple(groups)


def _period(kinds: tuple[str, ...]) -> int:
    for length in range(1, len(kinds) + 1):
        repeats = all(kind == kinds[i % length] for i, kind in enumerate(kinds))
        if len(kinds) % length == 0 and repeats:
            return length
    return 0


def _continues(last: Group, group: Group, plans: Plans) -> bool:
    if last.sources or group.sources or last.period != group.period:
        return False
    return all(
        within(plans, f"layers/{last.layer(0, j)}") == within(plans, f"layers/{group.first + j}")
        for j in range(len(group.period))
    )


class Period(Module):
    """One period of layers; its leaves may carry a leading axis that a scan runs over."""

    def __init__(self, group: Group, leaves: Leaves, plans: Plans) -> None:
        blocks = [
            Block(shape, leaves[str(j)], within(plans, f"layers/{group.first + j}"))
            for j, shape in enumerate(group.period)
        ]
        self.blocks = ModuleList(blocks)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        per_layer: Float[Array, "J B T P"] | None,
        sources: Sources,
        caches: list[KeyValues | None],
        taps: list[Taps] | None,
    ) -> tuple[Float[Array, "B T D"], list[KeyValues], list[KeyValues | None]]:
        """Returns (residual, keys and values of each layer, caches of each layer)."""
        seen: list[KeyValues] = []
        after: list[KeyValues | None] = []
        for j, block in enumerate(self.blocks):
            inner = None if taps is None else taps[j]
            per = None if per_layer is None else per_layer[j]
            source = sources.get(block.shape.kind) if block.shape.shares_kv else None
            x, kv, cache = block(x, context, per, source, caches[j], inner)
            seen.append(kv)
            after.append(cache)
        return x, seen, after


class Stack(Module):
    """All decoder layers."""

    def __init__(self, groups: tuple[Group, ...], leaves: Leaves, plans: Plans) -> None:
        self.schedule = groups
        self.groups = ModuleList(
            [Period(group, leaves[str(g)], plans) for g, group in enumerate(groups)]
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        per_layer: Float[Array, "L B T P"] | None = None,
        caches: list[Any] | None = None,
        taps: Taps | None = None,
        *,
        scan: bool = True,
        remat: Remat = "none",
        offload: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B T D"], list[Any] | None]:
        """Returns (residual after the last layer, caches after this call).

        `scan=False` runs the same groups as an unrolled loop; `remat` and `offload` say what is recomputed.
        """
        sources: Sources = {}
        after = []
        for g, group in enumerate(self.schedule):
            count = group.repeats * len(group.period)
            per = None if per_layer is None else per_layer[group.first : group.first + count]
            cache = [None] * len(group.period) if caches is None else caches[g]
            wrap = functools.partial(rematerialized, remat=remat, offload=offload)
            run = functools.partial(self._run, g, context, sources, scan=scan, wrap=wrap)
            x, seen, cache = run(x, per, cache, taps)
            sources |= {kind: seen[position] for kind, position in group.sources}
            after.append(cache)
        return x, None if caches is None else after

    def _run(
        self,
        g: int,
        context: Context,
        sources: Sources,
        x: jax.Array,
        per_layer: jax.Array | None,
        cache: list[Any],
        taps: Taps | None,
        *,
        scan: bool,
        wrap: Callable[..., Any],
    ) -> tuple[jax.Array, dict[int, KeyValues], list[Any]]:
        group = self.schedule[g]
        graph, state = split(self.groups[g])
        names = range(len(group.period))
        number = jax.numpy.arange(group.repeats)
        if per_layer is not None:
            per_layer = per_layer.reshape(group.repeats, len(group.period), *per_layer.shape[1:])

        packed, sliced = _apart(state)

        def body(carry: Any, slices: Any) -> tuple[Any, Any]:
            x, stacks = carry
            leaves, per, r = slices
            leaves = _together(leaves, packed, r)
            inner = None if taps is None else [fresh(taps) for _ in names]
            period = merge(graph, leaves)
            x, seen, after = period(x, context, per, sources, _of(stacks, r), inner)
            emitted = [seen[position].own() for _, position in group.sources]
            taken = None if inner is None else [dict(one) for one in inner]
            return (x, _of(after, None)), (emitted, taken)

        slices = (sliced, per_layer, number)
        (x, after), (emitted, inner) = _loop(
            wrap(body, scanned=scan and group.repeats > 1), (x, cache), slices, group.repeats, scan
        )
        if taps is not None:
            _spread(taps, inner, group)
        first = functools.partial(jax.tree.map, lambda leaf: leaf[0])
        kept = {
            position: first(kv) for (_, position), kv in zip(group.sources, emitted, strict=True)
        }
        return x, kept, after


def _of(caches: list[KeyValues | None], layer: Any) -> list[KeyValues | None]:
    return [None if one is None else one.of_layer(layer) for one in caches]


def _apart(state: Any) -> tuple[dict[int, PackedArray], Any]:
    """Returns (stacked packed leaves by place, the state without them).

    A scan would slice them, and a kernel needs its operand in one piece: a copy of every weight at every step. So they
    stay whole, and each layer says which of the stack it is.
    """
    leaves, tree = jax.tree.flatten(state, is_leaf=is_packed)
    packed = {place: leaf for place, leaf in enumerate(leaves) if is_packed(leaf)}
    rest = [None if is_packed(leaf) else leaf for leaf in leaves]
    return packed, jax.tree.unflatten(tree, rest)


def _together(sliced: Any, packed: dict[int, PackedArray], number: jax.Array) -> Any:
    """Returns the state of one period."""
    leaves, tree = jax.tree.flatten(sliced, is_leaf=lambda leaf: leaf is None)
    for place, leaf in packed.items():
        leaves[place] = dataclasses.replace(leaf, layer=number)
    return jax.tree.unflatten(tree, leaves)


def rematerialized(body: Any, *, remat: Remat, offload: tuple[str, ...], scanned: bool) -> Any:
    """Returns a period's function with what it keeps for the backward pass chosen by name.

    Outside a scan the compiler has to be kept from sharing the recomputed part with the first one.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        return body
    if remat == "dots":
        policy = policies.checkpoint_dots_with_no_batch_dims
    elif remat == "full":
        policy = policies.nothing_saveable
    else:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=list(offload),
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    return jax.checkpoint(body, policy=policy, prevent_cse=not scanned)


def _loop(step: Any, carry: Any, slices: Any, repeats: int, scan: bool) -> tuple[Any, Any]:
    if scan and repeats > 1:
        return jax.lax.scan(step, carry, slices)
    outs = []
    for r in range(repeats):
        carry, out = step(carry, jax.tree.map(lambda leaf, r=r: leaf[r], slices))
        outs.append(out)
    return carry, jax.tree.map(lambda *parts: jax.numpy.stack(parts), *outs)


def _spread(taps: Taps, stacked: list[Taps], group: Group) -> None:
    for j, inner in enumerate(stacked):
        for name, value in inner.items():
            for r in range(group.repeats):
                taps[f"layers/{group.layer(r, j)}/{name}"] = jax.tree.map(
                    lambda leaf, r=r: leaf[r], value
                )
