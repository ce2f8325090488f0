"""Classes of sites that are quantized alike, and the recipe that gives each a format.

A class is what one rule matches: all sites of a role (or those of a part of the depth), of a layer, or one site alone.
So a mixed recipe is the rules of the classes, each with the grid that was chosen for it, and resolves to just that.
Sites that recipes keep in float unless they name them (`rules.HIGH`) are in no class unless a recipe did.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from gemma_qat.errors import InputError, unknown
from gemma_qat.numerics import Grid
from gemma_qat.quant.coverage import coverage, total_bytes
from gemma_qat.quant.plan import Plan, Plans
from gemma_qat.quant.rules import HIGH, Recipe, Rule
from gemma_qat.quant.sites import Parameter, Role

BY = ("role", "layer", "site")
"""What sites of a class have in common."""

FLOAT = "float"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteClass:
    """Sites that one rule matches; the rule has no grid yet."""

    name: str
    rule: Rule
    sites: tuple[Parameter, ...]

    @property
    def weights(self) -> int:
        """Number of elements of all its sites."""
        return sum(site.size for site in self.sites)

    def bytes(self, grids: Mapping[str, Grid]) -> float:
        """Returns its stored bytes, scales included, with the sites in `grids` on them and the others in bfloat16."""
        plans = {s.path: Plan(weight=grids[s.path]) for s in self.sites if s.path in grids}
        return total_bytes(coverage(self.sites, plans))

    def on(self, grid: Grid | None) -> dict[str, Grid]:
        """Returns that grid for every site, none of float."""
        return {} if grid is None else {site.path: grid for site in self.sites}

    def fits(self, grid: Grid | None) -> bool:
        """Whether whole tiles of `grid` cover every site."""
        try:
            self.bytes(self.on(grid))
        except ValueError:
            return False
        return True


def site_classes(
    parameters: Iterable[Parameter], plans: Plans, *, by: str = "role", parts: int = 1, size: str = ""
) -> list[SiteClass]:  # fmt: skip
    """Returns classes that hold every site once, in the order of declaration.

    `parts` cuts the layers of every role into so many equal ranges. What lies outside the layers is by role.
    Raises: InputError for an unknown `by`, or parts of anything but roles.
    """
    if by not in BY:
        raise unknown("class of sites", by, BY)
    if parts < 1 or (parts > 1 and by != "role"):
        raise InputError(f"{parts} parts by {by}: at least 1 expected, more than 1 of roles alone")
    found = [p for p in parameters if p.is_site and (p.role not in HIGH or p.path in plans)]
    layers = 1 + max((s.layer for s in found if s.layer is not None), default=-1)
    classes = []
    for rule in dict.fromkeys(_rules(found, by, parts)):
        sites = tuple(s for s in found if rule.matches(s, layers=layers, size=size))
        if sites:
            classes.append(SiteClass(name=_name(rule, sites, by), rule=rule, sites=sites))
    return classes


def _rules(sites: Sequence[Parameter], by: str, parts: int) -> Iterator[Rule]:
    of_layer: dict[int, set[Role]] = {}
    for site in sites:
        if site.layer is not None:
            of_layer.setdefault(site.layer, set()).add(site.role)
    for site in sites:
        role = frozenset({site.role})
        if by == "site":
            yield Rule(grid=None, roles=role, path=site.path)
        elif site.layer is None:
            yield Rule(grid=None, roles=role)
        elif by == "layer":
            roles = frozenset(of_layer[site.layer])
            yield Rule(grid=None, roles=roles, path=f"layers/{site.layer}/*")
        else:
            for part in range(parts):
                yield Rule(grid=None, roles=role, depth=(part / parts, (part + 1) / parts))


def _name(rule: Rule, sites: Sequence[Parameter], by: str) -> str:
    first, last = sites[0], sites[-1]
    if by == "site":
        return first.path
    if by == "layer" and first.layer is not None:
        return f"layer {first.layer}"
    if rule.depth == (0.0, 1.0):
        return first.role
    return f"{first.role}, layers {first.layer} to {last.layer}"


def mixed_recipe(
    name: str, summary: str, chosen: Iterable[tuple[SiteClass, Grid | None]], *, family: str,
    unties_head: bool = False,
) -> Recipe:  # fmt: skip
    """Returns the recipe that gives each class its grid and rounds nothing but weights."""
    rules = tuple(dataclasses.replace(c.rule, grid=grid) for c, grid in chosen)
    return Recipe(
        name=name, summary=summary, rules=rules, families=frozenset({family}),
        unties_head=unties_head,
    )  # fmt: skip


def grid_named(text: str) -> Grid | None:
    """Returns the grid of `FORMAT`, `FORMAT:TILE` or `FORMAT:TILE:SCALE_DTYPE`; none of `float`.

    Raises: InputError for a format that is unknown, or that has not such a tile or scale.
    """
    if text == FLOAT:
        return None
    name, _, rest = text.partition(":")
    tile, _, scale = rest.partition(":")
    if tile and not tile.isdecimal():
        raise InputError(f"{text}: {tile!r} is no number of elements in a tile")
    try:
        return Grid(format=name, tile=int(tile) if tile else None, scale_dtype=scale)
    except ValueError as error:
        raise InputError(f"{text}: {error}") from None
