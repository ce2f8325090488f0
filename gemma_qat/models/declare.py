"""Every array of a model, declared once, as data.

Initialization, abstract trees, shardings, optimizer masks, manifests, name maps and coverage all derive from this list.
Paths are part of the checkpoint format.

Matrices start normal with standard deviation (reduced size)^(-1/2); a table that is looked up and multiplied
by the root of its width starts with (width)^(-1/2), so that rows have unit size after scaling. Norm weights
start at 1 but for the query norm: attention has no 1/sqrt(H) factor, the query norm's weight learns it, and
H^(-1/2) is where it starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gemma_qat.models.config import ModelConfig
from gemma_qat.nn.shapes import ExpertsShape, LayerShape
from gemma_qat.quant.sites import Parameter, Role


def declare(config: ModelConfig) -> dict[str, Parameter]:
    """Returns every stored array of the model by path, embeddings first, then layer by layer."""
    found = [*_outside(config)]
    for index in range(config.layers):
        found += _layer(config.layer_shape(index), index)
    return {parameter.path: parameter for parameter in found}


def parameter_count(config: ModelConfig) -> int:
    """Returns the number of elements of all stored arrays."""
    return sum(parameter.size for parameter in declare(config).values())


def _matrix(
    path: str, role: Role, equation: str, shape: tuple[int, ...], axes: tuple[str, ...],
    reduced: tuple[int, ...], **more: Any,
) -> Parameter:  # fmt: skip
    fan_in = 1
    for axis in reduced:
        fan_in *= shape[axis]
    return Parameter(
        path=path, role=role, equation=equation, shape=shape, axes=axes, reduced=reduced,
        init="normal", init_scale=fan_in**-0.5, **more,
    )  # fmt: skip


def _norm(path: str, length: int, axis: str, value: float = 1.0, **more: Any) -> Parameter:
    return Parameter(
        path=path, role="norm", shape=(length,), axes=(axis,), init_scale=value, **more
    )


def _outside(config: ModelConfig) -> Iterator[Parameter]:
    V, D, L, P = config.vocab_size, config.width, config.layers, config.per_layer_width
    table = ("vocab", "width")
    yield _matrix("embed/table", "embed", "BTD,VD->BTV", (V, D), table, (1,))
    if not config.ties_head:
        yield _matrix("head/table", "head", "BTD,VD->BTV", (V, D), table, (1,))
    if P:
        shape, axes = (config.per_layer_vocab, L, P), ("per_layer_vocab", "layer", "per_layer")
        path = "per_layer/embed/table"
        yield _matrix(path, "per_layer_embed", "lookup", shape, axes, (2,))
        path, axes = "per_layer/projection/kernel", ("width", "layer", "per_layer")
        yield _matrix(path, "per_layer_model_projection", "BTD,DLP->BTLP", (D, L, P), axes, (0,))
        yield _norm("per_layer/norm/weight", P, "per_layer")
    yield _norm("final_norm/weight", D, "width")


def _layer(shape: LayerShape, index: int) -> Iterator[Parameter]:
    at = f"layers/{index}"
    more: dict[str, Any] = {
        "layer": index, "layer_kind": shape.kind, "shares_kv": shape.shares_kv
    }  # fmt: skip
    yield from _attention(shape, f"{at}/attn", more)
    yield from _feed_forward(shape, f"{at}/ffn", more)
    norms = ["pre_attn_norm", "post_attn_norm", "pre_ffn_norm", "post_ffn_norm"]
    if shape.per_layer_width:
        D, P = shape.width, shape.per_layer_width
        path = f"{at}/per_layer"
        axes = ("width", "per_layer")
        yield _matrix(
            f"{path}/gate/kernel", "per_layer_gate", "BTD,DP->BTP", (D, P), axes, (0,), **more
        )
        axes = ("per_layer", "width")
        yield _matrix(
            f"{path}/projection/kernel",
            "per_layer_projection",
            "BTP,PD->BTD",
            (P, D),
            axes,
            (0,),
            **more,
        )
        norms.append("post_per_layer_norm")
    if shape.experts is not None:
        yield from _experts(shape, shape.experts, at, more)
        norms += ["post_dense_norm", "pre_experts_norm", "post_experts_norm"]
    for name in norms:
        yield _norm(f"{at}/{name}/weight", shape.width, "width", **more)
    yield Parameter(path=f"{at}/scalar", role="scalar", shape=(1,), axes=("one",), **more)


def _attention(shape: LayerShape, at: str, more: dict[str, Any]) -> Iterator[Parameter]:
    D, N, K, H = shape.width, shape.query_heads, shape.kv_heads, shape.head_width
    heads, kv_heads = ("width", "heads", "head"), ("width", "kv_heads", "head")
    yield _matrix(f"{at}/q/kernel", "attn_q", "BTD,DNH->BTNH", (D, N, H), heads, (0,), **more)
    if not shape.shares_kv:
        yield _matrix(
            f"{at}/k/kernel", "attn_k", "BTD,DKH->BTKH", (D, K, H), kv_heads, (0,), **more
        )
    if shape.owns_value:
        yield _matrix(
            f"{at}/v/kernel", "attn_v", "BTD,DKH->BTKH", (D, K, H), kv_heads, (0,), **more
        )
    axes = ("heads", "head", "width")
    yield _matrix(f"{at}/o/kernel", "attn_o", "BTNH,NHD->BTD", (N, H, D), axes, (0, 1), **more)
    yield _norm(f"{at}/q_norm/weight", H, "head", H**-0.5, **more)
    if not shape.shares_kv:
        yield _norm(f"{at}/k_norm/weight", H, "head", **more)


def _feed_forward(shape: LayerShape, at: str, more: dict[str, Any]) -> Iterator[Parameter]:
    D, F = shape.width, shape.ffn_width
    inward, outward = ("width", "ffn"), ("ffn", "width")
    yield _matrix(f"{at}/gate/kernel", "ffn_gate", "BTD,DF->BTF", (D, F), inward, (0,), **more)
    yield _matrix(f"{at}/up/kernel", "ffn_up", "BTD,DF->BTF", (D, F), inward, (0,), **more)
    yield _matrix(f"{at}/down/kernel", "ffn_down", "BTF,FD->BTD", (F, D), outward, (0,), **more)


def _experts(
    shape: LayerShape, experts: ExpertsShape, at: str, more: dict[str, Any]
) -> Iterator[Parameter]:
    D, E, F = shape.width, experts.count, experts.width
    yield _matrix(
        f"{at}/router/proj/kernel",
        "router",
        "BTD,DE->BTE",
        (D, E),
        ("width", "choices"),
        (0,),
        **more,
    )
    yield Parameter(path=f"{at}/router/scale", role="norm", shape=(D,), axes=("width",), **more)
    yield Parameter(
        path=f"{at}/router/per_expert_scale", role="scalar", shape=(E,), axes=("experts",), **more
    )
    inward, outward = ("experts", "width", "expert_ffn"), ("experts", "expert_ffn", "width")
    path = f"{at}/experts"
    yield _matrix(
        f"{path}/gate/kernel", "expert_gate", "CD,EDF->CF", (E, D, F), inward, (1,), **more
    )
    yield _matrix(f"{path}/up/kernel", "expert_up", "CD,EDF->CF", (E, D, F), inward, (1,), **more)
    yield _matrix(
        f"{path}/down/kernel", "expert_down", "CF,EFD->CD", (E, F, D), outward, (1,), **more
    )
