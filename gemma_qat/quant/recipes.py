"""The recipes, by name.

`q4_0`: every matrix, embedding and per-layer table as ggml Q4_0 (tile 32, float16 scale), the form in which community
GGUF files of the Gemma 4 QAT checkpoints are packed. Only what no runtime quantizes stays in float: the per-layer model
projection (F16 in Google's files) and the router.

`mobile`: the weights of the mobile schema that was released for E2B and E4B, one float32 scale per output channel (per
row for tables, per row and layer for the per-layer table):

| role | E2B | E4B |
|---|---|---|
| embed, head (stored apart) | 2 | 2 |
| per-layer table | 4 | 2 |
| attention q k v o | 4 | 4 |
| feed-forward, layers that own their K and V | 4 | 4 |
| feed-forward, KV-sharing (double-wide on E2B) layers | 2 | 4 |
| per-layer gate and projection | 8 | 8 |
| per-layer model projection | float | float |

The released scheme also rounds activations and the KV cache to static int8; that half is not simulated yet.

Sources: the regex bit map in the `quantization_config` of google/gemma-4-E2B-it-qat-mobile-transformers as read by
huggingface/transformers `integrations/gemma_quant.py`; ggml-org/llama.cpp `llama-quant.cpp` for what stays in float.
"""

from __future__ import annotations

from gemma_qat.errors import InputError, unknown
from gemma_qat.numerics import Grid
from gemma_qat.quant.rules import Recipe, Rule
from gemma_qat.quant.sites import Role

_ATTENTION: frozenset[Role] = frozenset({"attn_q", "attn_k", "attn_v", "attn_o"})
_FEED_FORWARD: frozenset[Role] = frozenset({"ffn_gate", "ffn_up", "ffn_down"})
_EXPERTS: frozenset[Role] = frozenset({"expert_gate", "expert_up", "expert_down"})
_PER_LAYER: frozenset[Role] = frozenset({"per_layer_gate", "per_layer_projection"})
_TABLES: frozenset[Role] = frozenset({"per_layer_embed"})

_KEPT = (
    Rule(roles=frozenset({"router"}), grid=None, optional=True),
    Rule(roles=frozenset({"per_layer_model_projection"}), grid=None, optional=True),
)


def _q4_0() -> Recipe:
    grid = Grid(format="q4_0")
    return Recipe(
        name="q4_0",
        summary="every matrix, embedding and per-layer table as ggml Q4_0",
        families=frozenset({"dense", "e2b", "e4b", "moe"}),
        rules=(
            *_KEPT,
            Rule(roles=frozenset({"embed"}), grid=grid),
            Rule(roles=_TABLES | _PER_LAYER, grid=grid, optional=True),
            Rule(roles=_EXPERTS, grid=grid, optional=True),
            Rule(roles=_ATTENTION, grid=grid),
            Rule(roles=_FEED_FORWARD, grid=grid),
        ),
    )


def _mobile(family: str, table_bits: int, shared_ffn_bits: int) -> Recipe:
    def channel(bits: int) -> Grid:
        # The released convention puts -absmax on the lowest code at every width, 8 bits included.
        return Grid(format=f"int{bits}", divisor=2.0 ** (bits - 1))

    return Recipe(
        name="mobile",
        summary="the released mobile bit map (weights): 2/4/8 bits, float32 scale per output channel",
        families=frozenset({family}),
        unties_head=True,
        rules=(
            *_KEPT,
            Rule(roles=frozenset({"embed", "head"}), grid=channel(2)),
            Rule(roles=_TABLES, grid=channel(table_bits)),
            Rule(roles=_PER_LAYER, grid=channel(8)),
            Rule(roles=_ATTENTION, grid=channel(4)),
            Rule(roles=_FEED_FORWARD, shares_kv=False, grid=channel(4)),
            Rule(roles=_FEED_FORWARD, shares_kv=True, grid=channel(shared_ffn_bits)),
        ),
    )


_RECIPES: dict[str, tuple[Recipe, ...]] = {
    "q4_0": (_q4_0(),),
    "mobile": (_mobile("e2b", 4, 2), _mobile("e4b", 2, 4)),
}

RECIPE_NAMES = tuple(_RECIPES)


def recipe_named(name: str, family: str) -> Recipe:
    """Returns the recipe `name` as it is for models of `family`.

    Raises: InputError naming the nearest recipes, or the families the recipe is meant for.
    """
    if name not in _RECIPES:
        raise unknown("recipe", name, _RECIPES)
    for recipe in _RECIPES[name]:
        if family in recipe.families:
            return recipe
    fits = ", ".join(
        sorted(frozenset[str]().union(*(recipe.families for recipe in _RECIPES[name])))
    )
    raise InputError(f"recipe {name} does not apply to {family} models: it is meant for {fits}")
