"""A recipe is an ordered list of rules; the first that matches a site gives it its plan.

    Recipe(name, rules=(Rule(roles={'attn_q', ...}, grid=Grid(...), input=Activation()), Rule(path='layers/*/ffn/*',
    depth=(0.5, 1.0), grid=...)))

Resolving happens against the parameters a model declares, before any array exists. A site that no rule matches is an
error, and so is a rule that matches nothing: being left out is only possible by saying so (`grid=None`). Tables whose
rows are looked up take the grid of a wider rule and none of its activations, as coverage shows. Two roles are
high by default: the router and the per-layer model projection stay in float unless a rule names their role. Norms,
scalars and what is outside the text decoder are no sites.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Iterable
from typing import Literal

from gemma_qat.errors import InputError
from gemma_qat.numerics import Grid
from gemma_qat.quant.plan import (
    Activation,
    Backward,
    Gradient,
    Plan,
    Plans,
    ScaleMode,
    weight_only,
)
from gemma_qat.quant.sites import EXPERTS, LayerKind, Parameter, Role

HIGH: frozenset[Role] = frozenset({"router", "per_layer_model_projection"})
"""Roles that stay in float unless a rule names them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Gives every site it matches the same plan; `grid=None` keeps the site in float, explicitly."""

    grid: Grid | None
    input: Activation | None = None
    output: Activation | None = None
    arithmetic: Literal["float", "integer"] = "float"
    backward: Backward | None = None
    roles: frozenset[Role] | None = None
    path: str = "*"
    """Shell-style pattern over the parameter path."""
    layer_kind: LayerKind | None = None
    shares_kv: bool | None = None
    depth: tuple[float, float] = (0.0, 1.0)
    """Which layers, as fractions of their number: from the first, up to and without the second."""
    sizes: frozenset[str] | None = None
    """Sizes it speaks of; a tiny twin counts as its size."""
    where_it_fits: bool = False
    """Matches only sites whose reduced axes are whole tiles of the grid; the others fall to the next rule."""
    optional: bool = False
    """May match nothing: for roles that only some sizes have (experts, per-layer inputs)."""

    def __post_init__(self) -> None:
        if not 0 <= self.depth[0] < self.depth[1] <= 1:
            raise ValueError(f"depth {self.depth} given, fractions 0 <= from < to <= 1 expected")
        if self.grid is not None:
            self.plan()

    def plan(self, scales: ScaleMode = "recomputed", gradient: Gradient = "clipped") -> Plan:
        """Returns the plan it gives; its grid is not None."""
        assert self.grid is not None
        return Plan(
            weight=self.grid, scales=scales, gradient=gradient, input=self.input,
            output=self.output, arithmetic=self.arithmetic, backward=self.backward,
        )  # fmt: skip

    def matches(self, parameter: Parameter, *, layers: int = 0, size: str = "") -> bool:
        """Returns whether this rule speaks of `parameter`, in a model of `layers` layers called `size`."""
        named = parameter.role not in HIGH if self.roles is None else parameter.role in self.roles
        return (
            named
            and (self.layer_kind is None or parameter.layer_kind == self.layer_kind)
            and (self.shares_kv is None or parameter.shares_kv == self.shares_kv)
            and (self.sizes is None or size.removeprefix("tiny_") in self.sizes)
            and (self.depth == (0.0, 1.0) or self._deep(parameter.layer, layers))
            and fnmatch.fnmatchcase(parameter.path, self.path)
            and (not self.where_it_fits or self._fits(parameter))
        )

    def _deep(self, layer: int | None, layers: int) -> bool:
        return layer is not None and self.depth[0] <= layer / max(layers, 1) < self.depth[1]

    def _fits(self, parameter: Parameter) -> bool:
        try:
            _check_tile(parameter, self.grid)
        except InputError:
            return False
        return True

    def __str__(self) -> str:
        roles = "any role" if self.roles is None else ", ".join(sorted(self.roles))
        return f"{roles} at {self.path}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Rules that give every site of a model its plan."""

    name: str
    summary: str
    rules: tuple[Rule, ...]
    families: frozenset[str]
    """Model families it is meant for (see `models/sizes.py`)."""
    elsewhere: str = ""
    """Why it is not meant for the others, in one line."""
    unties_head: bool = False
    """Whether the output head is stored, and quantized, apart from the embedding."""
    cache: Activation | None = None
    """How keys and values are rounded, in every layer that has its own."""

    def refuse(self, family: str) -> None:
        """Refuses a family the recipe is not meant for.

        Raises: InputError saying for which it is, and why.
        """
        if family not in self.families:
            fits = ", ".join(sorted(self.families))
            why = f"; {self.elsewhere}" if self.elsewhere else ""
            raise InputError(
                f"recipe {self.name} does not apply to {family} models: it is meant for {fits}{why}"
            )


