"""Starts a training, or every cell of a sweep, as one XManager experiment with a work unit for each run.

    python launch/xm_launch.py --executor local train configs/e2b_q4_0.py [overlay ...]
    python launch/xm_launch.py --executor kubernetes --on v5p:4x4x4 --image IMAGE train CONFIG [overlay ...]
    python launch/xm_launch.py --executor vertex --on h100:8 --build TAG sweep CONFIG [overlay ...]
    xmanager launch launch/xm_launch.py -- --executor local train CONFIG [overlay ...]

--dry_run prints every job as JSON (image, resources, command, environment, and what is submitted), starts nothing and
needs no XManager. Before anything is submitted the preflight runs here. A cell of a sweep waits for those it needs, so
the launcher stays until the last is submitted; on this machine one runs after another. Flags of XManager itself
(--xm_...) are passed on. Options, all before the command:
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from gemma_qat.cli.secrets import safe, safe_values
from gemma_qat.errors import InputError, unknown
from gemma_qat.launch import xm
from gemma_qat.launch.experiment import EXECUTORS, Experiment, printed
from gemma_qat.launch.jobs import (
    PROGRAM,
    check_name,
    check_tags,
    environment_of,
    jobs_of,
    name_of,
)
from gemma_qat.launch.machines import Machine, machine_named
from gemma_qat.redaction import is_secret_name

ROOT = Path(__file__).resolve().parents[1]
BETTER = {
    "local": "export it before the launcher is started: it is passed on",
    "kubernetes": "--secret NAME gives the jobs all that a Secret of the cluster holds",
    "vertex": "let the job's service account read it from Secret Manager",
}
"""What to do rather than to give a secret by --env, which anyone who may see the job can read."""
FLAGS = flags.FLAGS
flags.DEFINE_string("executor", "local", "Where: local, kubernetes or vertex.")
flags.DEFINE_string("on", "", "The machine: v5p:4x4x4, v6e:8x8, h100:4x8 (nodes x GPUs of a node).")
flags.DEFINE_string("name", "", "The experiment's name; by default from the config's file name.")
flags.DEFINE_string("image", "", "Kubernetes, Vertex AI: an image that is in a registry.")
flags.DEFINE_string("build", "", "Or the tag that XManager builds launch/Dockerfile as and pushes.")
flags.DEFINE_string("binary", "", "The gemma-qat that checks and, locally, runs; by default that beside"
                    " GEMMA_QAT_PYTHON, in .venv, or on PATH.")  # fmt: skip
flags.DEFINE_string("volume", "", "Kubernetes: CLAIM:/PATH, a volume claim that all hosts see.")
flags.DEFINE_string("secret", "", "Kubernetes: a Secret whose values are variables of the jobs.")
flags.DEFINE_string("namespace", "default", "Kubernetes: the namespace.")
flags.DEFINE_string("region", "us-central1", "Vertex AI: the region.")
flags.DEFINE_string("logs", "runs/logs", "Where logs are kept, a folder for each job.")
flags.DEFINE_integer("retry", None, "How often a run that was stopped and saved is started again;"
                     " 3, on this machine 0.", lower_bound=0)  # fmt: skip
flags.DEFINE_multi_string("env", [], "NAME=VALUE for the jobs; may be given several times.")
flags.DEFINE_multi_string("tag", [], "A tag of every job; may be given several times.")
flags.DEFINE_boolean("dry_run", False, "Print every job as JSON and start nothing.")
flags.DEFINE_boolean("no_check", False, "Leave the preflight out.")
flags.DEFINE_boolean("no_paths", False, "Preflight without files and free space, for a laptop that"
                     " does not see the cluster's.")  # fmt: skip
OWN = [flag.name for flag in FLAGS.get_key_flags_for_module(sys.modules[__name__])]
flags.DEFINE_alias("dry-run", "dry_run")
flags.DEFINE_alias("no-check", "no_check")
flags.DEFINE_alias("no-paths", "no_paths")
# What begins the command ends the options, so that the command's own are left to it.
FLAGS.set_gnu_getopt(False)
if sys.modules.get("xmanager"):
    # `xmanager launch` gives a flag that only this module of it defines.
    from xmanager.xm import utils  # noqa: F401


def main(argv: Sequence[str]) -> None:
    """What `xmanager launch` calls, with flags parsed and `argv` what is left of them."""
    sys.exit(_end(argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Returns the exit status: 0, 2 for bad input, 75 when a run was stopped and saved, 1 when one failed."""
    if "--help" in arguments:
        print(f"{__doc__}{FLAGS.module_help(sys.modules[__name__])}")
        return 0
    for name in OWN:
        FLAGS[name].unparse()
    try:
        if any(word.startswith("--xm_") for word in arguments):
            _need_xmanager()
        command = FLAGS([__file__, *arguments])[1:]
    except (flags.Error, InputError) as error:
        return _say(error)
    return _end(command)


def _end(command: Sequence[str]) -> int:
    try:
        experiment = experiment_of(command)
        for variable in filter(is_secret_name, experiment.jobs[0].environment):
            better = BETTER[experiment.executor]
            print(
                f"xm_launch.py: --env {variable} can be read in the job; {better}", file=sys.stderr
            )
        if FLAGS.dry_run:
            print(printed(experiment, safe_values))
            return 0
        _need_xmanager()
        if experiment.preflight:
            _check(experiment.preflight)
        return asyncio.run(xm.submit(experiment, ROOT))
    except (InputError, FileNotFoundError) as error:
        return _say(error)
    except KeyboardInterrupt:
        print("xm_launch.py: interrupted; what was submitted goes on", file=sys.stderr)
        return 130


