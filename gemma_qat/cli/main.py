"""`gemma-qat VERB ...`: the frame around the verbs.

Bad input ends in one line on standard error and exit status 2; anything else that goes wrong is a bug and keeps its
traceback. Verbs are imported when they are called, so `--help` is quick.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from gemma_qat.cli.console import quiet, say
from gemma_qat.cli.secrets import safe
from gemma_qat.errors import RETRY, InputError, Stopped, nearest

MAY_PASS = {
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNRESET, errno.ECONNABORTED,
}  # fmt: skip
"""What a file system that lost its server or its bucket says: no bad input, which schedulers never start again."""

VERBS = {
    "quickstart": "train, quantize, measure, export and decode a tiny twin on this machine",
    "train": "train a config, in float or on a recipe's grid; resumes where it stopped",
    "runs": "list the runs in a directory: state, step, loss, age",
    "sweep": "train and quantize a grid of configs, compare them in one table; resumes too",
    "distill-cache": "keep a teacher's most likely words of every training row on disk",
    "self-generate": "write rows that a model says by itself, to distil from without text",
    "bench": "measure steps of training beside a float step, or packed decoding beside floats",
    "ptq": "quantize a checkpoint without training it: rtn, mse, percentile, gptq, awq",
    "calibrate": "measure the static scales of activations, keys and values on text",
    "convert": "bring in a checkpoint of another format, array by array",
    "inspect": "show every site of a size or checkpoint under a recipe: bits, bytes, share",
    "evaluate": "measure checkpoints against a reference on text files",
    "report": "make one page of runs and evaluations: quality, curves, coverage, speed",
    "export": "write a checkpoint for llama.cpp, vLLM, transformers, without touching a code",
    "decode": "generate from a checkpoint",
    "plan": "compile a training step for a TPU slice that is not there: memory, FLOPs, time",
    "launch": "what the scripts in launch/ are made of: machines, manifests, processes",
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message in one line and exits with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _top() -> argparse.ArgumentParser:
    from gemma_qat import __version__

    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {name:<{width}}{summary}" for name, summary in VERBS.items())
    parser = _Parser(
        prog="gemma-qat",
        usage="gemma-qat VERB ...",
        description="Quantization-aware training of Gemma 4 on the grid that is deployed.",
        epilog=f"verbs:\n{verbs}\n\ngemma-qat VERB --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gemma-qat {__version__}")
    parser.add_argument("verb", nargs="?", help=argparse.SUPPRESS)
    return parser


def _run(prog: str, module: ModuleType, arguments: Sequence[str]) -> int:
    parser = _Parser(prog=prog, description=module.__doc__)
    module.add_arguments(parser)
    command: list[str] = []
    if getattr(module, "RUNS_A_COMMAND", False) and "--" in arguments:
        cut = list(arguments).index("--")
        arguments, command = arguments[:cut], list(arguments[cut + 1 :])
    # Intermixed: overlays may stand before options and after them.
    given = parser.parse_intermixed_args(arguments)
    if getattr(module, "RUNS_A_COMMAND", False):
        if not command:
            parser.error("a command is expected after --")
        given.command = command
    return module.run(given)


def _act(verb: str, module: ModuleType, arguments: Sequence[str]) -> int:
    """Runs one action of a verb that has several, each a module of its own."""
    actions: dict[str, str] = module.ACTIONS
    width = max(map(len, actions)) + 2
    listed = "\n".join(f"  {name:<{width}}{summary}" for name, summary in actions.items())
    parser = _Parser(
        prog=f"gemma-qat {verb}", usage=f"gemma-qat {verb} ACTION ...", description=module.__doc__,
        epilog=f"actions:\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("action", nargs="?", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments[:1]).action
    if chosen is None:
        parser.error(f"an action is expected: {', '.join(actions)}")
    if chosen not in actions:
        close = nearest(chosen, actions) or ", ".join(actions)
        parser.error(f"unknown action {chosen!r}, nearest: {close}")
    name = f"gemma_qat.cli.{verb}_{chosen.replace('-', '_')}"
    return _run(f"gemma-qat {verb} {chosen}", importlib.import_module(name), arguments[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status: 0, 2 for bad input, 75 saved and stopped, 130 interrupted, 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    quiet()
    top = _top()
    try:
        chosen = top.parse_args(arguments[:1])
        if chosen.verb is None:
            top.error(f"a verb is expected: {', '.join(VERBS)}")
        if chosen.verb not in VERBS:
            close = nearest(chosen.verb, VERBS) or ", ".join(VERBS)
            top.error(f"unknown verb {chosen.verb!r}, nearest: {close}")
        module = importlib.import_module(f"gemma_qat.cli.{chosen.verb.replace('-', '_')}")
        if hasattr(module, "ACTIONS"):
            return _act(chosen.verb, module, arguments[1:])
        return _run(f"gemma-qat {chosen.verb}", module, arguments[1:])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except (InputError, FileNotFoundError) as error:
        say(error)
        return 2
    except BrokenPipeError:
        # Whoever read it has enough, as `| head` has; nor can what is left be written when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except (
        OSError
    ) as error:  # a full disk, no permission, a name too long: nothing that a traceback explains
        say(
            InputError(
                ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
            )
        )
        return 1 if error.errno in MAY_PASS else 2
    except Stopped as stop:
        print(safe(f"gemma-qat: {stop}"), file=sys.stderr)
        return RETRY
    except KeyboardInterrupt:
        print("gemma-qat: interrupted", file=sys.stderr)
        return 130
