"""Jobs for Kubernetes with GKE's labels: an Indexed Job with a pod on each host, and a Service of their names.

    pod 0   NAME-0.NAME   coordinator of GPU hosts, port 8476
    pod i   NAME-i.NAME   learns i from its annotation; on TPUs jax finds the others by what GKE's webhook sets

What the command line says reaches the container word by word: `$` is doubled, as Kubernetes expands $(NAME) in it.
A pod that ends with anything but 2 (bad input) is made again with its number, up to `retries` times a host; so status
75 and a lost host both start the run again, where it was saved. A pod that is evicted does not count.
"""

from __future__ import annotations

from typing import Any

from gemma_qat.errors import InputError
from gemma_qat.launch.jobs import Job, worker
from gemma_qat.launch.jobset import PORT, USER, literal

INDEX = "GEMMA_QAT_PROCESS"
"""The variable that a pod's number is in, which its command reads."""

_SECONDS_TO_SAVE = 300


def manifests(job: Job, *, volume: str = "", secret: str = "") -> list[dict[str, Any]]:
    """Returns the Service (several hosts) and the Job, as the Kubernetes API takes them.

    `volume`: CLAIM:PATH, a persistent volume claim that all hosts see at PATH. `secret`: a Secret whose values become
    variables of the command.
    Raises: InputError for a volume that is written otherwise.
    """
    labels = {"app": "gemma-qat", "job": job.name} | {f"tag-{tag}": "" for tag in job.tags}
    pod = _pod(job, volume)
    if secret:
        pod["containers"][0]["envFrom"] = [{"secretRef": {"name": secret}}]
    if job.hosts > 1:
        pod["subdomain"] = job.name
    made: list[dict[str, Any]] = []
    if job.hosts > 1:
        made.append(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": job.name, "labels": labels},
                "spec": {
                    "clusterIP": "None",
                    "selector": {"batch.kubernetes.io/job-name": job.name},
                    # Process 0 is looked for before any pod says that it is ready.
                    "publishNotReadyAddresses": True,
                },
            }
        )
    bad_input = {"containerName": "gemma-qat", "operator": "In", "values": [2]}
    evicted = {"type": "DisruptionTarget", "status": "True"}
    made.append(
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": job.name, "labels": labels},
            "spec": {
                "completionMode": "Indexed",
                "completions": job.hosts,
                "parallelism": job.hosts,
                "backoffLimit": job.retries * job.hosts,
                "podFailurePolicy": {
                    "rules": [
                        {"action": "FailJob", "onExitCodes": bad_input},
                        {"action": "Ignore", "onPodConditions": [evicted]},
                    ]
                },
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        }
    )
    return made


def host_command(job: Job) -> list[str]:
    """Returns the command of a pod, before `$` is doubled in it but for the number that Kubernetes puts in."""
    return [*map(literal, worker(job)), *_joined(job)]


def _joined(job: Job) -> list[str]:
    machine = job.machine
    if machine is None or job.hosts == 1:
        return []
    if machine.is_tpu:
        return ["--coordinator", "auto"]
    return [
        "--coordinator", f"{job.name}-0.{job.name}:{PORT}", "--num-processes", str(job.hosts),
        "--process-id", f"$({INDEX})",
    ]  # fmt: skip


def _pod(job: Job, volume: str) -> dict[str, Any]:
    assert job.machine is not None
    environment: list[dict[str, Any]] = [
        {"name": name, "value": literal(value)} for name, value in job.environment.items()
    ]
    if job.hosts > 1 and not job.machine.is_tpu:
        field = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        environment.append({"name": INDEX, "valueFrom": {"fieldRef": {"fieldPath": field}}})
    # GPUs of a host exchange data over shared memory, of which a container has 64 MiB.
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    if volume:
        claim, colon, path = volume.partition(":")
        if not claim or not path.startswith("/"):
            raise InputError(f"--volume {volume}: CLAIM:/PATH expected")
        volumes.append({"name": "files", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": "files", "mountPath": path})
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _SECONDS_TO_SAVE,
        "securityContext": {"fsGroup": USER},
        "nodeSelector": job.machine.node_selector,
        "containers": [
            {
                "name": "gemma-qat",
                "image": job.image,
                "command": host_command(job),
                "env": environment,
                "resources": {"limits": {job.machine.resource: str(job.machine.chips_per_host)}},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
