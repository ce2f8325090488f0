"""What a launcher starts, as plain data: named jobs, each a command on the hosts of one machine, after those it needs.

A job is one run: `hosts` processes of the same command that join one another (`host_command` says how, place by place).
Nothing here knows a scheduler's library; manifests are made of jobs by `indexed` (Kubernetes) and `custom` (Vertex AI).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from gemma_qat.errors import InputError
from gemma_qat.launch.machines import Machine
from gemma_qat.redaction import is_secret_name

LONGEST = 40
"""Letters of an experiment's name: what schedulers add to it has to fit beside it."""

PROGRAM = "gemma-qat"

_NAME = re.compile(rf"[a-z]([-a-z0-9]{{0,{LONGEST - 2}}}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
REDACTED = "(redacted)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run. `command` is one of `program`, without what joins its processes; `machine` is None for this machine.

    `retries`: how often the run is started again when it was stopped with everything saved (status 75), or when a
    scheduler's own restarts are meant, when a host was lost.
    """

    name: str
    needs: tuple[str, ...] = ()
    image: str = ""
    machine: Machine | None = None
    program: str = PROGRAM
    command: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tags: tuple[str, ...] = ()
    logs: str
    retries: int = 0

    @property
    def hosts(self) -> int:
        """Number of processes."""
        return self.machine.hosts if self.machine else 1


def name_of(config: str) -> str:
    """Returns a name that schedulers take, from a config's file name: configs/e2b_q4_0.py gives e2b-q4-0."""
    base = config.rpartition("/")[2].removesuffix(".py")
    return _plain(re.sub(r"^(?=\d)", "gemma-", base.lower()))[:LONGEST].strip("-")


def check_name(name: str) -> str:
    """Returns the name as it is.

    Raises: InputError for one that a scheduler would refuse.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"--name {name}: at most {LONGEST} lower-case letters, digits and hyphens expected, a letter first"
        )
    return name


def check_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """Returns the tags as they are.

    Raises: InputError for one that cannot be a label.
    """
    for tag in tags:
        if not _NAME.fullmatch(tag):
            raise InputError(
                f"--tag {tag}: lower-case letters, digits and hyphens expected, a letter first"
            )
    return tuple(tags)


def environment_of(assigned: Iterable[str]) -> dict[str, str]:
    """Returns the variables of NAME=VALUE lines, the last of a name.

    Raises: InputError for what is no assignment.
    """
    found = {}
    for text in assigned:
        name, equals, value = text.partition("=")
        if not equals or not _VARIABLE.fullmatch(name):
            raise InputError(f"--env {name}: NAME=VALUE expected")
        found[name] = value
    return found


def redacted(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables as they may be shown."""
    return {
        name: REDACTED if is_secret_name(name) else value for name, value in environment.items()
    }


def jobs_of(
    name: str, parts: Sequence[Mapping[str, object]], *, machine: Machine | None = None, image: str = "",
    environment: Mapping[str, str] | None = None, tags: Sequence[str] = (), logs: str = "runs/logs", retries: int = 0,
    program: str = PROGRAM,
) -> list[Job]:  # fmt: skip
    """Returns a job for each part (name, needs, command, as `gemma-qat sweep --emit` writes them), in their order.

    A single part without a name is the experiment itself; others are `name-part`. `program` stands for the first word
    of a command.
    Raises: InputError when two parts come to one name, or one to a name that is too long.
    """
    names: dict[str, str] = {}
    for part in parts:
        own = str(part["name"])
        full = f"{name}-{_plain(own.lower())}" if own else name
        if full in names.values():
            raise InputError(f"{own}: another job is called {full} too")
        # A host adds its number and a hyphen, and 63 letters are the most.
        if len(full) > 57:
            raise InputError(
                f"{full}: the name of a job has at most 57 letters; give a shorter --name"
            )
        names[own] = full
    made = []
    for part in parts:
        full = names[str(part["name"])]
        needs = tuple(names[need] for need in _words(part["needs"]))
        command = (program, *_words(part["command"])[1:])
        made.append(
            Job(
                name=full, needs=needs, image=image, machine=machine, program=program, command=command,
                environment=dict(environment or {}), tags=tuple(tags), logs=f"{logs}/{full}", retries=retries,
            )
        )  # fmt: skip
    return made


def worker(job: Job, *joined: str, retries: int = 0) -> list[str]:
    """Returns the command of one host: the job's, with `joined` behind it, under `gemma-qat launch worker`."""
    again = ["--retry", str(retries)] if retries else []
    return [
        job.program, "launch", "worker", "--logs", job.logs, *again, "--", *job.command, *joined,
    ]  # fmt: skip


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def _words(value: object) -> tuple[str, ...]:
    assert isinstance(value, (list, tuple))
    return tuple(map(str, value))
