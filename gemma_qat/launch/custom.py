"""Jobs for Vertex AI: a CustomJob, whose worker pools are what its API calls the hosts of one run.

    TPU slice      one pool of one replica, however many hosts the topology has (v5e and v6e)
    one GPU host   one pool of one replica
    several        pool 0 of one replica, pool 1 of the others, told apart by CLUSTER_SPEC (`gemma-qat launch vertex`)

A job is not started again by Vertex AI when it ends with status 75: its workers do that (`--retry`). A lost host
restarts all of them. Buckets are seen at /gcs/BUCKET by all hosts, so that is where a run's directory belongs.

Source: docs.cloud.google.com/vertex-ai/docs/training/configure-compute and distributed-training.
"""

from __future__ import annotations

import json
from typing import Any

from gemma_qat.errors import InputError
from gemma_qat.launch.jobs import Job, worker
from gemma_qat.launch.machines import Machine

TPUS = ("v5e", "v6e")
GPUS = {
    "a100": "NVIDIA_A100_80GB",
    "h100": "NVIDIA_H100_80GB",
    "h200": "NVIDIA_H200_141GB",
    "b200": "NVIDIA_B200",
}
"""Vertex AI's names of the GPUs."""


def custom_job(job: Job) -> dict[str, Any]:
    """Returns the CustomJob, as Vertex AI's API takes it.

    Raises: InputError for a machine that cannot be had there.
    """
    assert job.machine is not None
    container = {
        "image_uri": job.image,
        "command": host_command(job),
        "env": [{"name": name, "value": value} for name, value in job.environment.items()],
    }
    spec = _machine_spec(job.machine)
    counts = [1] if job.machine.is_tpu or job.hosts == 1 else [1, job.hosts - 1]
    return {
        "display_name": job.name,
        "labels": {"app": "gemma-qat"} | {f"tag-{tag}": "" for tag in job.tags},
        "job_spec": {
            "worker_pool_specs": [
                {"machine_spec": spec, "replica_count": count, "container_spec": container}
                for count in counts
            ],
            "scheduling": {"restart_job_on_worker_restart": job.hosts > 1},
        },
    }


def host_command(job: Job) -> list[str]:
    """Returns the command of a host."""
    assert job.machine is not None
    if job.hosts == 1:
        return worker(job, retries=job.retries)
    if job.machine.is_tpu:
        return worker(job, "--coordinator", "auto", retries=job.retries)
    return ["gemma-qat", "launch", "vertex", "--", *worker(job, retries=job.retries)]


def joined(cluster_spec: str) -> tuple[list[str], int]:
    """Returns what is added to a command on this host, and the number of its process.

    `cluster_spec` is Vertex AI's CLUSTER_SPEC: hosts by pool, and which of them this is. Pool 0 has one host.
    Raises: InputError for something else.
    """
    try:
        spec = json.loads(cluster_spec)
        first, others = spec["cluster"]["workerpool0"], spec["cluster"].get("workerpool1", [])
        pool, index = spec["task"]["type"], int(spec["task"]["index"])
        process = index + (len(first) if pool == "workerpool1" else 0)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"CLUSTER_SPEC is not what Vertex AI sets ({type(error).__name__}: {error})"
        ) from None
    hosts = len(first) + len(others)
    return [
        "--coordinator", first[0], "--num-processes", str(hosts), "--process-id", str(process),
    ], process  # fmt: skip


def _machine_spec(machine: Machine) -> dict[str, Any]:
    if machine.is_tpu:
        if machine.chip not in TPUS:
            raise InputError(
                f"{machine.name}: Vertex AI trains on {' and '.join(TPUS)}; for {machine.chip} take "
                "--executor kubernetes, launch/gke.sh or launch/tpu_vm.sh"
            )
        return {"machine_type": machine.machine_type, "tpu_topology": machine.topology}
    return {
        "machine_type": machine.machine_type,
        "accelerator_type": GPUS[machine.chip],
        "accelerator_count": machine.chips_per_host,
    }
