"""The decoder as two functions whose weights are arguments: what LiteRT's converter is given.

    prefill    tokens [1, T], input_pos [T], caches                 ->   caches
    decode     tokens [1, 1], input_pos [1], caches                 ->   logits [1, 1, V], caches

They are traced from the model's own layers. A weight is an argument of its own, [out, in] in float32, and nothing is
rounded around it: that the numbers behind an argument are codes of 2, 4 or 8 bits, and that the activations around it
are, is written into the converted graph (`quantize.py`). So the converter sees no weight, and its memory and time do
not depend on how many there are.

Caches hold int8 codes, [1, K, S, H], one slot a position; a call writes its T tokens from position input_pos[0] on.
What is written behind the last real token of a padded call is overwritten before a token sees it, and what would be
behind the last slot is dropped.

Names of signatures and of arguments are those LiteRT-LM looks for.

Source of the names: google-ai-edge/LiteRT-LM `runtime/executor/litert_compiled_model_executor_utils.cc`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from gemma_qat import kernels
from gemma_qat.errors import InputError
from gemma_qat.export.hub_rows import reduced_size
from gemma_qat.models import ModelConfig, declare
from gemma_qat.models.gemma4 import embedded, head_logits, head_name, per_layer_inputs
from gemma_qat.nn.attention import CACHES, Context
from gemma_qat.nn.block import Block
from gemma_qat.nn.cache import KeyValues, Steps
from gemma_qat.nn.contract import Weight
from gemma_qat.nn.module import nest
from gemma_qat.nn.norms import RMSNorm
from gemma_qat.nn.per_layer import PerLayerInputs
from gemma_qat.nn.rows import Rows, Tables
from gemma_qat.nn.stack import kv_sources
from gemma_qat.numerics.cache_codes import Coded
from gemma_qat.numerics.tiles import split_axes
from gemma_qat.quant import Parameter, scale_path
from gemma_qat.quant.activations import static_codes

PREFILL, DECODE = "prefill", "decode"
_HIGHEST = 127

TABLE = "per_layer/embed/table"
"""The one weight that several arguments make up: a table of each layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of one call of `prefill`, and slots of a cache: by default 1280, or as many as there are positions."""

    prefill: int = 128
    cache: int | None = None

    def slots(self, config: ModelConfig) -> int:
        """Returns the slots of a model's cache.

        Raises: InputError for lengths that do not fit one another or the model.
        """
        found = min(1280, config.max_positions) if self.cache is None else self.cache
        if not 1 <= self.prefill <= found <= config.max_positions:
            raise InputError(
                f"{self.prefill} tokens a prefill and {found} slots of a cache given: at least 1 token, no more than "
                f"there are slots, no more slots than the model has positions ({config.max_positions}) expected"
            )
        return found


@dataclasses.dataclass(frozen=True)
class Slots(KeyValues):
    """One layer's cache: int8 codes with a static scale, a slot for every position."""

    WRAPS: ClassVar[bool] = False

    def write(
        self, other: KeyValues, steps: Steps = (None, None), *, in_turn: bool = False
    ) -> Slots:
        """Returns the cache with the tokens of `other` (floats) at their positions, which follow one another."""
        del steps, in_turn
        at = other.positions[0, 0]
        return dataclasses.replace(
            self,
            keys=_written(self.keys, other.keys, at),
            values=_written(self.values, other.values, at),
        )


def _written(kept: Coded, new: jax.Array, at: jax.Array) -> Coded:
    codes = _turned(static_codes(new, kept.scale.reshape(1), _HIGHEST)[1])
    stored, tokens = _turned(kept.codes), codes.shape[2]
    slots = stored.shape[2]
    if tokens > 1:  # room for all: an update that went over the end would be moved to before it
        stored = jnp.concatenate([stored, jnp.zeros_like(codes)], axis=2)
    stored = jax.lax.dynamic_update_slice(stored, codes, (0, 0, at, 0))
    return dataclasses.replace(kept, codes=_turned(stored[:, :, :slots]))


def _turned(codes: jax.Array) -> jax.Array:
    """From slots before heads, as the model has them, to heads before slots, as they are stored, and back."""
    return jnp.swapaxes(codes, 1, 2)


