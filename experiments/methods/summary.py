"""Keeps the figures and the plot of finished sweeps here, and writes the tables of README.md from them.

python experiments/methods/summary.py dense=runs/compare_methods moe=runs/compare_methods_moe
python experiments/methods/summary.py          the tables and plots from the figures that are here
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from gemma_qat.evals import methods_by_recipe
from gemma_qat.sweep.tables import NOTE, over_recipes, recipe_tables

HERE = Path(__file__).resolve().parent
NAMES = ("dense", "moe")
METHOD = "qat_kl"


def main(arguments: Sequence[str] | None = None, folder: Path = HERE) -> None:
    """Copies what is named, draws the plots and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "sweeps", nargs="*", metavar="NAME=FOLDER", help="dense or moe, and its sweep"
    )
    for said in parser.parse_args(arguments).sweeps:
        name, _, sweep = said.partition("=")
        if name not in NAMES or not Path(sweep, "figures.json").is_file():
            parser.error(
                f"{said}: dense or moe, and the folder of a sweep with a figures.json expected"
            )
        shutil.copyfile(Path(sweep, "figures.json"), folder / f"{name}.json")
    readme = folder / "README.md"
    text = readme.read_text("utf-8")
    for name in NAMES:
        file = folder / f"{name}.json"
        if file.is_file():
            figures = json.loads(file.read_text("utf-8"))
            (folder / f"{name}.png").write_bytes(methods_by_recipe(figures, "png"))
            text = with_part(text, name, part(name, file))
    readme.write_text(text, "utf-8")


def part(name: str, file: Path) -> str:
    """Returns what README.md says of the figures in a file."""
    figures = json.loads(file.read_text("utf-8"))
    text, reference, where = figures["text"], figures["reference"], figures["environment"]
    machine = f"{where['device']}, Python {where['python']}, jax {where['jax']}"
    return "\n".join(
        [
            f"{text['documents']} files, {text['tokens']:,} tokens in rows of {text['length']}; the float reference "
            f"({reference['size']}) is at {reference['nll']['value']:.3f} nats a token. In brackets 95 % of "
            f"{figures['draws']} resamples of the files. {machine}.",
            "", f"What `{METHOD}` won back:", "", *over_recipes(figures, METHOD), "",
            f"![every method on every recipe]({name}.png)", "", *recipe_tables(figures), NOTE,
        ]
    )  # fmt: skip


def markers(name: str) -> tuple[str, str]:
    """Returns the lines that a part of README.md stands between."""
    return f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"


def with_part(text: str, name: str, new: str) -> str:
    """Returns a text with what stands between its markers replaced."""
    begin, end = markers(name)
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{new}\n\n{end}{after}"


if __name__ == "__main__":
    main()
