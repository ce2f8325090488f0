"""The five sizes of Gemma 4 and their tiny twins: one entry each.

Sources: `convert_gemma4_weights.py` and `convert_gemma4_unified_weights.py` in huggingface/transformers,
google-deepmind/gemma `gm/nn/gemma4`, MaxText `configs/models/gemma4-*.yml`; the parameter counts they give agree with
the bytes of the released files.
"""

from __future__ import annotations

from gemma_qat.errors import unknown
from gemma_qat.models.config import ModelConfig
from gemma_qat.nn.shapes import ExpertsShape
from gemma_qat.quant.sites import LayerKind


def pattern(layers: int, period: int) -> tuple[LayerKind, ...]:
    """Returns the kinds of `layers` layers, the last of every `period` global."""
    return tuple("full" if (i + 1) % period == 0 else "sliding" for i in range(layers))


_VOCAB = 262_144

SIZES: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        ModelConfig(
            name="e2b", layer_kinds=pattern(35, 5), vocab_size=_VOCAB, width=1536, query_heads=8, kv_heads=1,
            global_kv_heads=1, head_width=256, global_head_width=512, ffn_width=6144, shared_ffn_width=12288,
            window=512, shared_kv_layers=20, per_layer_width=256, per_layer_vocab=_VOCAB,
        ),
        ModelConfig(
            name="e4b", layer_kinds=pattern(42, 6), vocab_size=_VOCAB, width=2560, query_heads=8, kv_heads=2,
            global_kv_heads=2, head_width=256, global_head_width=512, ffn_width=10240,
            window=512, shared_kv_layers=18, per_layer_width=256, per_layer_vocab=_VOCAB,
        ),
        ModelConfig(
            name="12b", layer_kinds=pattern(48, 6), vocab_size=_VOCAB, width=3840, query_heads=16, kv_heads=8,
            global_kv_heads=1, head_width=256, global_head_width=512, ffn_width=15360,
            window=1024, key_equals_value=True, max_positions=262_144,
        ),
        ModelConfig(
            name="26b_a4b", layer_kinds=pattern(30, 6), vocab_size=_VOCAB, width=2816, query_heads=16, kv_heads=8,
            global_kv_heads=2, head_width=256, global_head_width=512, ffn_width=2112,
            experts=ExpertsShape(count=128, per_token=8, width=704),
            window=1024, key_equals_value=True, max_positions=262_144,
        ),
        ModelConfig(
            name="31b", layer_kinds=pattern(60, 6), vocab_size=_VOCAB, width=5376, query_heads=32, kv_heads=16,
            global_kv_heads=4, head_width=256, global_head_width=512, ffn_width=21504,
            window=1024, key_equals_value=True, max_positions=262_144,
        ),
        # Twins: the same design with every dimension small, all widths whole tiles of 32.
        ModelConfig(
            name="tiny_e2b", layer_kinds=pattern(6, 2), vocab_size=1024, width=128, query_heads=2, kv_heads=1,
            global_kv_heads=1, head_width=64, global_head_width=128, ffn_width=256, shared_ffn_width=512,
            window=64, shared_kv_layers=2, per_layer_width=32, per_layer_vocab=1024, max_positions=1024,
        ),
        ModelConfig(
            name="tiny_e4b", layer_kinds=pattern(6, 3), vocab_size=1024, width=96, query_heads=2, kv_heads=2,
            global_kv_heads=2, head_width=32, global_head_width=64, ffn_width=192,
            window=64, shared_kv_layers=3, per_layer_width=32, per_layer_vocab=1024, max_positions=1024,
        ),
        ModelConfig(
            name="tiny_12b", layer_kinds=pattern(6, 3), vocab_size=1024, width=96, query_heads=4, kv_heads=2,
            global_kv_heads=1, head_width=32, global_head_width=64, ffn_width=192,
            window=64, key_equals_value=True, max_positions=1024,
        ),
        ModelConfig(
            name="tiny_26b_a4b", layer_kinds=pattern(6, 3), vocab_size=1024, width=96, query_heads=4, kv_heads=2,
            global_kv_heads=2, head_width=32, global_head_width=64, ffn_width=96,
            experts=ExpertsShape(count=8, per_token=2, width=64),
            window=64, key_equals_value=True, max_positions=1024,
        ),
        ModelConfig(
            name="tiny_31b", layer_kinds=pattern(8, 4), vocab_size=1024, width=128, query_heads=4, kv_heads=4,
            global_kv_heads=2, head_width=32, global_head_width=64, ffn_width=256,
            window=64, key_equals_value=True, max_positions=1024,
        ),
    )
}  # fmt: skip

FULL_SIZES = ("e2b", "e4b", "12b", "26b_a4b", "31b")


def size_named(name: str) -> ModelConfig:
    """Returns the size called `name`.

    Raises: InputError naming the nearest sizes.
    """
    if name not in SIZES:
        raise unknown("size", name, SIZES)
    return SIZES[name]
