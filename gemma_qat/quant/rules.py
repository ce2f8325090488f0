"""A recipe is an ordered list of rules; the first that matches a site gives it its plan.

    Recipe(name, rules=(Rule(roles={'attn_q', ...}, grid=Grid(...)), Rule(path='layers/*/ffn/*',
    layers=range(15), ...)))

Resolving happens against the parameters a model declares, before any array exists. A site that no rule matches is an
error, and so is a rule that matches nothing: being left out is only possible by saying so (`keep`).
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable

from gemma_qat.errors import InputError
from gemma_qat.numerics import Grid
from gemma_qat.quant.plan import Plan, Plans, ScaleMode
from gemma_qat.quant.sites import LayerKind, Parameter, Role


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Gives every site it matches the same grid; `grid=None` keeps the site in float, explicitly."""

    grid: Grid | None
    roles: frozenset[Role] | None = None
    path: str = "*"
    """Shell-style pattern over the parameter path."""
    layer_kind: LayerKind | None = None
    shares_kv: bool | None = None
    optional: bool = False
    """May match nothing: for roles that only some sizes have (experts, per-layer inputs)."""

    def matches(self, parameter: Parameter) -> bool:
        """Returns whether this rule speaks of `parameter`."""
        return (
            (self.roles is None or parameter.role in self.roles)
            and (self.layer_kind is None or parameter.layer_kind == self.layer_kind)
            and (self.shares_kv is None or parameter.shares_kv == self.shares_kv)
            and fnmatch.fnmatchcase(parameter.path, self.path)
        )

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
    unties_head: bool = False
    """Whether the output head is stored, and quantized, apart from the embedding."""


def resolve(
    recipe: Recipe,
    parameters: Iterable[Parameter],
    *,
    family: str,
    scales: ScaleMode = "recomputed",
) -> Plans:
    """Returns the plan of every quantized parameter, by path.

    Raises: InputError when the recipe is not meant for the family, when a site matches no rule, when a rule that is not
        optional decides no site, or when a tile does not divide a site's reduced axes.
    """
    if family not in recipe.families:
        fits = ", ".join(sorted(recipe.families))
        raise InputError(
            f"recipe {recipe.name} does not apply to {family} models: it is meant for {fits}"
        )
    plans: Plans = {}
    used: set[int] = set()
    for parameter in parameters:
        if not parameter.is_site:
            continue
        number, rule = _first_match(recipe, parameter)
        used.add(number)
        if rule.grid is not None:
            _check_tile(parameter, rule.grid)
            plans[parameter.path] = Plan(weight=rule.grid, scales=scales)
    for number, rule in enumerate(recipe.rules):
        if number not in used and not rule.optional:
            raise InputError(
                f"recipe {recipe.name}: rule {number} ({rule}) matches no site of this model"
            )
    return plans


def _first_match(recipe: Recipe, parameter: Parameter) -> tuple[int, Rule]:
    for number, rule in enumerate(recipe.rules):
        if rule.matches(parameter):
            return number, rule
    raise InputError(
        f"recipe {recipe.name}: no rule for {parameter.path} ({parameter.role}); add one, if only to keep it"
    )


def _check_tile(parameter: Parameter, grid: Grid) -> None:
    length = 1
    for axis in parameter.reduced:
        length *= parameter.shape[axis]
    try:
        grid.tiles(length, parameter.path)
    except ValueError as error:
        raise InputError(str(error)) from None
