"""Coverage: a row for every stored array, and bytes that another formula and published files agree with."""

from __future__ import annotations

import math

import pytest

from gemma_qat.models import SIZES, Fitted, declare, fit, static_scale_paths
from gemma_qat.models.published import Estimate, published
from gemma_qat.quant import Parameter, Row, by_role, coverage, total_bytes

FLOAT = {"router", "per_layer_model_projection", "norm", "scalar"}


def _rows(size: str, recipe: str, float_bits: int = 16) -> tuple[Fitted, list[Row]]:
    fitted = fit(SIZES[size], recipe)
    rows = coverage(declare(fitted.config).values(), fitted.plans, float_bits=float_bits)
    return fitted, rows


@pytest.mark.parametrize(
    ("size", "recipe"), [*((s, "q4_0") for s in SIZES), ("e2b", "mobile"), ("tiny_e4b", "mobile")]
)
def test_a_row_for_every_stored_array(size: str, recipe: str) -> None:
    """If it fails, something is stored that no table shows."""
    fitted, rows = _rows(size, recipe)
    declared = declare(fitted.config)
    statics = set(static_scale_paths(fitted.plans))
    assert bool(statics) == (recipe == "mobile")
    assert [(r.site, r.role, r.shape) for r in rows if r.site not in statics] == [
        (p.path, p.role, p.shape) for p in declared.values()
    ]
    assert {r.site for r in rows if r.format == "float32"} == statics
    rounded = {r.site for r in rows if r.format not in ("float16", "float32")}
    assert rounded == fitted.plans.keys()
    assert math.isclose(sum(r.share for r in rows), 1, abs_tol=1e-9)
    table = by_role(rows)
    assert sum(line["count"] for line in table) == len(rows)
    assert math.isclose(sum(line["bytes"] for line in table), total_bytes(rows), rel_tol=1e-12)
    assert math.isclose(sum(line["share"] for line in table), 1, abs_tol=1e-9)
    assert [line["bytes"] for line in table] == sorted((t["bytes"] for t in table), reverse=True)


def test_a_table_by_hand() -> None:
    """Scales are counted: 32 weights cost 18 bytes as q4_0, a channel of 64 int4 codes 32 bytes and a float32."""
    site = Parameter(
        path="up", role="ffn_up", shape=(64, 3), axes=("width", "ffn"), equation="BTD,DF->BTF",
        reduced=(0,),
    )  # fmt: skip
    norm = Parameter(path="norm", role="norm", shape=(10,), axes=("width",))
    rows = coverage([site, norm], fit(SIZES["tiny_12b"], "q4_0").plans, float_bits=32)
    assert [(r.format, r.bits, r.bytes) for r in rows] == [
        ("float32", 32, 768),
        ("float32", 32, 40),
    ]
    plans = {"up": fit(SIZES["tiny_e2b"], "mobile").plans["layers/0/ffn/up/kernel"]}
    up, *statics, _ = coverage([site, norm], plans)
    assert (up.format, up.bits, up.bytes, up.share) == ("int4", 4.5, 108, 108 / 136)
    assert up.activations == "in int8 static, out int8 static"
    assert [(r.site, r.bytes) for r in statics] == [("up_input_scale", 4), ("up_output_scale", 4)]
    assert total_bytes([up], leave_out=frozenset({"ffn_up"})) == 0


@pytest.mark.parametrize(
    ("size", "gigabytes", "published"),
    [
        ("e2b", 2.624, 2.62), ("e4b", 4.238, 4.22), ("12b", 6.699, 6.72),
        ("26b_a4b", 14.210, 14.2), ("31b", 17.269, 17.3),
    ],
)  # fmt: skip
def test_q4_0_gigabytes(size: str, gigabytes: float, published: float) -> None:
    """Against another formula, and within 1 % of community GGUF files, which hold vocabulary and metadata too."""
    _, rows = _rows(size, "q4_0")
    by_hand = 0
    for parameter in declare(SIZES[size]).values():
        count = math.prod(parameter.shape)
        by_hand += 2 * count if parameter.role in FLOAT else count // 32 * 18
    assert total_bytes(rows) == by_hand
    assert round(by_hand / 1e9, 3) == gigabytes
    assert abs(by_hand / 1e9 / published - 1) < 0.01


