"""Which config a command line asks for: a config file or a run's own, with overlays, its secrets hidden."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemma_qat.config import ExperimentConfig


def config_asked_for(
    arguments: argparse.Namespace,
) -> tuple[Path, ExperimentConfig, ExperimentConfig]:
    """Returns the file a config comes from, the config in it, and the same with overlays.

    Reads `config`, `overlays`, `variant` and, of verbs that have it, `resume`.
    Raises: InputError for none or two that are asked for, and as `load_config`, `apply` and `resumed` do.
    """
    from gemma_qat.cli.secrets import hide
    from gemma_qat.config import apply, load_config
    from gemma_qat.errors import InputError
    from gemma_qat.resume import resumed

    given, overlays = arguments.config, list(arguments.overlays)
    if arguments.resume is None:
        if given is None:
            raise InputError("a config file is expected, or --resume RUN")
        base = load_config(Path(given), arguments.variant)
        return Path(given), hide(base), hide(apply(base, overlays))
    if given is not None:
        overlays.insert(
            0, given
        )  # The first word after the options; a run's config leaves it free.
    if arguments.variant != "default":
        raise InputError(f"--variant {arguments.variant} and --resume: a run has one config only")
    for word in overlays:
        if "=" not in word:
            raise InputError(
                f"{word} and --resume: a run goes on by its own config.json, give one of the two"
            )
    file, base, config = resumed(arguments.resume, overlays)
    return file, hide(base), hide(config)