def experiment_of(command: Sequence[str]) -> Experiment:
    """Returns what the flags and the command come to; starts nothing.

    Raises: InputError, FileNotFoundError.
    """
    if not command or command[0] not in ("train", "sweep"):
        raise InputError(
            "train CONFIG [overlay ...] or sweep CONFIG [overlay ...] is expected after the options"
        )
    if len(command) < 2 or not command[1].endswith(".py"):
        raise InputError(f"{command[0]}: a config is expected behind it, such as configs/e2b_q4_0.py")  # fmt: skip
    if not Path(command[1]).is_file():
        raise FileNotFoundError(f"{command[1]}: no such config file")
    if FLAGS.executor not in EXECUTORS:
        raise unknown("executor", FLAGS.executor, EXECUTORS)
    is_local = FLAGS.executor == "local"
    machine = _machine(is_local)
    if machine and machine.hosts > 1 and command[0] == "sweep":
        raise InputError(
            f"--on {machine.name}: a cell of a sweep runs on one host, this has {machine.hosts}"
        )
    if not is_local and bool(FLAGS.image) == bool(FLAGS.build):
        raise InputError(
            f"--executor {FLAGS.executor}: --image IMAGE or --build TAG is expected, one of them"
        )
    if is_local and (FLAGS.image or FLAGS.build):
        raise InputError(
            "--executor local runs gemma-qat itself: no --image, no --build; see --binary"
        )
    name = check_name(FLAGS.name or name_of(command[1]))
    made = jobs_of(
        name, _parts(command), machine=machine, image=FLAGS.image or FLAGS.build,
        environment=environment_of(FLAGS.env), tags=check_tags(FLAGS.tag), logs=FLAGS.logs,
        retries=(0 if is_local else 3) if FLAGS.retry is None else FLAGS.retry,
        program=_binary() if is_local else PROGRAM,
    )  # fmt: skip
    checks = command[0] == "train" and not FLAGS.no_check
    asked = ["--check", *(["--on", machine.name] if machine else [])]
    if FLAGS.no_paths:
        asked.append("--no-paths")
    return Experiment(
        name=name, executor=FLAGS.executor, jobs=tuple(made), build=FLAGS.build,
        accelerator="tpu" if machine and machine.is_tpu else "cuda", volume=FLAGS.volume, secret=FLAGS.secret,
        namespace=FLAGS.namespace, region=FLAGS.region,
        preflight=(_binary(), *command, *asked) if checks else (),
    )  # fmt: skip


def _binary() -> str:
    """The gemma-qat that trains: XManager's environment has an older protobuf than tokenizers are read with."""
    if FLAGS.binary:
        return str(FLAGS.binary)
    python = os.environ.get("GEMMA_QAT_PYTHON") or ROOT / ".venv" / "bin" / "python"
    beside = Path(python).with_name(PROGRAM)
    return str(beside) if beside.exists() else PROGRAM


def _machine(is_local: bool) -> Machine | None:
    if is_local:
        if FLAGS.on:
            raise InputError(f"--on {FLAGS.on}: --executor local runs on this machine")
        return None
    if not FLAGS.on:
        raise InputError("--on MACHINE is expected, such as v5p:4x4x4 or h100:4x8")
    return machine_named(FLAGS.on)


def _parts(command: Sequence[str]) -> list[dict[str, Any]]:
    """Returns name, needs and command of each run: one, or every cell of a sweep."""
    whole = [PROGRAM, *command]
    if command[0] == "train":
        return [{"name": "", "needs": [], "command": whole}]
    from gemma_qat.cli import sweep as verb
    from gemma_qat.config import load_sweep, overlaid
    from gemma_qat.sweep import jobs

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise InputError(f"sweep: {message}")

    parser = Parser(add_help=False)
    verb.add_arguments(parser)
    given = parser.parse_intermixed_args(command[1:])
    if given.list or given.emit or given.collect:
        raise InputError("sweep: --list, --emit and --collect are for gemma-qat sweep itself")
    if given.cell:
        return [{"name": given.cell, "needs": [], "command": whole}]
    return jobs(overlaid(load_sweep(Path(given.config), given.variant), given.overlays), whole)


def _check(preflight: Sequence[str]) -> None:
    if shutil.which(preflight[0]) is None:
        raise InputError(f"{preflight[0]}: no such program; --binary names the gemma-qat that trains")  # fmt: skip
    status = subprocess.run(preflight, check=False).returncode
    if status == 2:
        raise InputError(
            "the preflight found that this cannot work (--no_paths where the files are there and not here; "
            "--no_check leaves it out)"
        )
    if status:
        raise InputError(f"the preflight itself ended with status {status}")


def _need_xmanager() -> None:
    try:
        from xmanager import xm_flags  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"XManager is not installed ({error}): pip install '.[xm]' in an environment of its own; "
            "--dry_run needs none"
        ) from None


def _say(error: Exception) -> int:
    print(safe(f"xm_launch.py: error: {' '.join(str(error).split())}"), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
