"""A run as a Kubernetes JobSet: the template launch/gke_jobset.yaml with its values filled in, by structure.

    machine    a Job is        pods of a Job    processes find one another by
    TPU        one slice       its hosts        --coordinator auto: GKE gives pods TPU_WORKER_ID, TPU_WORKER_HOSTNAMES,
                                                and those of several slices MEGASCALE_*
    GPU        all nodes       the nodes        the name of pod 0 and the completion index
    one host   one pod         1                nothing

Kubernetes replaces $(NAME) in commands and environment values and reads $$ as $; whatever a person gave is written so
that it arrives as it was.

Sources: kubernetes-sigs/jobset api/jobset/v1alpha2 (fields, labels, annotations); jax's clusters/cloud_tpu_cluster.py;
kueue.sigs.k8s.io/docs/tasks/run/jobsets (queues); docs.cloud.google.com/kubernetes-engine/docs: how-to/tpu-multislice
(exclusive topology, slices of several hosts only), concepts/plan-tpus (selectors), how-to/autopilot-spot-pods,
how-to/persistent-volumes/cloud-storage-fuse-csi-driver (buckets).
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gemma_qat.errors import InputError
from gemma_qat.launch.machines import Machine

TEMPLATE = Path(__file__).resolve().parents[2] / "launch" / "gke_jobset.yaml"
PORT = 8476
"""Where process 0 listens for the others; jax's own choice on TPUs."""
LONGEST = 40
"""Characters of a name: pods are called NAME-slice-SLICE-HOST-xxxxx, in 63."""
USER = 1000
"""Whom the container runs as (launch/Dockerfile): mounted volumes have to be this group's to write."""
_OURS = frozenset({"SLICE", "COORDINATOR", "PROCESS_ID"})
_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})


