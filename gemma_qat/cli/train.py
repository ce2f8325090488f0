"""Trains a config file, in float or on a recipe's grid; started again, it goes on where it stopped.

SIGTERM, USR1 (what Slurm sends before the time is over) or an interrupt from the keyboard ends the run after the step
at hand with everything saved and exit status 75; a second interrupt ends it at once. Before the first step there is
nothing to save: SIGTERM and USR1 end it at once with 75. Several processes share one run: --coordinator, or
launch/local_multiprocess.sh. --check trains nothing: it says whether the run would start, on this machine or another,
and what it would take.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gemma_qat.cli.checked import add_check_arguments, check, refuse_without_check

if TYPE_CHECKING:
    from gemma_qat.cli.starting import Starting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "config", nargs="?",
        help="a Python file with get_config(variant), such as configs/e2b_q4_0.py",
    )  # fmt: skip
    parser.add_argument(
        "overlays",
        nargs="*",
        default=[],
        metavar="path=value",
        help="such as train.steps=200 mesh.fsdp=8",
    )
    parser.add_argument(
        "--resume", metavar="RUN",
        help="go on with this run, a folder or a name in runs/, by its own config.json instead of CONFIG",
    )  # fmt: skip
    parser.add_argument(
        "--variant", default="default", help="default, or tiny: the same path in seconds"
    )
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0 when there are several; auto on TPU pods, Slurm and Open MPI",
    )
    parser.add_argument(
        "--show-config",
        action="store_true",
        help="print every value of the config and where it comes from, not only those that are no defaults",
    )
    parser.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    parser.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    add_check_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Trains; the first process prints what is asked for, where it runs, a line a report, and where checkpoints are."""
    from gemma_qat.cli.starting import answers_while_starting

    if arguments.check:
        return check(arguments)
    refuse_without_check(arguments)
    with answers_while_starting() as starting:
        return _train(arguments, starting)


def _train(arguments: argparse.Namespace, starting: Starting) -> int:
    import os

    import jax

    from gemma_qat.cli.asked import config_asked_for
    from gemma_qat.cli.console import progress, silent
    from gemma_qat.cli.report import page_of
    from gemma_qat.cli.told import asked_for, line_of, where_it_runs
    from gemma_qat.train import Point, is_first, join, stop_on_signals
    from gemma_qat.training import run as train

    source, base, config = config_asked_for(arguments)

    def heard(point: Point) -> None:
        print(line_of(point, jax.device_count()), flush=True)

    if arguments.coordinator:
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            # With more threads XLA runs the independent collectives of a program in an order of each process's own,
            # and gloo takes one message for another ("received data size doesn't match expected size").
            os.environ.setdefault("PJRT_NPROC", "1")
        join(arguments.coordinator, arguments.num_processes, arguments.process_id, os.environ)
        if jax.process_count() > 1:
            starting.joined()
    with (
        _together(),
        stop_on_signals(starting.over) as stop,
        progress(f"train {config.name}") if is_first() else silent() as report,
    ):
        if is_first():
            lines = [
                *asked_for(str(source), base, config, arguments.show_config),
                *where_it_runs(config),
            ]
            print("\n".join(lines), flush=True)
        trained = train(config, report, stop, (heard,))
    if is_first():
        step, loss = trained.curves["loss"][-1]
        folder = config.folder
        print(f"step {step}: {config.train.loss} {loss:.4f}   {folder / 'checkpoints'}")
        print(page_of(folder))
    return 0


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Ends this process at once when the block fails and it is one of several.

    The usual way out waits for the others, which may be gone or wait for this one.
    """
    import os

    import jax

    from gemma_qat.cli.console import say, trace
    from gemma_qat.errors import InputError, Stopped

    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        bad_input = isinstance(error, (InputError, FileNotFoundError))
        if not bad_input:
            trace(type(error), error, error.__traceback__)
        where = f"process {jax.process_index()} of {jax.process_count()}"
        say(RuntimeError(f"{where}: {error}"))
        os._exit(2 if bad_input else 1)
