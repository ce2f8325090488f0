"""The recipes, by name.

| recipe | matrices | embedding, head | per-layer table | activations | keys, values |
|---|---|---|---|---|---|
| `q4_0` | Q4_0 | Q4_0 | Q4_0 | float | float |
| `q4_0+q8_0_acts` | Q4_0 | Q4_0 | Q4_0 | Q8_0 in, by tiles | float |
| `q4_0_google` | Q4_0 | Q6_K | Q6_K | float | float |
| `w4a16` | int4 tile 32, bfloat16 scale | float | float | float | float |
| `mobile` | 4, 2, 8 bits: see below | 2 bits, stored apart | 4 (E2B), 2 (E4B) | static int8 in, out | static int8 |
| `mobile_like` | int4, late feed-forwards int2 | int4, stored apart | - | static int8 in, out | static int8 |
| `w8a8` | int8 | int8 | int8 | int8 per token, integer dots | int8 per head and token |
| `w4a8` | int4 | int8 | int4 | int8 per token, integer dots | int8 per head and token |
| `int8_training` | int8, backward too | float | float | int8 per token, integer dots | float |
| `w2` | 2 bits without a zero | int4 | int4 | float | float |
| `ternary` | -1 0 1 | int4 | int4 | float | float |

"Late" is the last third of the layers. Where no tile is named there is one float32 scale per output channel (per row
for tables, per row and layer for the per-layer table). The router and the per-layer model projection stay in float
everywhere. Per-layer gates and projections are matrices for the 4-bit tile recipes and 8 bits for those with 2 bits.

`mobile` is the released schema: its bit map and its rounding of activations are part of what was trained.

| role | E2B | E4B |
|---|---|---|
| embed, head (stored apart) | 2 | 2 |
| per-layer table | 4 | 2 |
| attention q k v o | 4 | 4 |
| feed-forward, layers that own their K and V | 4 | 4 |
| feed-forward, KV-sharing (double-wide on E2B) layers | 2 | 4 |
| per-layer gate and projection | 8 | 8 |

Every quantized linear, the head included, has a static int8 scale for its input and one for its output; tables that are
looked up have none. Keys and values are rounded where a cache would hold them: keys after norm and rotation, values
after their norm, one static scale each per owning layer, and KV-sharing layers read the rounded ones. The released
files do not say where the rounding happens; this is the reading in which a prefill and a cached step see the same.

`q4_0+q8_0_acts` is `q4_0` with what llama.cpp does around it: before a Q4_0 matrix multiplies, its input is rounded to
Q8_0 (32 elements, float16 scale). The files of both are the same but for the recipe's name.

Absmax divisors (largest magnitude / scale) differ between tools, so each recipe names its own: 2^(bits-1) for `mobile`,
`mobile_like`, `w4a16` and tables (-absmax is on the grid, +absmax saturates by a step); 7.5 and 127.5, AQT's, for
`w4a8` and `int8_training`; 127 for `w8a8`. With learned scales they only say where learning starts.

Sources: the bit map in the `quantization_config` of google/gemma-4-E2B-it-qat-mobile-transformers as read by
huggingface/transformers `integrations/gemma_quant.py`; ggml-org/llama.cpp `llama-quant.cpp` for what stays in float and
for Q8_0 where 256 does not divide a row; compressed-tensors for `w4a16`; ParetoQ (arXiv 2502.02631) for `w2`; BitNet
b1.58 (arXiv 2402.17764) for `ternary`; google/aqt for `int8_training`.
"""

from __future__ import annotations

from pathlib import Path

from gemma_qat.errors import unknown
from gemma_qat.numerics import Grid
from gemma_qat.quant.plan import Activation, Backward
from gemma_qat.quant.recipe_json import read_recipe
from gemma_qat.quant.rules import Recipe, Rule
from gemma_qat.quant.sites import EXPERTS, Role

_ATTENTION: frozenset[Role] = frozenset({"attn_q", "attn_k", "attn_v", "attn_o"})
_FEED_FORWARD: frozenset[Role] = frozenset({"ffn_gate", "ffn_up", "ffn_down"})
_PER_LAYER: frozenset[Role] = frozenset({"per_layer_gate", "per_layer_projection"})
_TABLES: frozenset[Role] = frozenset({"per_layer_embed"})
_ENDS: frozenset[Role] = frozenset({"embed", "head"})
_ALL = frozenset({"dense", "e2b", "e4b", "moe"})

_STATIC = Activation(per="tensor")
_TOKEN = Activation(per="token")
_TILE = Activation(per="tile")


