"""Rules: what they match, in which order they decide, and what they refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from gemma_qat.errors import InputError
from gemma_qat.models import SIZES, declare, fit, static_scale_paths
from gemma_qat.numerics import Grid
from gemma_qat.quant import (
    RECIPE_NAMES,
    Activation,
    Backward,
    Parameter,
    Plan,
    Recipe,
    Rule,
    coverage,
    families_of,
    recipe_named,
    resolve,
)
from gemma_qat.quant.rules import HIGH

INT2, INT4, INT8 = (Grid(format=f"int{bits}") for bits in (2, 4, 8))


def _recipe(*rules: Rule) -> Recipe:
    return Recipe(name="trial", summary="", rules=rules, families=frozenset({"dense", "moe"}))


def _site(path: str, layer: int = 0, **more: object) -> Parameter:
    fields = {
        "path": path, "role": "ffn_up", "shape": (96, 5), "axes": ("width", "ffn"),
        "equation": "BTD,DF->BTF", "reduced": (0,), "layer": layer, "layer_kind": "sliding",
    }  # fmt: skip
    return Parameter(**{**fields, **more})  # type: ignore[arg-type]


SITES = (
    _site("layers/0/ffn/up/kernel"),
    _site("layers/1/ffn/up/kernel", 1, layer_kind="full"),
    _site("layers/2/ffn/up/kernel", 2, shares_kv=True),
    _site("layers/2/ffn/down/kernel", 2, shares_kv=True, role="ffn_down"),
    Parameter(path="layers/2/norm/weight", role="norm", shape=(96,), axes=("width",)),
)


def _formats(*rules: Rule, sites: Sequence[Parameter] = SITES) -> list[str]:
    plans = resolve(_recipe(*rules), sites, family="dense")
    return [plans[s.path].weight.format if s.path in plans else "-" for s in sites]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(path="layers/2/*", grid=INT2), ["int8", "int8", "int2", "int2", "-"]),
        (Rule(path="*/down/kernel", grid=INT2), ["int8", "int8", "int8", "int2", "-"]),
        (Rule(roles=frozenset({"ffn_up"}), grid=INT2), ["int2", "int2", "int2", "int8", "-"]),
        (Rule(layer_kind="full", grid=INT2), ["int8", "int2", "int8", "int8", "-"]),
        (Rule(shares_kv=True, grid=INT2), ["int8", "int8", "int2", "int2", "-"]),
        (Rule(shares_kv=False, grid=INT2), ["int2", "int2", "int8", "int8", "-"]),
        (
            Rule(shares_kv=True, roles=frozenset({"ffn_up"}), grid=None),
            ["int8", "int8", "-", "int8", "-"],
        ),
    ],
)
def test_what_a_rule_matches(rule: Rule, expected: list[str]) -> None:
    """If it fails, a site trains on another grid than its recipe says. Norms are no sites: no rule reaches them."""
    assert _formats(rule, Rule(grid=INT8)) == expected


def test_a_rule_in_the_shadow_of_another_is_an_error() -> None:
    with pytest.raises(InputError, match=r"recipe trial: rule 1 \(ffn_up at \*\) matches no site"):
        _formats(Rule(grid=INT8), Rule(roles=frozenset({"ffn_up"}), grid=INT4))
    # The other way round both decide something.
    narrow_first = (Rule(roles=frozenset({"ffn_up"}), grid=INT4), Rule(grid=INT8))
    assert _formats(*narrow_first) == ["int4", "int4", "int4", "int8", "-"]


def test_only_optional_rules_may_be_idle() -> None:
    idle = Rule(roles=frozenset({"expert_up"}), grid=INT4)
    with pytest.raises(InputError, match=r"rule 0 \(expert_up at \*\) matches no site"):
        _formats(idle, Rule(grid=INT8))
    assert _formats(dataclasses.replace(idle, optional=True), Rule(grid=INT8))[0] == "int8"


def test_a_site_without_a_rule_is_an_error_even_if_the_others_have_one() -> None:
    with pytest.raises(InputError, match=r"no rule for layers/2/ffn/down/kernel \(ffn_down\)"):
        _formats(Rule(roles=frozenset({"ffn_up"}), grid=INT8))


def test_tiles_are_checked_over_all_reduced_axes() -> None:
    out = _site("layers/0/attn/o/kernel", role="attn_o", shape=(4, 12, 7), reduced=(0, 1))
    assert _formats(Rule(grid=Grid(format="int4", tile=16)), sites=[out]) == ["int4"]
    with pytest.raises(InputError, match="attn/o/kernel: tile 32 does not divide .* axis of 48"):
        _formats(Rule(grid=Grid(format="q4_0")), sites=[out])
    kept = (Rule(roles=frozenset({"attn_o"}), grid=None), Rule(grid=INT8, optional=True))
    assert _formats(*kept, sites=[out]) == ["-"]


def test_tile_128_does_not_fit_the_experts_of_26b() -> None:
    config = SIZES["26b_a4b"]
    rules = _recipe(Rule(grid=Grid(format="int4", tile=128)))
    with pytest.raises(
        InputError, match=r"tile 128 does not divide the reduced axis of (704|2112)"
    ):
        resolve(rules, declare(config).values(), family=config.family)


@pytest.mark.parametrize("mode", ["recomputed", "learned", "frozen"])
def test_plans_say_where_scales_come_from(mode: str) -> None:
    plans = resolve(_recipe(Rule(grid=INT4)), SITES, family="dense", scales=mode)  # type: ignore[arg-type]
    assert set(plans.values()) == {Plan(weight=INT4, scales=mode)}  # type: ignore[arg-type]
    assert {plan.has_scale_leaf for plan in plans.values()} == {mode != "recomputed"}


def test_a_recipe_for_other_families_is_refused() -> None:
    with pytest.raises(InputError, match="trial does not apply to e2b .* meant for dense, moe"):
        resolve(_recipe(Rule(grid=INT4)), SITES, family="e2b")


@pytest.mark.parametrize("size", ["12b", "26b_a4b", "31b", "tiny_12b", "tiny_26b_a4b", "tiny_31b"])
def test_mobile_is_refused_in_one_line_where_it_was_not_released(size: str) -> None:
    family = SIZES[size].family
    message = (
        f"recipe mobile does not apply to {family} models: it is meant for e2b, e4b; "
        "the schema was released for E2B and E4B; mobile_like is its form for the others"
    )
    with pytest.raises(InputError) as caught:
        fit(SIZES[size], "mobile")
    assert str(caught.value) == message


def test_unknown_recipes_name_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown recipe 'q4-0'.*nearest: q4_0") as caught:
        recipe_named("q4-0", "dense")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_every_site_is_planned_or_kept_by_name(size: str, recipe: str) -> None:
    """If it fails, an array is left in float by silence, or an array that is no site got a plan."""
    if SIZES[size].family not in families_of(recipe):
        with pytest.raises(InputError, match=r"does not apply .* meant for .*; \w+"):
            fit(SIZES[size], recipe)
        return
    fitted = fit(SIZES[size], recipe)
    rules = recipe_named(recipe, fitted.config.family).rules
    declared = declare(fitted.config)
    sites = {path: p for path, p in declared.items() if p.is_site}
    assert all(p.role in ("norm", "scalar") for p in declared.values() if not p.is_site)
    last = max(p.layer for p in sites.values() if p.layer is not None)
    first = {
        path: next((r for r in rules if r.matches(p, layers=last + 1, size=size)), None)
        for path, p in sites.items()
    }
    kept = {path for path, rule in first.items() if rule is None or rule.grid is None}
    assert not kept & fitted.plans.keys()
    assert kept | fitted.plans.keys() == sites.keys()
    # Said by name, and not by a pattern that could grow; two roles are high unless named.
    assert all(sites[path].role in HIGH for path, rule in first.items() if rule is None)
    tables = {"embed", "per_layer_embed"} if recipe in ("w4a16", "int8_training") else set()
    assert {sites[path].role for path in kept} <= HIGH | tables
    assert ("26b" in size) == any("/experts/" in path for path in fitted.plans)


def test_what_cannot_be_done_is_refused() -> None:
    """If it fails, a plan says something that no contraction does."""
    eight, token, static = Grid(format="int8"), Activation(per="token"), Activation()
    with pytest.raises(ValueError, match=r"scale per token; given int8 static"):
        Plan(weight=eight, input=static, arithmetic="integer")
    with pytest.raises(ValueError, match=r"backward.drhs_bits of 3 given, 4 or 8 expected"):
        Backward(drhs_bits=3)
    rule = Rule(grid=eight, input=token, arithmetic="integer", backward=Backward())
    mine = Recipe(name="mine", summary="", rules=(rule,), families=frozenset({"moe"}))
    with pytest.raises(
        InputError, match=r"rule 0 gives layers/0/experts/\w+/kernel a quantized backward pass"
    ):
        fit(SIZES["tiny_26b_a4b"], mine)


@pytest.mark.parametrize("role", ["embed", "per_layer_embed"])
def test_tables_that_are_looked_up_have_no_activations(role: str) -> None:
    """A wide rule gives them its grid alone, as coverage shows; one for them alone is refused."""
    wide = Rule(grid=Grid(format="int8"), input=Activation(), output=Activation())
    mine = Recipe(
        name="mine", summary="", rules=(wide,), families=frozenset({"e2b"}), unties_head=True
    )
    fitted = fit(SIZES["tiny_e2b"], mine)
    rows = {row.site: row for row in coverage(declare(fitted.config).values(), fitted.plans)}
    path = "embed/table" if role == "embed" else next(p for p in rows if rows[p].role == role)
    assert rows[path].format == "int8" and rows[path].activations == ""
    assert rows["head/table"].activations == "in int8 static, out int8 static"
    assert not [scale for scale in static_scale_paths(fitted.plans) if scale.startswith(path)]
    narrow = dataclasses.replace(wide, roles=frozenset({role}))
    both = dataclasses.replace(mine, rules=(narrow, wide))
    with pytest.raises(InputError, match=f"rule 0 .* at {path}, but its rows are only looked up"):
        fit(SIZES["tiny_e2b"], both)