@dataclasses.dataclass(frozen=True)
class Volume:
    """Something mounted at `path`: `kind` is gcs (a bucket), pvc (a claim) or none else."""

    kind: str
    name: str
    path: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a manifest is made of; `command` is gemma-qat's, such as ("train", "configs/e2b_q4_0.py")."""

    machine: Machine
    image: str
    name: str
    command: tuple[str, ...]
    slices: int = 1
    namespace: str = ""
    volumes: tuple[Volume, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    secrets: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """Environment variables by name: which secret, which of its keys."""
    max_restarts: int = 3
    grace: int = 600
    """Seconds from SIGTERM to SIGKILL."""
    queue: str = ""
    spot: bool = False
    reservation: str = ""
    service_account: str = ""
    privileged: bool = False
    """As root with every device, as TPU nodes wanted it before GKE 1.28."""
    logs: str = ""
    """Directory of the logs; empty is runs/logs/NAME, under the directory that the image works in."""

    def __post_init__(self) -> None:
        for what, said in (("name", self.name), ("namespace", self.namespace or "default")):
            if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", said) or len(said) > LONGEST:
                raise InputError(
                    f"{what} {said!r}: a letter, then lower-case letters, digits, hyphens expected, {LONGEST} at most"
                )
        for what, number, least in (
            ("slices", self.slices, 1), ("restarts", self.max_restarts, 0), ("seconds of grace", self.grace, 1),
        ):  # fmt: skip
            if number < least:
                raise InputError(f"{number} {what}: at least {least} expected")
        twice = (set(self.environment) & set(self.secrets)) | (
            _OURS & (set(self.environment) | set(self.secrets))
        )
        if twice:
            raise InputError(f"environment variable {min(twice)} is given twice")
        if self.slices > 1 and not self.machine.is_tpu:
            raise InputError(f"{self.machine.name}: only TPUs have slices; name more nodes instead")
        if self.slices > 1 and self.machine.hosts == 1:
            raise InputError(
                f"{self.machine.name}: a slice of one host cannot be one of several on GKE; take a larger slice"
            )
        if self.spot and self.reservation:
            raise InputError("spot and a reservation exclude one another")
        if self.command[0] == "sweep" and self.hosts > 1:
            raise InputError(
                f"sweep runs on one host, {self.machine.name} has {self.hosts}: give a train"
            )

    @property
    def hosts(self) -> int:
        """Hosts of all slices: the processes of the run."""
        return self.machine.hosts * self.slices


def volume_named(said: str) -> Volume:
    """Returns the volume written gcs:BUCKET:/path or pvc:CLAIM:/path.

    Raises: InputError when it is written otherwise.
    """
    found = re.fullmatch(r"(gcs|pvc):([a-z0-9][-._a-z0-9]*):(/.*)", said)
    if found is None:
        raise InputError(f"{said!r}: gcs:BUCKET:/path or pvc:CLAIM:/path expected")
    return Volume(*found.groups())


def literal(text: str) -> str:
    """Returns `text` so that Kubernetes, which replaces $(NAME) and reads $$ as $, makes `text` of it."""
    return text.replace("$", "$$")


def read_template(path: Path = TEMPLATE) -> dict[str, Any]:
    """Returns the template as a tree.

    Raises: InputError when there is none, as where the package was installed without the project's directory.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such template; run from a checkout of the project")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def manifest(job: Job, template: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JobSet of `job` as a tree, ready to be written as YAML or JSON."""
    tree = copy.deepcopy(dict(template))
    tree["metadata"] |= {"name": job.name}
    if job.namespace:
        tree["metadata"]["namespace"] = job.namespace
    if job.queue:
        tree["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": job.queue}
    tree["spec"]["failurePolicy"]["maxRestarts"] = job.max_restarts
    (slice_,) = tree["spec"]["replicatedJobs"]
    slice_["replicas"] = job.slices
    task = slice_["template"]["spec"]
    if job.machine.is_tpu and job.machine.hosts > 1:
        # One slice, one node pool: its hosts are wired to one another and to no others.
        exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        slice_["template"] = {"metadata": {"annotations": exclusive}, "spec": task}
    task |= {"completions": job.machine.hosts, "parallelism": job.machine.hosts}
    _fill_pod(job, task["template"])
    return _without_empty(tree)


def _without_empty(tree: Any) -> Any:
    """Leaves out what the template has room for and this job does not need."""
    if isinstance(tree, dict):
        kept = {key: _without_empty(value) for key, value in tree.items()}
        return {key: value for key, value in kept.items() if value not in ({}, [])}
    return [_without_empty(value) for value in tree] if isinstance(tree, list) else tree


def _fill_pod(job: Job, template: dict[str, Any]) -> None:
    pod = template["spec"]
    template["metadata"]["labels"]["app.kubernetes.io/instance"] = job.name
    if any(volume.kind == "gcs" for volume in job.volumes):
        template["metadata"]["annotations"] = {"gke-gcsfuse/volumes": "true"}
    pod["terminationGracePeriodSeconds"] = job.grace
    if job.service_account:
        pod["serviceAccountName"] = job.service_account
    pod["nodeSelector"] = _nodes(job)
    if job.spot:
        pod["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]  # fmt: skip
    (container,) = pod["containers"]
    container |= {
        "image": job.image,
        "command": _command(job),
        "env": _environment(job),
        "resources": {"limits": {job.machine.resource: job.machine.chips_per_host}},
    }
    if job.privileged:
        pod["securityContext"] = {"fsGroup": USER}
        container["securityContext"] = {"privileged": True}
    _mount(job, pod, container)


def _nodes(job: Job) -> dict[str, str]:
    place = "cloud.google.com/"
    chosen = job.machine.node_selector
    if job.spot:
        chosen[f"{place}gke-spot"] = "true"
    if job.reservation:
        chosen[f"{place}reservation-name"] = job.reservation
        chosen[f"{place}reservation-affinity"] = "specific"
    return chosen


def _command(job: Job) -> list[str]:
    logs = literal(job.logs or f"runs/logs/{job.name}")
    if job.slices > 1:
        logs += "/slice-$(SLICE)"  # hosts are counted anew in every slice
    return [
        "gemma-qat", "launch", "worker", "--logs", logs, "--",
        "gemma-qat", *map(literal, job.command), *_joined(job),
    ]  # fmt: skip


def _joined(job: Job) -> Sequence[str]:
    if job.hosts == 1:
        return ()
    if job.machine.is_tpu:
        return ("--coordinator", "auto")
    return (
        "--coordinator", "$(COORDINATOR)", "--num-processes", str(job.hosts), "--process-id", "$(PROCESS_ID)",
    )  # fmt: skip


def _environment(job: Job) -> list[dict[str, Any]]:
    def field(name: str, path: str) -> dict[str, Any]:
        return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}

    found: list[dict[str, Any]] = []
    if job.slices > 1:
        found.append(field("SLICE", "metadata.labels['jobset.sigs.k8s.io/job-index']"))
    if not job.machine.is_tpu and job.hosts > 1:
        found.append({"name": "COORDINATOR", "value": f"{job.name}-slice-0-0.{job.name}:{PORT}"})
        found.append(
            field("PROCESS_ID", "metadata.annotations['batch.kubernetes.io/job-completion-index']")
        )
    found += [{"name": name, "value": literal(value)} for name, value in job.environment.items()]
    for name, (secret, key) in job.secrets.items():
        found.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return found


def _mount(job: Job, pod: dict[str, Any], container: dict[str, Any]) -> None:
    sources: list[tuple[str, str, dict[str, Any]]] = []
    for i, volume in enumerate(job.volumes):
        if volume.kind == "pvc":
            source: dict[str, Any] = {"persistentVolumeClaim": {"claimName": volume.name}}
        else:
            options = f"implicit-dirs,uid={USER},gid={USER}"
            attributes = {"bucketName": volume.name, "mountOptions": options}
            source = {
                "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}
            }
        sources.append((f"volume-{i}", volume.path, source))
    if not job.machine.is_tpu:
        # NCCL exchanges between the GPUs of a node through shared memory; containers get 64 MB of it.
        sources.append(("shared-memory", "/dev/shm", {"emptyDir": {"medium": "Memory"}}))
    pod["volumes"] = [{"name": name} | source for name, _, source in sources]
    container["volumeMounts"] = [{"name": name, "mountPath": path} for name, path, _ in sources]


class _Dumper(yaml.SafeDumper):
    """Quotes every string that some reader of YAML could take for something else."""


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML follows YAML 1.1 and leaves 1e3 and 0o7 bare, which are numbers to the reader that kubectl has.
    plain = re.fullmatch(r"[A-Za-z][-\w./=, ]*[\w/]|[A-Za-z]", text, re.ASCII)
    style = None if plain and text.lower() not in _WORDS else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _string)


def written(tree: Mapping[str, Any]) -> str:
    """Returns a manifest as YAML; reading it gives an equal tree."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
