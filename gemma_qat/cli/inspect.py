"""Shows what a recipe does to a size or a checkpoint: every site, its bits, bytes and share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "source", help="a size (e2b e4b 12b 26b_a4b 31b, tiny_e2b ...) or a checkpoint directory"
    )
    parser.add_argument(
        "--recipe",
        default=None,
        help="such as q4_0 or mobile, or a recipe's JSON file; without it a checkpoint's own, or float",
    )
    parser.add_argument(
        "--sites", action="store_true", help="a row for every stored array, not for every role"
    )
    parser.add_argument(
        "--digests",
        action="store_true",
        help="SHA-256 of every array of a checkpoint of another program; reads all of it",
    )
    parser.add_argument("--rules", action="store_true", help="the recipe's rules first")
    parser.add_argument(
        "--write-recipe",
        default=None,
        metavar="FILE",
        help="write the recipe as JSON, to start another from",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the coverage table, the totals, and what was published."""
    from pathlib import Path

    from rich.console import Console

    from gemma_qat import api
    from gemma_qat.quant import Row, by_role, write_recipe

    config, recipe, plans, notes = _source(arguments.source, arguments.recipe)
    rows = api.coverage(config, recipe) if plans is None else _rows(config, plans)
    console = Console(width=None if Console().is_terminal else 140)
    if arguments.rules or arguments.write_recipe:
        found = _with_rules(arguments.recipe or recipe, config.family)
        if arguments.rules:
            console.print(_rules(found))
        if arguments.write_recipe:
            write_recipe(found, Path(arguments.write_recipe))
            console.print(f"{arguments.write_recipe}: recipe {found.name}", highlight=False)
    shown = rows if arguments.sites else by_role(Row(**row) for row in rows)
    console.print(_coverage(f"{config.name} as {recipe}", shown))
    file = _gguf(config, recipe, plans)
    for line in [*_totals(rows), *file, *_published(config, recipe, rows), *notes]:
        console.print(line, highlight=False)
    for path, digest in _digests(arguments.source) if arguments.digests else ():
        print(f"{digest}  {path}")
    return 0


def _digests(source: str) -> Any:
    from pathlib import Path

    from gemma_qat.convert import digests, open_source
    from gemma_qat.errors import InputError

    if not Path(source).exists():
        raise InputError(f"{source}: --digests reads a checkpoint; a size has none")
    with open_source(Path(source)) as opened:
        yield from digests(opened)


def _with_rules(recipe: str, family: str) -> Any:
    """The recipe itself; a checkpoint that one of a person's own was used for has its plans, not its rules."""
    from gemma_qat.errors import InputError
    from gemma_qat.quant import RECIPE_NAMES, recipe_named

    if recipe == "float":
        raise InputError("float has no rules: name a recipe with --recipe")
    if recipe not in RECIPE_NAMES and not recipe.endswith(".json"):
        raise InputError(
            f"the rules of {recipe} are not in the checkpoint: give its file with --recipe FILE"
        )
    return recipe_named(recipe, family)


def _rows(config: Any, plans: Any) -> list[dict[str, Any]]:
    import dataclasses

    from gemma_qat.models import declare
    from gemma_qat.quant import coverage

    return [dataclasses.asdict(row) for row in coverage(declare(config).values(), plans)]


