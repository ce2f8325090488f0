"""Writes a run as a Kubernetes JobSet (launch/gke_jobset.yaml filled in), for `kubectl create --filename -`.

The command follows `--`: gemma-qat launch render --on v5e:4x8 --image IMAGE -- train configs/e2b_q4_0.py name=mine
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

RUNS_A_COMMAND = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the action's arguments."""
    add = parser.add_argument
    add("--on", required=True, metavar="MACHINE", help="such as v5e:4x8 or h100:4x8")
    add("--image", required=True, help="container image, made by launch/Dockerfile")
    add("--name", required=True, help="of the JobSet")
    add("--slices", type=int, default=1, metavar="N", help="of the TPU (default 1)")
    add("--namespace", default="", help="default: the current context's")
    add(
        "--volume", action="append", default=[], metavar="KIND:NAME:PATH",
        help="gcs:BUCKET:/app/runs or pvc:CLAIM:/app/runs; may be given again",
    )  # fmt: skip
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="may be given again")
    add(
        "--secret", action="append", default=[], metavar="NAME=SECRET:KEY",
        help="an environment variable whose value is a key of a Kubernetes Secret",
    )  # fmt: skip
    add(
        "--max-restarts", type=int, default=3, metavar="N",
        help="after failures (default 3); stops with status 75 are not counted",
    )  # fmt: skip
    add(
        "--grace", type=int, default=600, metavar="SECONDS",
        help="from SIGTERM to the end (default 600)",
    )  # fmt: skip
    add("--queue", default="", help="Kueue's LocalQueue")
    add("--spot", action="store_true", help="on Spot nodes")
    add("--reservation", default="", metavar="NAME", help="on nodes of a reservation")
    add("--service-account", default="", metavar="NAME", help="that may read and write the buckets")
    add(
        "--privileged", action="store_true",
        help="as root with every device, where nodes do not give a TPU to others",
    )  # fmt: skip
    add("--logs", default="", metavar="DIR", help="default: runs/logs/NAME")
    add("--out", default="", metavar="FILE", help="default: standard output")


def run(arguments: argparse.Namespace) -> int:
    """Renders; prints or writes the manifest."""
    from gemma_qat.launch.jobset import Job, manifest, read_template, volume_named, written
    from gemma_qat.launch.machines import machine_named

    job = Job(
        machine=machine_named(arguments.on),
        image=arguments.image,
        name=arguments.name,
        command=tuple(arguments.command),
        slices=arguments.slices,
        namespace=arguments.namespace,
        volumes=tuple(map(volume_named, arguments.volume)),
        environment=_pairs("--env", "NAME=VALUE", arguments.env),
        secrets=_secrets(arguments.secret),
        max_restarts=arguments.max_restarts,
        grace=arguments.grace,
        queue=arguments.queue,
        spot=arguments.spot,
        reservation=arguments.reservation,
        service_account=arguments.service_account,
        privileged=arguments.privileged,
        logs=arguments.logs,
    )
    text = written(manifest(job, read_template()))
    if arguments.out:
        Path(arguments.out).write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


def _pairs(option: str, how: str, said: Sequence[str]) -> dict[str, str]:
    import re

    from gemma_qat.errors import InputError

    found = {}
    for one in said:
        name, equals, value = one.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            # Not the whole of it: the value may be a secret that was given here by mistake.
            raise InputError(f"{option} {name!r}...: {how} expected")
        found[name] = value
    return found


def _secrets(said: Sequence[str]) -> dict[str, tuple[str, str]]:
    from gemma_qat.errors import InputError

    found = {}
    for name, value in _pairs("--secret", "NAME=SECRET:KEY", said).items():
        secret, colon, key = value.partition(":")
        if not (secret and colon and key):
            raise InputError(f"--secret {name}=...: NAME=SECRET:KEY expected")
        found[name] = (secret, key)
    return found