@pytest.mark.parametrize("size", ["e2b", "e4b", "12b", "26b_a4b", "31b"])
def test_googles_memory_columns_are_taken_apart(size: str) -> None:
    """Both columns follow from one number of parameters, to the digit they are printed with."""
    parameters = sum(parameter.size for parameter in declare(SIZES[size]).values())
    for recipe in ("float", "q4_0", "q4_0_google"):
        known = published(recipe, size)[-1]
        assert isinstance(known, Estimate)
        assert f"{known.decoded:.1f}" == str(known.value)
        assert (
            0 < known.billions - parameters / 1e9 < 0.6
        )  # the encoders, the size's rounding included
    _, rows = _rows(size, "q4_0")
    line = published("q4_0", size)[0].line({"all": total_bytes(rows)}, parameters)
    assert "published" in line and "exact" not in line
    assert abs(float(line.rsplit(", ", 1)[1].rstrip("%"))) < 1


BITS = {
    "e2b": {"per_layer_embed": 4, "shared_ffn": 2},
    "e4b": {"per_layer_embed": 2, "shared_ffn": 4},
}


@pytest.mark.parametrize(
    ("size", "gibibytes", "published"), [("e2b", 0.836, "0.84"), ("e4b", 2.234, "2.2")]
)
def test_mobile_gibibytes(size: str, gibibytes: float, published: str) -> None:
    """Text only, head untied, without the per-layer table (which stays on flash): what Google's model cards say."""
    fitted, rows = _rows(size, "mobile")
    by_hand = 0.0
    for parameter in declare(fitted.config).values():
        role, count = parameter.role, math.prod(parameter.shape)
        channel = math.prod(parameter.shape[axis] for axis in parameter.reduced)
        bits = 4
        if role in ("embed", "head"):
            bits = 2
        elif role in ("per_layer_gate", "per_layer_projection"):
            bits = 8
        elif role.startswith("ffn") and parameter.shares_kv:
            bits = BITS[size]["shared_ffn"]
        if role in FLOAT:
            by_hand += 2 * count
        elif role != "per_layer_embed":
            by_hand += count * bits / 8 + 4 * count / channel
    by_hand += 4 * len(static_scale_paths(fitted.plans))
    found = total_bytes(rows, leave_out=frozenset({"per_layer_embed"}))
    assert math.isclose(found, by_hand, rel_tol=1e-12)
    assert round(found / 2**30, 3) == gibibytes
    assert f"{found / 2**30:.{len(published) - 2}f}" == published
    table = next(r for r in rows if r.role == "per_layer_embed")
    assert table.bits == BITS[size]["per_layer_embed"] + 32 / 256


MAP = {
    "embed": 2, "head": 2, "per_layer_gate": 8, "per_layer_projection": 8,
    "attn_q": 4, "attn_k": 4, "attn_v": 4, "attn_o": 4,
}  # fmt: skip


@pytest.mark.parametrize("size", ["e2b", "e4b", "tiny_e2b", "tiny_e4b"])
def test_the_mobile_bit_map(size: str) -> None:
    """One scale an output channel, -absmax on the lowest code, bits as the table in `recipes.py`."""
    fitted, rows = _rows(size, "mobile")
    special = BITS[fitted.config.family]
    found = {r.site: r.format for r in rows}
    for path, parameter in declare(fitted.config).items():
        role = parameter.role
        if role in FLOAT:
            assert found[path] == "float16"
            continue
        if role.startswith("ffn"):
            bits = special["shared_ffn"] if parameter.shares_kv else 4
        else:
            bits = special.get(role) or MAP[role]
        grid = fitted.plans[path].weight
        assert found[path] == f"int{bits}"
        assert (grid.tile, grid.scale_dtype, grid.divisor) == (None, "float32", 2 ** (bits - 1))
    shared = {p.layer for p in declare(fitted.config).values() if p.shares_kv}
    assert len(shared) == fitted.config.shared_kv_layers > 0
