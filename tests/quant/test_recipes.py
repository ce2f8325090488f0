"""Who gets which numbers: nothing is left out by silence, and bytes agree with what was published."""

from __future__ import annotations

import dataclasses

import pytest

from gemma_qat.errors import InputError
from gemma_qat.models import FULL_SIZES, SIZES, declare, fit
from gemma_qat.numerics import Grid
from gemma_qat.quant import Parameter, Recipe, Rule, coverage, recipe_named, resolve, total_bytes

KEPT = {"router", "per_layer_model_projection"}


def site(path: str, role: str, shape: tuple[int, ...] = (64, 8)) -> Parameter:
    return Parameter(
        path=path,
        shape=shape,
        axes=("width", "ffn"),
        role=role,
        equation="BTD,DF->BTF",
        reduced=(0,),
    )  # type: ignore[arg-type]


def recipe(*rules: Rule) -> Recipe:
    return Recipe(name="test", summary="", rules=rules, families=frozenset({"dense"}))


INT4 = Grid(format="int4")
INT8 = Grid(format="int8")


def test_the_first_rule_that_matches_decides() -> None:
    rules = recipe(Rule(path="*/1/*", grid=INT8), Rule(roles=frozenset({"ffn_up"}), grid=INT4))
    plans = resolve(
        rules, [site("layers/1/up", "ffn_up"), site("layers/2/up", "ffn_up")], family="dense"
    )
    assert {path: plan.weight.format for path, plan in plans.items()} == {
        "layers/1/up": "int8",
        "layers/2/up": "int4",
    }


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    rules = recipe(Rule(grid=INT4), Rule(roles=frozenset({"router"}), grid=None))
    with pytest.raises(InputError, match=r"rule 1 \(router at \*\) matches no site"):
        resolve(rules, [site("a", "ffn_up")], family="dense")
    optional = dataclasses.replace(rules.rules[1], optional=True)
    assert resolve(
        recipe(rules.rules[0], optional), [site("a", "ffn_up")], family="dense"
    ).keys() == {"a"}


def test_a_site_that_no_rule_names_is_an_error() -> None:
    rules = recipe(Rule(roles=frozenset({"ffn_up"}), grid=INT4))
    with pytest.raises(InputError, match=r"no rule for layers/0/x \(ffn_gate\)"):
        resolve(
            rules, [site("layers/0/up", "ffn_up"), site("layers/0/x", "ffn_gate")], family="dense"
        )


def test_a_tile_that_does_not_divide_names_the_site() -> None:
    rules = recipe(Rule(grid=Grid(format="int4", tile=48)))
    with pytest.raises(
        InputError, match="layers/0/up: tile 48 does not divide the reduced axis of 64"
    ):
        resolve(rules, [site("layers/0/up", "ffn_up")], family="dense")


def test_unknown_and_unfit_recipes() -> None:
    with pytest.raises(InputError, match="nearest: mobile"):
        recipe_named("mobil", "e2b")
    with pytest.raises(
        InputError, match="does not apply to dense models: it is meant for e2b, e4b"
    ):
        fit(SIZES["12b"], "mobile")


@pytest.mark.parametrize("name", SIZES)
def test_q4_0_covers_every_size(name: str) -> None:
    sites = {p.path: p for p in declare(SIZES[name]).values() if p.is_site}
    plans = fit(SIZES[name], "q4_0").plans
    assert {p.role for path, p in sites.items() if path not in plans} <= KEPT
    experts = {path for path in sites if "/experts/" in path}
    assert experts <= plans.keys()
    assert bool(experts) == ("26b" in name)


@pytest.mark.parametrize(
    ("name", "table", "shared"),
    [("e2b", 4, 2), ("e4b", 2, 4), ("tiny_e2b", 4, 2), ("tiny_e4b", 2, 4)],
)
def test_mobile_is_the_released_bit_map(name: str, table: int, shared: int) -> None:
    fitted = fit(SIZES[name], "mobile")
    assert not fitted.config.ties_head
    for path, p in declare(fitted.config).items():
        if not p.is_site:
            continue
        if p.role in KEPT:
            assert path not in fitted.plans
            continue
        bits = {
            "embed": 2,
            "head": 2,
            "per_layer_embed": table,
            "per_layer_gate": 8,
            "per_layer_projection": 8,
        }.get(p.role, 4)
        if p.role.startswith("ffn") and p.shares_kv:
            bits = shared
        grid = fitted.plans[path].weight
        assert (grid.format, grid.tile, grid.scale_dtype) == (f"int{bits}", None, "float32"), path


@pytest.mark.parametrize(
    ("name", "published"),
    [("e2b", 2.62), ("e4b", 4.22), ("12b", 6.72), ("26b_a4b", 14.2), ("31b", 17.3)],
)
def test_q4_0_bytes(name: str, published: float) -> None:
    """18 bytes per 32 weights, 2 per float; published sizes of all-Q4_0 GGUF files include vocabulary and metadata."""
    declared = declare(SIZES[name])
    plans = fit(SIZES[name], "q4_0").plans
    rows = coverage(declared.values(), plans)
    assert len(rows) == len(declared)
    assert abs(sum(row.share for row in rows) - 1) < 1e-9
    by_hand = sum(
        p.size // 32 * 18 if path in plans else 2 * p.size for path, p in declared.items()
    )
    assert total_bytes(rows) == by_hand
    assert abs(by_hand / 1e9 / published - 1) < 0.01


@pytest.mark.parametrize(("name", "gib"), [("e2b", 0.84), ("e4b", 2.2)])
def test_mobile_bytes_are_googles_text_only_column(name: str, gib: float) -> None:
    fitted = fit(SIZES[name], "mobile")
    rows = coverage(declare(fitted.config).values(), fitted.plans)
    found = total_bytes(rows, leave_out=frozenset({"per_layer_embed"})) / 2**30
    assert round(found, 2 if gib < 1 else 1) == gib


def test_full_sizes_have_the_counted_parameters() -> None:
    counts = {name: sum(p.size for p in declare(SIZES[name]).values()) for name in FULL_SIZES}
    assert counts == {
        "e2b": 4_628_569_379, "e4b": 7_463_013_418, "12b": 11_907_350_320,
        "26b_a4b": 25_233_141_790, "31b": 30_697_345_340,
    }  # fmt: skip
