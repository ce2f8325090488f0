"""Recipes as files: what is written reads back equal, and what a person mistypes is one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from gemma_qat.errors import InputError
from gemma_qat.models import SIZES, fit
from gemma_qat.quant import (
    RECIPE_NAMES,
    Plan,
    Recipe,
    families_of,
    read_recipe,
    recipe_from_json,
    recipe_named,
    table,
    to_json,
    write_recipe,
)
from gemma_qat.quant.recipe_json import from_json

ALL: list[tuple[str, str]] = [(n, f) for n in RECIPE_NAMES for f in sorted(families_of(n))]


@pytest.mark.parametrize(("name", "family"), ALL)
def test_recipes_and_plans_read_back_equal(name: str, family: str, tmp_path: Path) -> None:
    """If it fails, a recipe or checkpoint that was written down is not the one that trained."""
    recipe = recipe_named(name, family)
    assert recipe_from_json(json.loads(json.dumps(to_json(recipe)))) == recipe
    write_recipe(recipe, tmp_path / "r.json")
    assert read_recipe(tmp_path / "r.json") == recipe
    size = next(c for c in SIZES.values() if c.family == family)
    by_name = fit(size, name, scales="learned", gradient="straight", learn_activations=True)
    by_file = fit(
        size,
        str(tmp_path / "r.json"),
        scales="learned",
        gradient="straight",
        learn_activations=True,
    )
    assert by_name.plans == by_file.plans
    for plan in set(by_name.plans.values()):
        assert from_json(json.loads(json.dumps(to_json(plan))), Plan, "p") == plan
    assert len(table(recipe)) == len(recipe.rules)


def test_a_recipe_of_ones_own_in_ten_lines() -> None:
    """The example of the docs: experts at 4 bits, the rest at 8 with int8 tokens, routers left alone."""
    recipe = recipe_from_json(
        {
            "name": "mine",
            "summary": "experts at 4 bits",
            "families": ["moe"],
            "rules": [
                {"path": "*/experts/*", "grid": {"format": "int4", "tile": 32}},
                {"roles": ["embed"], "grid": None},
                {"grid": {"format": "int8"}, "input": {"per": "token"}, "arithmetic": "integer"},
            ],
        }
    )
    plans = fit(SIZES["26b_a4b"], recipe).plans
    formats = {
        path.split("/", 2)[2]: plan.weight.format for path, plan in plans.items() if "/3/" in path
    }
    assert formats["experts/up/kernel"] == "int4" and formats["ffn/up/kernel"] == "int8"
    assert not any("router" in path or path == "embed/table" for path in plans)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"rules": [{"grid": {"format": "int5"}}]}, r"grid: unknown format 'int5'.*nearest: int"),
        ({"rules": [{"gird": None}]}, r"rules\[0\]: Rule has no 'gird' \(nearest: grid"),
        ({"rules": [{"grid": None, "roles": ["ffn_gat"]}]}, r"roles\[0\]: unknown value 'ffn_gat' \(nearest: ffn_gate"),
        ({"rules": [{}]}, r"rules\[0\]: Rule needs 'grid'"),
        ({"rules": 3}, r"rules: 3 given"),
        ({"rules": [{"grid": {"format": "int8"}, "input": {"bits": 3}}]}, "3 bits given, 4 or 8"),
        ({"rules": [{"grid": {"format": "int8"}, "arithmetic": "integer"}]}, "needs an input plan"),
        ({"rules": [{"grid": {"format": "int8"}, "arithmetic": "fast"}]}, "unknown value 'fast' .nearest: float"),
        ({"rules": [{"grid": None, "depth": [0.5, 0.2]}]}, "fractions 0 <= from < to <= 1"),
        ({"rules": [{"grid": None, "depth": [0.5]}]}, r"depth: 1 values given, 2 expected"),
        ({"rules": [{"grid": None, "depth": [0, 0.5, 1]}]}, r"depth: 3 values given, 2 expected"),
        ({"rules": [{"grid": {"format": "int8", "divisor": float("nan")}}]}, "divisor nan given, a finite positive"),
        ({"rules": [{"grid": {"format": "int8", "divisor": float("inf")}}]}, "divisor inf given, a finite positive"),
        ({"rules": [{"grid": {"format": "int8", "divisor": -8}}]}, "divisor -8.0 given, a finite positive"),
        ({"rules": [{"grid": {"format": "q4_0", "divisor": 8}}]}, "divisor 8.0 given, a finite negative"),
        ({"unties_head": 1}, "unties_head: 1 given, bool expected"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(change: dict, line: str) -> None:
    raw = to_json(recipe_named("q4_0", "dense")) | change
    with pytest.raises(InputError, match=line) as caught:
        recipe_from_json(raw, "mine.json")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("mine.json")


def test_rules_speak_of_sizes_that_exist() -> None:
    recipe = recipe_named("q4_0", "dense")
    wrong = dataclasses.replace(recipe.rules[0], sizes=frozenset({"12bb"}), optional=True)
    mine = dataclasses.replace(recipe, rules=(wrong, *recipe.rules))
    with pytest.raises(
        InputError, match=r"unknown size in a rule of recipe q4_0 '12bb'.*nearest: 12b"
    ):
        fit(SIZES["tiny_12b"], mine)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such recipe file"):
        recipe_named(str(tmp_path / "a.json"), "dense")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(InputError, match="b.json: not JSON"):
        recipe_named(str(tmp_path / "b.json"), "dense")
    only_moe = Recipe(
        name="m", summary="", rules=(), families=frozenset({"moe"}), elsewhere="it has experts"
    )
    write_recipe(only_moe, tmp_path / "c.json")
    with pytest.raises(InputError, match="a directory given, the name of a file expected"):
        write_recipe(only_moe, tmp_path)
    with pytest.raises(
        InputError, match="m does not apply to dense models: .* moe; it has experts"
    ):
        recipe_named(str(tmp_path / "c.json"), "dense")
