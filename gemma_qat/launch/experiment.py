"""Several jobs that are started together by one launcher, and what a dry run says of them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

from gemma_qat.launch import custom, indexed
from gemma_qat.launch.jobs import REDACTED, Job, redacted, worker
from gemma_qat.redaction import is_secret_name

_LEAF = r'(?:"(?:[^"\\]|\\.)*"|[\d.]+|true|false|null)'
_LIST = re.compile(rf"\[\s+{_LEAF}(?:,\s+{_LEAF})*\s+\]")

EXECUTORS = ("local", "kubernetes", "vertex")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Jobs, each after those it needs, where they run, and how they are packaged.

    `build`: the tag that an image for `accelerator` is built and pushed as; empty when `image` is in a registry.
    """

    name: str
    executor: str
    jobs: tuple[Job, ...]
    build: str = ""
    accelerator: str = ""
    volume: str = ""
    secret: str = ""
    namespace: str = "default"
    region: str = ""
    preflight: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What it is listed as: its name, and the tags in brackets."""
        tags = self.jobs[0].tags
        return f"{self.name} [{', '.join(tags)}]" if tags else self.name

    def command(self, job: Job) -> list[str]:
        """What every host of a job runs."""
        if self.executor == "kubernetes":
            return indexed.host_command(job)
        if self.executor == "vertex":
            return custom.host_command(job)
        return worker(job, retries=job.retries)

    def submitted(self, job: Job) -> Any:
        """What the scheduler gets for a job: manifests of Kubernetes, a CustomJob of Vertex AI; None for this machine.

        Raises: InputError for a machine that cannot be had there.
        """
        if self.executor == "kubernetes":
            return indexed.manifests(job, volume=self.volume, secret=self.secret)
        return custom.custom_job(job) if self.executor == "vertex" else None


def shown(experiment: Experiment) -> dict[str, Any]:
    """Returns all that would be started, as data that can be printed: what is secret by its name is left out.

    Raises: InputError for a machine that cannot be had there.
    """
    made = {"experiment": experiment.title, "executor": experiment.executor}
    where = {"kubernetes": {"namespace": experiment.namespace}, "vertex": {"region": experiment.region}}  # fmt: skip
    return {
        **made,
        **where.get(experiment.executor, {}),
        "build": _build(experiment),
        "preflight": list(experiment.preflight),
        "jobs": [
            {
                "name": job.name,
                "needs": list(job.needs),
                "image": job.image or job.program,
                "resources": resources(job),
                "command": experiment.command(job),
                "environment": redacted(job.environment),
                "submitted": _without_secrets(experiment.submitted(job)),
            }
            for job in experiment.jobs
        ],
    }


def printed(experiment: Experiment, hide: Callable[[Any], Any] = lambda found: found) -> str:
    """Returns what `shown` returns as JSON, a list of words in one line; `hide` takes secrets out of it.

    Raises: as `shown`.
    """

    def line(found: re.Match[str]) -> str:
        return json.dumps(json.loads(found[0]), ensure_ascii=False)

    return _LIST.sub(line, json.dumps(hide(shown(experiment)), indent=2, ensure_ascii=False))


def resources(job: Job) -> dict[str, Any]:
    """Returns what a job asks for, by plain names."""
    machine = job.machine
    if machine is None:
        return {"machine": "this one"}
    found: dict[str, Any] = {
        "machine": machine.name,
        "accelerator": machine.label,
        "machine_type": machine.machine_type,
        "hosts": machine.hosts,
        "chips_per_host": machine.chips_per_host,
    }
    return found | ({"topology": machine.topology} if machine.is_tpu else {})


def _build(experiment: Experiment) -> dict[str, str] | None:
    if not experiment.build:
        return None
    return {
        "dockerfile": "launch/Dockerfile",
        "accelerator": experiment.accelerator,
        "tag": experiment.build,
    }


def _without_secrets(value: Any) -> Any:
    """Returns manifests with the values of secret variables left out."""
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "value" in value and is_secret_name(str(value.get("name", ""))):
        return {**value, "value": REDACTED}
    return {name: _without_secrets(item) for name, item in value.items()}