def _channel(bits: int) -> Grid:
    # The released convention puts -absmax on the lowest code at every width, 8 bits included.
    return Grid(format=f"int{bits}", divisor=2.0 ** (bits - 1))


def _q4_0(name: str, summary: str, acts: Activation | None = None) -> Recipe:
    grid = Grid(format="q4_0")
    return Recipe(
        name=name,
        summary=summary,
        families=_ALL,
        rules=(
            Rule(roles=frozenset({"embed"}), grid=grid, input=acts),
            Rule(roles=_TABLES, grid=grid, optional=True),
            Rule(roles=_PER_LAYER, grid=grid, input=acts, optional=True),
            Rule(roles=EXPERTS, grid=grid, input=acts, optional=True),
            Rule(roles=_ATTENTION, grid=grid, input=acts),
            Rule(roles=_FEED_FORWARD, grid=grid, input=acts),
        ),
    )


def _q4_0_google() -> Recipe:
    grid, fine, rest = Grid(format="q4_0"), Grid(format="q6_k"), Grid(format="q8_0")
    tables = _ENDS | _TABLES
    return Recipe(
        name="q4_0_google",
        summary="matrices as ggml Q4_0, embedding and per-layer table as Q6_K: Google's GGUF files",
        families=_ALL,
        rules=(
            Rule(roles=tables, grid=fine, where_it_fits=True, optional=True),
            Rule(roles=tables, grid=rest, optional=True),
            Rule(roles=_PER_LAYER, grid=grid, optional=True),
            Rule(roles=EXPERTS, grid=grid, optional=True),
            Rule(roles=_ATTENTION, grid=grid),
            Rule(roles=_FEED_FORWARD, grid=grid),
        ),
    )


def _w4a16() -> Recipe:
    grid = Grid(format="int4", tile=32, scale_dtype="bfloat16", divisor=8.0)
    return Recipe(
        name="w4a16",
        summary="matrices as int4 in tiles of 32 with bfloat16 scales; embedding, head and tables in float",
        families=_ALL,
        rules=(
            Rule(roles=frozenset({"embed"}), grid=None),
            Rule(roles=_TABLES, grid=None, optional=True),
            Rule(roles=_PER_LAYER, grid=grid, optional=True),
            Rule(roles=EXPERTS, grid=grid, optional=True),
            Rule(roles=_ATTENTION, grid=grid),
            Rule(roles=_FEED_FORWARD, grid=grid),
        ),
    )


def _static(roles: frozenset[Role], bits: int, **where: object) -> Rule:
    return Rule(roles=roles, grid=_channel(bits), input=_STATIC, output=_STATIC, **where)  # type: ignore[arg-type]


def _mobile(family: str, table_bits: int, shared_ffn_bits: int) -> Recipe:
    return Recipe(
        name="mobile",
        summary="the released mobile schema: 2/4/8-bit channels, static int8 activations, keys and values",
        families=frozenset({family}),
        elsewhere="the schema was released for E2B and E4B; mobile_like is its form for the others",
        unties_head=True,
        cache=_STATIC,
        rules=(
            Rule(roles=frozenset({"embed"}), grid=_channel(2)),
            _static(frozenset({"head"}), 2),
            Rule(roles=_TABLES, grid=_channel(table_bits)),
            _static(_PER_LAYER, 8),
            _static(_ATTENTION, 4),
            _static(_FEED_FORWARD, 4, shares_kv=False),
            _static(_FEED_FORWARD, shared_ffn_bits, shares_kv=True),
        ),
    )


def _mobile_like() -> Recipe:
    late = (2 / 3, 1.0)
    return Recipe(
        name="mobile_like",
        summary="the mobile schema's ideas for larger models: 4-bit channels, the last third of feed-forwards 2 bits",
        families=frozenset({"dense", "moe"}),
        elsewhere="E2B and E4B have the released schema itself, mobile",
        unties_head=True,
        cache=_STATIC,
        rules=(
            Rule(roles=frozenset({"embed"}), grid=_channel(4)),
            _static(frozenset({"head"}), 4),
            _static(_ATTENTION, 4),
            _static(_FEED_FORWARD, 2, depth=late),
            _static(_FEED_FORWARD, 4),
            _static(EXPERTS, 2, depth=late, optional=True),
            _static(EXPERTS, 4, optional=True),
        ),
    )


