"""Shows what a recipe does to a size or a checkpoint: every site, its bits, bytes and share."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shown:
    """What is shown: the model, the recipe's name, a checkpoint's own plans, and what there is to say of it."""

    config: Any
    recipe: str
    plans: Any = None
    notes: Sequence[str] = ()
    stored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Number types of the floats of a checkpoint by path, where it is shown as it is."""


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
        help="SHA-256 of every array of a checkpoint; of a converted one as it was converted, else all is read",
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

    found = _source(arguments.source, arguments.recipe)
    config, recipe, plans = found.config, found.recipe, found.plans
    rows = api.coverage(config, recipe) if plans is None else _rows(config, plans)
    console = Console(width=None if Console().is_terminal else 140)
    if arguments.rules or arguments.write_recipe:
        rules = _with_rules(arguments.recipe or recipe, config.family)
        if arguments.rules:
            console.print(_rules(rules))
        if arguments.write_recipe:
            write_recipe(rules, Path(arguments.write_recipe))
            console.print(f"{arguments.write_recipe}: recipe {rules.name}", highlight=False)
    stored = _as_stored(rows, found.stored)
    shown = stored if arguments.sites else by_role(Row(**row) for row in stored)
    console.print(_coverage(f"{config.name} as {recipe}", shown))
    file = _gguf(config, recipe, plans)
    for line in [*_totals(stored), *file, *_published(config, recipe, rows), *found.notes]:
        console.print(line, highlight=False)
    for path, digest in _digests(arguments.source) if arguments.digests else ():
        print(f"{digest}  {path}")
    return 0


def _as_stored(rows: Sequence[dict[str, Any]], stored: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows with floats in the number types that a checkpoint has them in."""
    import math

    import numpy as np

    out = []
    for row in rows:
        if row["site"] in stored:
            bits = 8.0 * np.dtype(stored[row["site"]]).itemsize
            size = math.prod(row["shape"]) * bits / 8
            row = row | {"format": stored[row["site"]], "bits": bits, "bytes": size}
        out.append(row)
    total = sum(row["bytes"] for row in out)
    return [row | {"share": row["bytes"] / total} for row in out]


def _digests(source: str) -> Any:
    from pathlib import Path

    from gemma_qat import api
    from gemma_qat.convert import digests, native_digests, open_source
    from gemma_qat.errors import InputError

    if not Path(source).exists():
        raise InputError(f"{source}: --digests reads a checkpoint; a size has none")
    directory = api.resolve_checkpoint(source)
    if (directory / "manifest.json").is_file():
        what, pairs = native_digests(directory)
        print(f"SHA-256 of the arrays {what}:")
        yield from pairs
        return
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


def _source(source: str, asked: str | None) -> _Shown:
    from pathlib import Path

    from gemma_qat import api
    from gemma_qat.checkpoint.native import load_parameters
    from gemma_qat.checkpoint.store import read_manifest
    from gemma_qat.checkpoint.stored import stored_dtypes
    from gemma_qat.convert import described_native
    from gemma_qat.errors import InputError
    from gemma_qat.models import size_named, static_scale_paths, uncalibrated
    from gemma_qat.quant import name_of

    recipe = asked or "float"
    if not Path(source).exists():
        return _Shown(config=size_named(source), recipe=recipe)
    directory = api.resolve_checkpoint(source)
    if not (directory / "manifest.json").is_file():
        return _foreign(directory, asked)
    manifest = read_manifest(directory)
    if asked and manifest.recipe not in (None, name_of(asked, manifest.config.family)):
        raise InputError(
            f"{source}: recipe {asked} asked for, the checkpoint is {manifest.recipe}; another recipe is shown for a "
            "size or a float checkpoint"
        )
    total, notes = len(static_scale_paths(manifest.plans)), described_native(directory)
    if total:
        missing = uncalibrated(load_parameters(directory)[1], manifest.plans)
        means = "identity, as imported" if manifest.imported else "not calibrated"
        first = f" (first {missing[0]})" if missing else ""
        notes += [f"static scales: {total}, of which {len(missing)} are 0: {means}{first}"]
    stored = stored_dtypes(directory)
    if manifest.recipe is None:
        return _Shown(
            config=manifest.config, recipe=recipe, notes=notes, stored={} if asked else stored
        )
    stored = {path: dtype for path, dtype in stored.items() if path not in manifest.plans}
    return _Shown(
        config=manifest.config, recipe=manifest.recipe, plans=manifest.plans, notes=notes,
        stored=stored,
    )  # fmt: skip


def _foreign(path: Any, asked: str | None) -> _Shown:
    """A checkpoint of another program: read by names and headers, nothing of it in memory."""
    from gemma_qat.convert import described, open_source
    from gemma_qat.errors import InputError

    with open_source(path) as source:
        stored = {leaf.path: leaf.dtype for leaf in source.leaves if leaf.path not in source.plans}
        if source.recipe is None:
            return _Shown(
                config=source.config, recipe=asked or "float", notes=described(source),
                stored={} if asked else stored,
            )  # fmt: skip
        if asked and asked != source.recipe:
            raise InputError(f"{path}: recipe {asked} asked for, the checkpoint is {source.recipe}")
        return _Shown(
            config=source.config, recipe=source.recipe, plans=source.plans,
            notes=described(source), stored=stored,
        )  # fmt: skip


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
