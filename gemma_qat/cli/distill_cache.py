"""Keeps a teacher's most likely words of every training row on disk, to distil from without running it again.

Parts are independent: run one a machine, `--part 2/4` the third of four.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "config", help="the config that will train: its data, and its teacher or start"
    )
    parser.add_argument("overlays", nargs="*", default=[], metavar="path=value")
    parser.add_argument("--variant", default="default", help="default, or tiny")
    parser.add_argument(
        "--out", required=True, help="folder, for teacher_cache=FOLDER when training"
    )
    parser.add_argument("--k", type=int, default=64, help="words kept of every token (64)")
    parser.add_argument("--part", default="0/1", help="which of how many parts, such as 2/4")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at a time (8)")


def run(arguments: argparse.Namespace) -> int:
    """Writes the part and prints where it is."""
    import re
    from pathlib import Path

    from gemma_qat.cli.console import progress
    from gemma_qat.cli.secrets import hide
    from gemma_qat.config import apply, load_config
    from gemma_qat.errors import InputError
    from gemma_qat.train.teacher_cache import Part
    from gemma_qat.training import cache_teacher

    if not re.fullmatch(r"\d+/\d+", arguments.part):
        raise InputError(f"--part {arguments.part}: PART/PARTS expected, such as 0/4")
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size}: at least 1 expected")
    index, count = map(int, arguments.part.split("/"))
    config = hide(apply(load_config(Path(arguments.config), arguments.variant), arguments.overlays))
    with progress() as report:
        out = cache_teacher(
            config, Path(arguments.out), k=arguments.k, part=Part(index=index, count=count),
            batch_size=arguments.batch_size, progress=report,
        )  # fmt: skip
    print(f"{out}: {arguments.k} words of every token; train with teacher_cache={arguments.out}")
    return 0