def _integer(
    roles: frozenset[Role], grid: Grid, backward: Backward | None = None, **more: object
) -> Rule:
    return Rule(
        roles=roles, grid=grid, input=_TOKEN, arithmetic="integer", backward=backward, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def _weights_and_tokens(name: str, bits: int, matrices: Grid, tables: Grid) -> Recipe:
    wide = Grid(format="int8", divisor=127.0)
    return Recipe(
        name=name,
        summary=f"int{bits} channels times int8 tokens in integer dots, int8 keys and values",
        families=_ALL,
        cache=_TOKEN,
        rules=(
            _integer(frozenset({"embed"}), wide),
            Rule(roles=_TABLES, grid=tables, optional=True),
            _integer(_PER_LAYER, wide, optional=True),
            _integer(EXPERTS, matrices, optional=True),
            _integer(_ATTENTION | _FEED_FORWARD, matrices),
        ),
    )


def _int8_training() -> Recipe:
    grid, back = Grid(format="int8", divisor=127.5), Backward()
    return Recipe(
        name="int8_training",
        summary="int8 dots forward and backward (AQT), gradients rounded stochastically; tables in float",
        families=frozenset({"dense", "e2b", "e4b"}),
        elsewhere="the ragged contraction of experts has no quantized backward pass in AQT",
        rules=(
            Rule(roles=frozenset({"embed"}), grid=None),
            Rule(roles=_TABLES, grid=None, optional=True),
            _integer(_PER_LAYER, grid, back, optional=True),
            _integer(_ATTENTION | _FEED_FORWARD, grid, back),
        ),
    )


def _two_bits(name: str, summary: str, grid: Grid) -> Recipe:
    return Recipe(
        name=name,
        summary=summary,
        families=_ALL,
        rules=(
            Rule(roles=frozenset({"embed"}), grid=_channel(4)),
            Rule(roles=_TABLES, grid=_channel(4), optional=True),
            Rule(roles=_PER_LAYER, grid=_channel(8), optional=True),
            Rule(roles=EXPERTS, grid=grid, optional=True),
            Rule(roles=_ATTENTION | _FEED_FORWARD, grid=grid),
        ),
    )


_RECIPES: dict[str, tuple[Recipe, ...]] = {
    "q4_0": (_q4_0("q4_0", "every matrix, embedding and per-layer table as ggml Q4_0"),),
    "q4_0+q8_0_acts": (
        _q4_0(
            "q4_0+q8_0_acts",
            "q4_0 with every matrix's input rounded to ggml Q8_0, as llama.cpp does before it multiplies",
            _TILE,
        ),
    ),
    "q4_0_google": (_q4_0_google(),),
    "w4a16": (_w4a16(),),
    "mobile": (_mobile("e2b", 4, 2), _mobile("e4b", 2, 4)),
    "mobile_like": (_mobile_like(),),
    "w8a8": (
        _weights_and_tokens(
            "w8a8", 8, Grid(format="int8", divisor=127.0), Grid(format="int8", divisor=127.0)
        ),
    ),
    "w4a8": (_weights_and_tokens("w4a8", 4, Grid(format="int4", divisor=7.5), _channel(4)),),
    "int8_training": (_int8_training(),),
    "w2": (
        _two_bits(
            "w2", "matrices at 2 bits without a zero, tables at 4", Grid(format="int2_no_zero")
        ),
    ),
    "ternary": (
        _two_bits("ternary", "matrices of -1, 0 and 1, tables at 4 bits", Grid(format="ternary")),
    ),
}

RECIPE_NAMES = tuple(_RECIPES)


def families_of(name: str) -> frozenset[str]:
    """Returns the model families the named recipe is meant for.

    Raises: InputError naming the nearest recipes.
    """
    if name not in _RECIPES:
        raise unknown("recipe", name, _RECIPES)
    return frozenset[str]().union(*(recipe.families for recipe in _RECIPES[name]))


def name_of(recipe: str, family: str) -> str:
    """Returns what checkpoints call a recipe that a person names, or gives as a JSON file."""
    return recipe_named(recipe, family).name if recipe.endswith(".json") else recipe


def recipe_named(name: str, family: str) -> Recipe:
    """Returns the recipe `name` as it is for models of `family`; a name that ends in `.json` is read from that file.

    Raises: InputError naming the nearest recipes, or the families the recipe is meant for.
    """
    if name.endswith(".json"):
        recipe = read_recipe(Path(name))
        recipe.refuse(family)
        return recipe
    everywhere = families_of(name)
    for recipe in _RECIPES[name]:
        if family in recipe.families:
            return recipe
    whole = _RECIPES[name][0]
    Recipe(name=name, summary="", rules=(), families=everywhere, elsewhere=whole.elsewhere).refuse(
        family
    )
    raise AssertionError("a family outside of all was not refused")
