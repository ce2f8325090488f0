"""Recipes and plans as JSON, there and back, and a recipe as a table.

    {"name": "mine", "summary": "", "families": ["dense"], "rules": [
        {"roles": ["attn_q", "attn_k"], "grid": {"format": "int4", "tile": 32}, "input": {"per": "token"}},
        {"path": "*", "grid": null}]}

Whatever equals its default is left out, and may be left out.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from gemma_qat.errors import InputError, nearest
from gemma_qat.numerics import Grid
from gemma_qat.quant.rules import Recipe, Rule


def to_json(value: Any) -> Any:
    """Returns a recipe, rule, plan or grid as what JSON can say, without what equals its default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {}
        for field in dataclasses.fields(value):
            mine = getattr(value, field.name)
            if field.default is dataclasses.MISSING or mine != field.default:
                out[field.name] = to_json(mine)
        return out
    if isinstance(value, frozenset):
        return sorted(value)
    return [to_json(part) for part in value] if isinstance(value, tuple) else value


def recipe_from_json(raw: Any, where: str = "recipe") -> Recipe:
    """Returns the recipe that `to_json` wrote, or that a person did.

    Raises: InputError naming the place in it and what is wrong, with the nearest name.
    """
    return from_json(raw, Recipe, where)


def read_recipe(path: Path) -> Recipe:
    """Returns the recipe in a JSON file.

    Raises: FileNotFoundError; InputError naming the file and what is wrong in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe file")
    try:
        raw = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    return recipe_from_json(raw, str(path))


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes a recipe as a JSON file that `read_recipe` reads back equal.

    Raises: InputError when `path` is a directory.
    """
    if path.is_dir():
        raise InputError(f"{path}: a directory given, the name of a file expected")
    path.write_text(json.dumps(to_json(recipe), indent=1) + "\n", "utf-8")


def recipe_text(name: str) -> str:
    """Returns what tells a recipe from others, to be digested: its name, of a JSON file what is in it.

    Raises: as `read_recipe`.
    """
    if not name.endswith(".json"):
        return name
    return json.dumps(to_json(read_recipe(Path(name))), sort_keys=True)


def table(recipe: Recipe) -> list[dict[str, str]]:
    """Returns a row of text per rule: which sites, on which grid, and what is rounded beside the weight."""
    return [
        {
            "sites": _sites(rule),
            "weights": described(rule.grid),
            "input": str(rule.input or "float"),
            "output": str(rule.output or "float"),
            "dot": rule.arithmetic + (" both ways" if rule.backward else ""),
        }
        for rule in recipe.rules
    ]


def described(grid: Grid | None) -> str:
    """Returns a grid in words: `int4 tile 32 bfloat16`."""
    if grid is None:
        return "float"
    tile = "per channel" if grid.tile is None else f"tile {grid.tile}"
    return f"{grid.format} {tile} {grid.scale_dtype}"


def _sites(rule: Rule) -> str:
    parts = ["any" if rule.roles is None else " ".join(sorted(rule.roles))]
    parts += [rule.path] if rule.path != "*" else []
    parts += [f"{rule.layer_kind} layers"] if rule.layer_kind else []
    if rule.shares_kv is not None:
        parts.append("KV-sharing layers" if rule.shares_kv else "layers with own KV")
    if rule.depth != (0.0, 1.0):
        parts.append(f"layers {rule.depth[0]:.0%} to {rule.depth[1]:.0%}")
    parts += [" ".join(sorted(rule.sizes))] if rule.sizes else []
    parts += ["where tiles fit"] if rule.where_it_fits else []
    return ", ".join(parts)


def from_json(raw: Any, kind: Any, where: str) -> Any:
    """Returns parsed JSON as a value of type `kind`: made of dataclasses, tuples, sets, mappings by name and scalars.

    Raises: InputError naming the place in it, below `where`, that does not fit the type or that a dataclass refuses.
    """
    origin = get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        inside = next(part for part in get_args(kind) if part is not type(None))
        return None if raw is None else from_json(raw, inside, where)
    if dataclasses.is_dataclass(kind):
        return _group(raw, kind, where)
    if origin is typing.Literal:
        return _choice(raw, get_args(kind), where)
    if origin in (frozenset, tuple) and isinstance(raw, list):
        element, *rest = get_args(kind)
        if origin is tuple and rest != [Ellipsis] and len(raw) != 1 + len(rest):
            raise InputError(f"{where}: {len(raw)} values given, {1 + len(rest)} expected")
        return origin(from_json(one, element, f"{where}[{i}]") for i, one in enumerate(raw))
    if origin in (dict, Mapping) and isinstance(raw, dict):
        _, element = get_args(kind)
        return {name: from_json(one, element, f"{where}.{name}") for name, one in raw.items()}
    if kind is float and type(raw) in (int, float):
        return float(raw)
    if kind in (bool, int, str) and type(raw) is kind:
        return raw
    raise InputError(f"{where}: {_shown(raw)} given, {getattr(kind, '__name__', kind)} expected")


def _shown(raw: Any) -> str:
    return reprlib.repr(raw)


def _choice(raw: Any, known: tuple[Any, ...], where: str) -> Any:
    if raw in known:
        return raw
    close = nearest(str(raw)[:80], map(str, known)) or ", ".join(map(str, known))
    raise InputError(f"{where}: unknown value {_shown(raw)} (nearest: {close})")


def _group(raw: Any, kind: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise InputError(f"{where}: {_shown(raw)} given, an object ({kind.__name__}) expected")
    hints = get_type_hints(kind)
    for name in raw:
        if name not in hints:
            close = nearest(name, hints) or ", ".join(hints)
            raise InputError(f"{where}: {kind.__name__} has no {name!r} (nearest: {close})")
    missing = dataclasses.MISSING
    for field in dataclasses.fields(kind):
        if field.default is missing and field.default_factory is missing and field.name not in raw:
            raise InputError(f"{where}: {kind.__name__} needs {field.name!r}")
    values = {name: from_json(one, hints[name], f"{where}.{name}") for name, one in raw.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