def arguments(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every weight argument by name: matrices [out, in], the rest as declared.

    Names are checkpoint paths; those of the per-layer table have the number of a layer behind them. The static scales
    of keys and values are arguments, too.
    """
    found: dict[str, tuple[int, ...]] = dict.fromkeys(cache_scales(config), (1,))
    for path, parameter in declare(config).items():
        if path == TABLE:
            rows, layers, width = parameter.shape
            found |= {f"{path}/{index}": (rows, width) for index in range(layers)}
        elif parameter.is_site:
            found[path] = (math.prod(_out(parameter)), reduced_size(parameter))
        else:
            found[path] = parameter.shape
    return found


def parameter_of(name: str) -> tuple[str, int | None]:
    """Returns (checkpoint path, layer) of a weight argument; only those of the per-layer table are of one layer."""
    path, _, layer = name.rpartition("/")
    return (path, int(layer)) if path == TABLE else (name, None)


def cache_scales(config: ModelConfig) -> list[str]:
    """Returns the paths of the static scales of keys and values, two for each layer that has a cache."""
    return [_cache_scale(layer, name) for layer in owners(config) for name in CACHES]


def _cache_scale(layer: int, name: str) -> str:
    return scale_path(f"layers/{layer}/attn/k/kernel", name)


def _out(parameter: Parameter) -> tuple[int, ...]:
    lead, _, trail = split_axes(parameter.shape, parameter.reduced)
    return (*lead, *trail)


def leaves(config: ModelConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the model's leaves by checkpoint path, of weight arguments by name."""
    found: dict[str, Any] = {}
    for path, parameter in declare(config).items():
        if path == TABLE:
            _, layers, width = parameter.shape
            tables = (Rows(given[f"{path}/{index}"], (width,)) for index in range(layers))
            found[path] = Tables(tuple(tables))
        else:
            found[path] = Rows(given[path], _out(parameter)) if parameter.is_site else given[path]
    return found


def owners(config: ModelConfig) -> list[int]:
    """Returns the layers that have a cache, in order: the n-th is called kv_cache_k_n, kv_cache_v_n."""
    return [i for i, shape in enumerate(config.layer_shapes()) if not shape.shares_kv]


def cache_shapes(config: ModelConfig, slots: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every cache argument by name, keys first."""
    found: dict[str, tuple[int, ...]] = {}
    for kind in "kv":
        for number, layer in enumerate(owners(config)):
            shape = config.layer_shape(layer)
            found[f"kv_cache_{kind}_{number}"] = (1, shape.kv_heads, slots, shape.head_width)
    return found


def run(
    config: ModelConfig,
    given: Mapping[str, Any],
    tokens: jax.Array,
    input_pos: jax.Array,
    caches: Mapping[str, Any],
    *,
    logits: bool,
) -> dict[str, jax.Array]:
    """Returns the outputs of a signature by name, of its arguments.

    Shapes: tokens int32 [1, T]; input_pos int32 [T]; weights and caches as `arguments` and `cache_shapes` have them.
    """
    with kernels.using("reference"):
        return _run(config, given, tokens, input_pos, caches, logits)


def _run(
    config: ModelConfig, given: Mapping[str, Any], tokens: jax.Array, input_pos: jax.Array,
    caches: Mapping[str, Any], logits: bool,
) -> dict[str, jax.Array]:  # fmt: skip
    own = leaves(config, given)
    tree = nest(own)
    x = embedded(Weight("table", tree["embed"], (1,), None), tokens, config, "float32")
    per_layer: Any = [None] * config.layers
    if config.per_layer_width:
        inputs = PerLayerInputs(config.eps, tree["per_layer"], {})
        per_layer = per_layer_inputs(inputs, tokens, x, config)
    context = Context(input_pos[None], jnp.ones_like(tokens), padded=False)
    numbers = {layer: number for number, layer in enumerate(owners(config))}
    shared = kv_sources(config.layer_shapes())
    sources: dict[str, KeyValues] = {}
    out: dict[str, jax.Array] = {}
    for layer, shape in enumerate(config.layer_shapes()):
        block = Block(shape, tree["layers"][str(layer)], {})
        cache = static_cache(caches, given, layer, numbers[layer]) if layer in numbers else None
        source = sources.get(shape.kind) if shape.shares_kv else None
        x, kv, after = block(x, context, per_layer[layer], source, cache)
        if shared.get(shape.kind) == layer:
            sources[shape.kind] = kv
        if after is not None:
            out[f"kv_cache_k_{numbers[layer]}"] = _turned(after.keys.codes)
            out[f"kv_cache_v_{numbers[layer]}"] = _turned(after.values.codes)
    if logits:
        x = RMSNorm(tree["final_norm"], config.eps)(x)
        name = head_name(config)
        head = {f"{name}/table": own[f"{name}/table"]}
        out["logits"] = head_logits(config, head, {}, x)
    return out


def static_cache(
    caches: Mapping[str, Any], given: Mapping[str, Any], layer: int, number: int
) -> Slots:
    """Returns the cache of a layer, of cache arguments and weight arguments by name; `number` is that of its names."""
    keys, values = (
        Coded(
            codes=_turned(caches[f"kv_cache_{kind}_{number}"]),
            scale=given[_cache_scale(layer, name)].reshape(1, 1, 1),
            bits=8,
        )
        for kind, name in zip("kv", CACHES, strict=True)
    )
    positions = jnp.arange(keys.codes.shape[1], dtype=jnp.int32)[None]
    return Slots(keys, values, positions, jnp.ones_like(positions))


def stablehlo(
    config: ModelConfig, lengths: Lengths, signature: str
) -> tuple[str, list[str], list[str]]:
    """Returns (StableHLO of a signature, the names of its arguments, the names of its results).

    The text holds no weight.
    """
    logits = signature == DECODE
    tokens = 1 if logits else lengths.prefill
    struct = jax.ShapeDtypeStruct
    shapes = cache_shapes(config, lengths.slots(config))
    inputs = {
        "tokens": struct((1, tokens), jnp.int32),
        "input_pos": struct((tokens,), jnp.int32),
        **{name: struct(shape, jnp.int8) for name, shape in shapes.items()},
    }
    weights = {name: struct(shape, jnp.float32) for name, shape in arguments(config).items()}
    names = [*inputs, *weights]
    outputs = [*shapes, *(["logits"] if logits else [])]

    def flat(*values: jax.Array) -> list[jax.Array]:
        given = dict(zip(names, values, strict=True))
        caches = {name: given[name] for name in shapes}
        found = run(
            config, {name: given[name] for name in weights}, given["tokens"], given["input_pos"],
            caches, logits=logits,
        )  # fmt: skip
        return [found[name] for name in outputs]

    lowered = jax.jit(flat, keep_unused=True).lower(*inputs.values(), *weights.values())
    return lowered.as_text(dialect="stablehlo"), names, outputs
