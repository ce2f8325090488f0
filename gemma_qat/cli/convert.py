"""Brings in a checkpoint of another format as a native one, array by array; killed, it goes on where it was."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "source", help="a directory or file of any format that is read, known by its contents"
    )
    parser.add_argument("--out", required=True, help="directory of the native checkpoint")
    parser.add_argument(
        "--carry",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="take along the tensors that are not the decoder's: vision, audio (default: from the hub's formats)",
    )
    parser.add_argument(
        "--recover-lattice",
        nargs="?",
        const="q4_0",
        default=None,
        metavar="RECIPE",
        help="find again the q4_0 codes and scales behind bfloat16 weights (q4_0, q4_0_google; default q4_0)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Converts, and says what came in and what was left out."""
    from collections import Counter

    from gemma_qat import api
    from gemma_qat.cli.console import transfer
    from gemma_qat.convert import Tally

    tally = Tally()
    with transfer() as report:
        found = api.convert(
            arguments.source, out=arguments.out, carry=arguments.carry,
            recover=arguments.recover_lattice, tally=tally, progress=report,
        )  # fmt: skip
    manifest, origin = found.manifest, found.origin
    went_on = f", {found.resumed / 1e9:.2f} GB of it before" if found.resumed else ""
    what = manifest.kind if manifest.recipe is None else f"{manifest.kind} ({manifest.recipe})"
    print(
        f"{arguments.out}: {manifest.config.name} in {what}, {found.bytes / 1e9:.2f} GB from {origin.format}{went_on}"
    )
    for line in tally.lines():
        print(line)
    if found.not_finite:
        print(
            f"not finite: {len(found.not_finite)} arrays hold inf or nan, first {found.not_finite[0]}"
        )
    for what, count in sorted(Counter(origin.left.values()).items()):
        there = "carried" if origin.carried and what in ("vision", "audio") else "left out"
        print(f"{there}: {count} tensors ({what})")
    return 0
