"""Starts an experiment's jobs by XManager (github.com/google-deepmind/xmanager, 0.8): a work unit for each.

XManager is imported when something is started, never before: a dry run is our own data, and XManager's objects are made
of it here. What its executors of 0.8.5 can do, and what is done instead:

    Local        runs an executable (xm.Binary) without Docker, under a shell that keeps signals from it; used as it is,
                 one work unit at a time, and the signals that end the launcher are passed on by us
    Kubernetes   makes a plain Job of one pod: no TPU resource, no number of hosts, no volume, never started again; its
                 node selector, nvidia-tesla-NAME, fits no GPU since A100s of 80 GB; waits for ever when it fails
    Vertex       knows TPU v2 and v3 only, and asks for an n1 machine with H100s, H200s and B200s

So for the last two the launch that XManager has registered for the executor is replaced, in its own registry, by one
that submits the manifests of `indexed` and `custom`; packaging, experiment, storage and handles stay XManager's.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma_qat.errors import InputError
from gemma_qat.launch.experiment import Experiment
from gemma_qat.launch.jobs import Job

RESOURCES = {
    "v5e": "tpu_v5e", "v5p": "tpu_v5p", "v6e": "tpu_v6e",
    "a100": "a100_80gib", "h100": "h100", "h200": "h200", "b200": "b200",
}  # fmt: skip
"""XManager's names of chips."""

_IN_IMAGE = ("gemma_qat", "configs", "launch", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")  # fmt: skip
_SECONDS_BETWEEN_LOOKS = 10


async def submit(experiment: Experiment, root: Path) -> int:
    """Starts all jobs, waits for those that others need, and on this machine for all.

    Returns 0, or when work units failed 75 if all of them stopped and saved, else 1; says which failed. On this machine
    SIGTERM and an interrupt have what runs saved and stopped; a second one ends the launcher.
    Raises: InputError when a job of that name is there.
    """
    from absl import logging
    from xmanager import xm, xm_local

    is_local = experiment.executor == "local"
    slots = asyncio.Semaphore(1 if is_local else len(experiment.jobs))
    needed = {need for job in experiment.jobs for need in job.needs}
    failed: dict[str, str] = {}
    running: list[Any] = []
    stopping = asyncio.Event()
    tasks: dict[str, asyncio.Task[bool]] = {}

    async def start(created: Any, prepared: Any, job: Job) -> bool:
        if not all([await tasks[need] for need in job.needs]):
            failed[job.name] = "left out, as what it needs failed"
            return False
        async with slots:
            if stopping.is_set():
                failed[job.name] = "left out, as the launcher was stopped"
                return False
            try:
                unit = await created.add(prepared)
                print(f"work unit {unit.work_unit_id}: {job.name}", flush=True)
                if is_local or job.name in needed:
                    await unit.wait_until_complete()
            except xm.ExperimentUnitError as error:
                failed[job.name] = str(error)
                return False
        return True

    try:
        async with xm_local.create_experiment(experiment.title) as created:
            with _packageable(experiment, root) as packageable:
                [executable] = await asyncio.to_thread(created.package, [packageable])
            # Every executor that is made registers XManager's own launch; ours comes after the last.
            units = {job.name: work_unit(experiment, job, executable) for job in experiment.jobs}
            register(experiment)
            if is_local:
                _pass_signals_on(running, stopping)
            for job in experiment.jobs:
                tasks[job.name] = asyncio.create_task(start(created, units[job.name], job))
            await asyncio.gather(*tasks.values())
            if failed:
                # Leaving, XManager logs a traceback for each, and says no more than what is said below.
                logging.set_verbosity(logging.FATAL)
    except RuntimeError:
        # Leaving, XManager raises again what it raised of a work unit.
        if not failed:
            raise
    for name, why in failed.items():
        print(f"xm_launch.py: {name}: {why}", file=sys.stderr)
    return _status(list(failed.values()))


def work_unit(experiment: Experiment, job: Job, executable: Any) -> Any:
    """Returns XManager's job."""
    from xmanager import xm

    return xm.Job(
        executable=executable,
        executor=executor(experiment, job),
        name=job.name,
        # A prebuilt program gets arguments; the manifests have the whole command.
        args=experiment.command(job)[1:],
        env_vars=dict(job.environment),
    )


def executor(experiment: Experiment, job: Job) -> Any:
    """Returns XManager's executor, with the machine as its requirements."""
    from xmanager import xm, xm_local

    if job.machine is None:
        return xm_local.Local()
    machine = job.machine
    if machine.is_tpu:
        needs = xm.JobRequirements({RESOURCES[machine.chip]: machine.topology})
    else:
        amount = {RESOURCES[machine.chip]: machine.chips_per_host}
        needs = xm.JobRequirements(amount, replicas=machine.hosts)
    kinds = {"kubernetes": xm_local.Kubernetes, "vertex": xm_local.Vertex}
    return kinds[experiment.executor](requirements=needs)


def register(experiment: Experiment) -> None:
    """Has XManager's registry launch the jobs of this experiment by our manifests."""
    from xmanager import xm_local
    from xmanager.xm_local import registry

    by_name = {job.name: job for job in experiment.jobs}
    kinds = {
        "kubernetes": (xm_local.Kubernetes, _start_indexed),
        "vertex": (xm_local.Vertex, _start_custom),
    }
    if experiment.executor not in kinds:
        return
    kind, begin = kinds[experiment.executor]

    async def launch(unit: Any, group: Any) -> list[Any]:
        return [
            begin(experiment, by_name[name], job.executable.image_path)
            for name, job in group.jobs.items()
            if isinstance(job.executor, kind)
        ]

    restored = registry.get_create_handle_method(kind) if registry.is_registered(kind) else None
    registry.register(kind, launch=launch, create_handle=restored)


def _pass_signals_on(running: list[Any], stopping: asyncio.Event) -> None:
    """Has XManager's registry note what is started on this machine, and the next signal end it and nothing begin."""
    import psutil
    from xmanager import xm_local
    from xmanager.xm_local import registry

    loop = asyncio.get_running_loop()
    begin = registry.get_launch_method(xm_local.Local)

    async def launch(unit: Any, group: Any) -> Any:
        handles = await begin(unit, group)
        running.extend(handles)
        return handles

    def stop() -> None:
        stopping.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        for handle in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                shell = psutil.Process(handle.process.pid)
                for process in shell.children() or [shell]:
                    process.terminate()

    registry.register(xm_local.Local, launch=launch)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)


