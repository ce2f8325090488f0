"""Classes of sites: each site in one, and the recipe made of them resolves to what was chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_qat.errors import InputError
from gemma_qat.models import declare, fit, size_named
from gemma_qat.numerics import Grid
from gemma_qat.quant import Plan, read_recipe, write_recipe
from gemma_qat.quant.classes import grid_named, mixed_recipe, site_classes
from gemma_qat.quant.rules import HIGH

FORMATS = ("q4_0", "q8_0", "int4:32:bfloat16", "float")


@pytest.mark.parametrize("size", ["e2b", "tiny_26b_a4b"])
@pytest.mark.parametrize(("by", "parts"), [("role", 1), ("role", 3), ("layer", 1), ("site", 1)])
def test_a_recipe_of_classes_resolves_to_what_each_was_given(
    size: str, by: str, parts: int, tmp_path: Path
) -> None:
    """If it fails, what is proposed is another mix than the one that was measured, or leaves a site out."""
    config = size_named(size)
    sites = {path: p for path, p in declare(config).items() if p.is_site and p.role not in HIGH}
    classes = site_classes(declare(config).values(), {}, by=by, parts=parts, size=size)
    assert len({one.name for one in classes}) == len(classes)
    chosen = [(one, grid_named(FORMATS[i % 4])) for i, one in enumerate(classes)]
    wanted = {site.path: grid for one, grid in chosen for site in one.sites}
    assert sum(len(one.sites) for one in classes) == len(wanted) == len(sites)
    file = tmp_path / "mine.json"
    write_recipe(mixed_recipe("mine", "", chosen, family=config.family), file)
    assert len(read_recipe(file).rules) == len(classes)
    plans = fit(config, str(file)).plans
    assert {path: plan.weight for path, plan in plans.items()} == {
        path: grid for path, grid in wanted.items() if grid is not None
    }


def test_a_site_that_a_recipe_names_is_in_a_class() -> None:
    """If it fails, a recipe that quantizes the router is measured without it."""
    config = size_named("tiny_26b_a4b")
    path = next(path for path, p in declare(config).items() if p.role == "router")
    plans = {path: Plan(weight=Grid(format="int8"))}
    named = site_classes(declare(config).values(), plans)
    assert [one.sites[0].path for one in named if one.name == "router"] == [path]
    assert not [o for o in site_classes(declare(config).values(), {}) if o.name == "router"]


def test_formats_by_name() -> None:
    """If it fails, a candidate is another grid than it is called, or a typing mistake is a traceback."""
    assert grid_named("float") is None
    assert grid_named("int4:32:bfloat16") == Grid(format="int4", tile=32, scale_dtype="bfloat16")
    for text, said in (
        ("q40", "nearest: q4_0"), ("q4_0:64", "tile 64"), ("int4:x", "'x' is no number"), ("int4:0", "at least 1"),
        ("int4:32:float1", "unknown scale dtype"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            grid_named(text)
    with pytest.raises(InputError, match="nearest: layer"):
        site_classes([], {}, by="layers")
    with pytest.raises(InputError, match="more than 1 of roles alone"):
        site_classes([], {}, by="layer", parts=2)