def _source(source: str, asked: str | None) -> tuple[Any, str, Any, list[str]]:
    """The model, the recipe's name, a checkpoint's own plans, and what there is to say of it."""
    from pathlib import Path

    from gemma_qat import api
    from gemma_qat.checkpoint.native import load_parameters
    from gemma_qat.checkpoint.store import read_manifest
    from gemma_qat.errors import InputError
    from gemma_qat.models import size_named, static_scale_paths, uncalibrated
    from gemma_qat.quant import name_of

    recipe = asked or "float"
    if not Path(source).exists():
        return size_named(source), recipe, None, []
    directory = api.resolve_checkpoint(source)
    if not (directory / "manifest.json").is_file():
        return _foreign(directory, asked)
    manifest = read_manifest(directory)
    if asked and manifest.recipe not in (None, name_of(asked, manifest.config.family)):
        raise InputError(
            f"{source}: recipe {asked} asked for, the checkpoint is {manifest.recipe}; another recipe is shown for a "
            "size or a float checkpoint"
        )
    total, notes = len(static_scale_paths(manifest.plans)), []
    if total:
        missing = uncalibrated(load_parameters(directory)[1], manifest.plans)
        means = "identity, as imported" if manifest.imported else "not calibrated"
        first = f" (first {missing[0]})" if missing else ""
        notes = [f"static scales: {total}, of which {len(missing)} are 0: {means}{first}"]
    if manifest.recipe is None:
        return manifest.config, recipe, None, notes
    return manifest.config, manifest.recipe, manifest.plans, notes


def _foreign(path: Any, asked: str | None) -> tuple[Any, str, Any, list[str]]:
    """A checkpoint of another program: read by names and headers, nothing of it in memory."""
    from gemma_qat.convert import described, open_source
    from gemma_qat.errors import InputError

    with open_source(path) as source:
        if source.recipe is None:
            return source.config, asked or "float", None, described(source)
        if asked and asked != source.recipe:
            raise InputError(f"{path}: recipe {asked} asked for, the checkpoint is {source.recipe}")
        return source.config, source.recipe, source.plans, described(source)


def _rules(recipe: Any) -> Any:
    from rich.table import Table

    from gemma_qat.quant import table

    out = Table(title=f"{recipe.name}: {recipe.summary}")
    rows = table(recipe)
    for name in ("rule", *rows[0]):
        out.add_column(name)
    for number, row in enumerate(rows):
        out.add_row(str(number), *row.values())
    out.caption = f"keys and values: {recipe.cache or 'float'}"
    return out


def _coverage(title: str, rows: Sequence[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for name in ("site", "format", "bits/weight", "bytes", "share", "arrays", "activations"):
        left = name in ("site", "format", "activations")
        table.add_column(name, justify="left" if left else "right")
    for row in rows:
        cells = [str(row["site"]), str(row["format"]), f"{row['bits']:.3f}", f"{row['bytes']:,.0f}"]
        table.add_row(*cells, f"{row['share']:.2%}", str(row.get("count", 1)), row["activations"])
    return table


def _totals(rows: Sequence[dict[str, Any]]) -> list[str]:
    total = sum(row["bytes"] for row in rows)
    without = sum(row["bytes"] for row in rows if row["role"] != "per_layer_embed")
    lines = [f"total {total:,.0f} bytes = {total / 1e9:.3f} GB = {total / 2**30:.3f} GiB"]
    if without != total:
        lines.append(f"without the per-layer table {without / 2**30:.3f} GiB")
    return lines


def _gguf(config: Any, recipe: str, plans: Any) -> list[str]:
    from gemma_qat.errors import InputError
    from gemma_qat.export.gguf import weights_only
    from gemma_qat.export.gguf_size import file_bytes
    from gemma_qat.models import Fitted, fit

    if recipe == "float":
        return []
    stored = None if plans is None else Fitted(config=config, recipe=recipe, plans=plans)
    fitted = stored or fit(config, recipe)
    try:
        size = file_bytes(fitted)
    except InputError as error:
        return [f"no GGUF form: {error}"]
    only = ", weights only" if weights_only(fitted.plans) else ""
    return [f"as a GGUF file {size:,} bytes, without the vocabulary{only}"]


def _published(config: Any, recipe: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    from gemma_qat.models import declare
    from gemma_qat.models.published import published

    sizes: dict[str, float] = {}
    for row in rows:
        sizes[row["role"]] = sizes.get(row["role"], 0.0) + row["bytes"]
    parameters = sum(parameter.size for parameter in declare(config).values())
    return [known.line(sizes, parameters) for known in published(recipe, config.name)]