def dockerfile_for(accelerator: str, text: str) -> str:
    """Returns a Dockerfile whose build argument ACCELERATOR is `accelerator` unless given: XManager gives none.

    Raises: InputError for one without the argument.
    """
    made, count = re.subn(
        r"^ARG ACCELERATOR=.*$", f"ARG ACCELERATOR={accelerator}", text, flags=re.MULTILINE
    )
    if count != 1:
        raise InputError(f"launch/Dockerfile: one ARG ACCELERATOR=... expected, {count} found")
    return made


@contextlib.contextmanager
def _packageable(experiment: Experiment, root: Path) -> Iterator[Any]:
    from xmanager import xm, xm_local

    if experiment.executor == "local":
        program = shutil.which(experiment.jobs[0].program)
        if program is None:
            raise InputError(
                f"{experiment.jobs[0].program}: no such program; --binary names the gemma-qat that trains"
            )
        yield xm.binary(xm_local.Local.Spec(), path=str(Path(program).absolute()))
        return
    kind = xm_local.Kubernetes if experiment.executor == "kubernetes" else xm_local.Vertex
    where = kind.Spec(push_image_tag=experiment.jobs[0].image)
    if not experiment.build:
        yield xm.container(where, image_path=experiment.jobs[0].image)
        return
    # Staged: of the working tree only what the image is made of is sent, and XManager's build by Google Cloud writes a
    # Dockerfile into the directory it is given.
    with tempfile.TemporaryDirectory() as temporary:
        stage = Path(temporary) / "gemma_qat"
        stage.mkdir()
        for name in _IN_IMAGE:
            if (root / name).is_dir():
                unwanted = shutil.ignore_patterns("__pycache__")
                shutil.copytree(root / name, stage / name, ignore=unwanted)
            else:
                shutil.copy(root / name, stage / name)
        text = (root / "launch" / "Dockerfile").read_text("utf-8")
        (stage / "Dockerfile").write_text(dockerfile_for(experiment.accelerator, text), "utf-8")
        yield xm.dockerfile_container(where, path=str(stage))


def _start_indexed(experiment: Experiment, job: Job, image: str) -> Any:
    from kubernetes import client as api
    from xmanager.cloud import kubernetes

    job = _with_image(job, image)
    *services, manifest = experiment.submitted(job)
    connection = kubernetes.client().api_client
    batch, core = api.BatchV1Api(connection), api.CoreV1Api(connection)
    try:
        made = batch.create_namespaced_job(namespace=experiment.namespace, body=manifest)
    except api.ApiException as error:
        if error.status != 409:
            raise
        raise InputError(
            f"a Job {job.name} is there already: --name gives another name, kubectl delete job {job.name} deletes it"
        ) from None
    for service in services:
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job.name, "uid": made.metadata.uid}  # fmt: skip
        service["metadata"]["ownerReferences"] = [owner]
        core.create_namespaced_service(namespace=experiment.namespace, body=service)

    class Handle(kubernetes.KubernetesHandle):
        """Waits until the Job ended, either way."""

        async def wait(self) -> None:
            while True:
                [found] = self.jobs
                now = batch.read_namespaced_job_status(
                    name=found.metadata.name, namespace=found.metadata.namespace
                )
                ended = {row.type: row for row in now.status.conditions or [] if row.status == "True"}  # fmt: skip
                if "Complete" in ended:
                    return
                if "Failed" in ended:
                    raise RuntimeError(f"the Job failed: {ended['Failed'].message}")
                await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)

    return Handle(jobs=[made])


def _start_custom(experiment: Experiment, job: Job, image: str) -> Any:
    from google.cloud import aiplatform
    from xmanager.cloud import auth, vertex

    made = experiment.submitted(_with_image(job, image))
    client = vertex.Client(location=experiment.region)
    vertex.set_default_client(client)
    custom = aiplatform.CustomJob(
        display_name=made["display_name"], worker_pool_specs=made["job_spec"]["worker_pool_specs"],
        labels=made["labels"], project=client.project, location=client.location,
        staging_bucket=f"gs://{auth.get_bucket()}",
    )  # fmt: skip
    assert job.machine is not None
    # As XManager does: a TPU of Vertex AI takes no service account.
    custom.submit(
        service_account=None if job.machine.is_tpu else auth.get_service_account(),
        restart_job_on_worker_restart=made["job_spec"]["scheduling"][
            "restart_job_on_worker_restart"
        ],
    )
    print(f"{job.name}: {custom.resource_name}", flush=True)
    return vertex.VertexHandle(job_name=custom.resource_name)


def _with_image(job: Job, image: str) -> Job:
    return dataclasses.replace(job, image=image)


def _status(failures: list[str]) -> int:
    """The exit status for what failed: that of a process which stopped and saved is in XManager's message only."""
    if not failures:
        return 0
    stopped = [re.search(r"non-zero code: 75\b|left out", why) for why in failures]
    return 75 if all(stopped) else 1