def resolve(
    recipe: Recipe,
    parameters: Iterable[Parameter],
    *,
    family: str,
    size: str = "",
    scales: ScaleMode = "recomputed",
    gradient: Gradient = "clipped",
    learn_activations: bool = False,
) -> Plans:
    """Returns the plan of every quantized parameter, by path.

    Raises: InputError when the recipe is not meant for the family, when a site matches no rule, when a rule that is not
        optional decides no site, when a tile does not divide a site's reduced axes, or when keys are to be rounded in a
        layer whose key projection is not quantized; when a rule names nothing but tables that are looked up and rounds
        more than their weights, or gives experts a quantized backward pass.
    """
    recipe.refuse(family)
    sites = [parameter for parameter in parameters if parameter.is_site]
    layers = 1 + max((s.layer for s in sites if s.layer is not None), default=-1)
    plans: Plans = {}
    used: set[int] = set()
    looked_up = _looked_up(sites)
    _refuse_rounded_tables(recipe, sites, looked_up, layers, size)
    for site in sites:
        number = _first_match(recipe, site, layers, size)
        rule = None if number is None else recipe.rules[number]
        used |= set() if number is None else {number}
        if rule is not None and rule.grid is not None:
            _check_tile(site, rule.grid)
            plan = rule.plan(scales, gradient)
            if plan.backward is not None and site.role in EXPERTS:
                raise InputError(
                    f"recipe {recipe.name}: rule {number} gives {site.path} a quantized backward pass, which the "
                    "ragged contraction of experts does not have"
                )
            plan = weight_only(plan) if site.path in looked_up else plan
            plans[site.path] = _learned(plan, learn_activations)
        if site.role == "attn_k" and recipe.cache is not None:
            plans[site.path] = _with_cache(recipe, plans.get(site.path), site, learn_activations)
    for number, rule in enumerate(recipe.rules):
        if number not in used and not rule.optional:
            raise InputError(
                f"recipe {recipe.name}: rule {number} ({rule}) matches no site of this model"
            )
    return plans


def _looked_up(sites: Collection[Parameter]) -> frozenset[str]:
    """Returns the tables whose rows are read and never multiplied: nothing flows in, and nothing is rounded."""
    untied = any(site.role == "head" for site in sites)
    roles = {"per_layer_embed", "embed"} if untied else {"per_layer_embed"}
    return frozenset(site.path for site in sites if site.role in roles)


def _refuse_rounded_tables(
    recipe: Recipe,
    sites: Collection[Parameter],
    looked_up: frozenset[str],
    layers: int,
    size: str,
) -> None:
    """Raises InputError for a rule that was written for look-up tables alone and rounds activations there.

    A rule that speaks of more gives such a table its grid alone, and coverage shows no activations at it.
    """
    for number, rule in enumerate(recipe.rules):
        if rule.grid is None or rule.plan() == weight_only(rule.plan()):
            continue
        named = [site.path for site in sites if rule.matches(site, layers=layers, size=size)]
        if named and looked_up.issuperset(named):
            raise InputError(
                f"recipe {recipe.name}: rule {number} ({rule}) rounds activations at {named[0]}, but its rows are only "
                "looked up: give it a grid alone"
            )


def _first_match(recipe: Recipe, site: Parameter, layers: int, size: str) -> int | None:
    for number, rule in enumerate(recipe.rules):
        if rule.matches(site, layers=layers, size=size):
            return number
    if site.role in HIGH:
        return None
    raise InputError(
        f"recipe {recipe.name}: no rule for {site.path} ({site.role}); add one, if only to keep it"
    )


def _learned(plan: Plan, learn: bool) -> Plan:
    def one(how: Activation | None) -> Activation | None:
        static = how is not None and how.is_static
        return dataclasses.replace(how, learned=learn) if how is not None and static else how

    return dataclasses.replace(
        plan, input=one(plan.input), output=one(plan.output), cache=one(plan.cache)
    )


def _with_cache(recipe: Recipe, plan: Plan | None, site: Parameter, learn: bool) -> Plan:
    if plan is None:
        raise InputError(
            f"recipe {recipe.name}: rounds keys and values, but {site.path} has no plan to carry it"
        )
    return _learned(dataclasses.replace(plan, cache=recipe.cache), learn)


def _check_tile(parameter: Parameter, grid: Grid | None) -> None:
    length = 1
    for axis in parameter.reduced:
        length *= parameter.shape[axis]
    try:
        if grid is not None:
            grid.tiles(length, parameter.path)
    except ValueError as error:
        raise InputError(str(error)) from None
