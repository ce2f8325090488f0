"""Several processes, one program: joining, waiting for one another, and making global arrays of local ones.

A process that dies stops the others: collectives with it fail, and jax's coordination service ends every process that
has not heard from it for `HEARTBEAT` seconds, or that waits for it while shutting down for `SHUTDOWN` seconds.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma_qat.errors import InputError
from gemma_qat.sharding import from_host

HEARTBEAT = 30
SHUTDOWN = 30
JOIN = 300
"""Seconds that processes may start apart from one another."""


def join(
    coordinator: str,
    processes: int | None,
    process: int | None,
    environment: Mapping[str, str],
) -> None:
    """Makes this process one of several; to be called before anything touches a device.

    `coordinator` is host:port of process 0, or "auto" where jax finds all by itself (TPU pods, Slurm, Open MPI) in the
    `environment`.
    Raises: InputError when the three do not fit together.
    """
    initialize = functools.partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=SHUTDOWN,
    )  # fmt: skip
    # No effect but on CPU, where the transport between processes has to be named, and where programs that do not wait
    # for one another (a look at the codes, the next step) could mix their messages if they ran at the same time.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if coordinator == "auto":
        initialize(local_device_ids=devices_in(environment))
        _settle()
        return
    if processes is None or process is None or not 0 <= process < processes:
        raise InputError(
            f"process {process} of {processes}: a coordinator wants a number of processes and 0 <= id < number"
        )
    initialize(
        coordinator, processes, process, initialization_timeout=JOIN,
        cluster_detection_method="deactivate",
    )  # fmt: skip
    _settle()


def devices_in(environment: Mapping[str, str]) -> list[int] | None:
    """Returns [] where a process has to be told that all devices it sees are its own; None leaves it to jax.

    Under Slurm and Open MPI jax gives every process one device, the one of its number on the host. That is meant for a
    process a GPU: a single process on a host of eight would leave seven idle, and one to which the scheduler shows
    nothing but its own GPU would look for another.
    Source: jax/_src/clusters/cluster.py (`local_device_ids = [pid]`) and slurm_cluster.py, jax 0.10.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    here = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or _slurm_tasks(environment)
    seen = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [] if here == "1" or (here and seen != [""] and len(seen) == 1) else None


def _slurm_tasks(environment: Mapping[str, str]) -> str:
    """How many tasks of this step run on this node, empty outside Slurm; written as 8(x3),2 for all nodes of a step."""
    tasks: list[str] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        number, _, times = part.rstrip(")").partition("(x")
        tasks += [number] * int(times or 1)
    node = int(environment.get("SLURM_NODEID", 0))
    return tasks[node] if node < len(tasks) else ""


def _settle() -> None:
    """Turns the compilation cache off on CPU.

    jax 0.10.2 runs the collectives of a program read from it in an order that differs between processes, and gloo ends
    them ("received data size doesn't match expected size").
    """
    if jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)


LOOK = 20
"""Seconds within which a file that one host has written shows on the others."""


def refuse_apart(directory: Path, seconds: float = LOOK) -> None:
    """Refuses processes that do not all see the same `directory`, such as one on every host's own disk.

    The first writes a file of a name that nobody has looked for before, so that no cache of a network's file system can
    say that it is not there.
    Raises: InputError, in every process the same.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    number = np.frombuffer(os.urandom(4), np.uint32)
    name = f".seen-by-all-{int(multihost_utils.broadcast_one_to_all(number)[0]):08x}"
    token = directory / name
    made = is_first() and not directory.is_dir()
    if is_first():
        directory.mkdir(parents=True, exist_ok=True)
        token.touch()
    wait_for_all(f"written {name}")
    end = time.monotonic() + seconds
    while not (seen := token.is_file()) and time.monotonic() < end:
        time.sleep(0.1)
    all_seen = np.asarray(multihost_utils.process_allgather(np.array([seen]))).ravel()
    if is_first():
        token.unlink()
        if made and not all_seen.all():
            directory.rmdir()
    if not all_seen.all():
        process = int(np.argmin(all_seen))
        raise InputError(
            f"process {process} of {len(all_seen)} does not see {directory} as process 0 does: it has to be on a file "
            "system that all hosts share"
        )


def is_first() -> bool:
    """Returns whether this is the process that writes small files and prints."""
    return jax.process_index() == 0


def wait_for_all(name: str, seconds: int = 86_400) -> None:
    """Returns when every process has called it with this name, which may be used once.

    A dead process ends the wait within `HEARTBEAT`; `seconds` bounds one that lives and never comes.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * seconds)


def global_batch(batch: Mapping[str, np.ndarray], where: Any) -> dict[str, jax.Array]:
    """Returns the arrays of the whole batch, of which this process has its own rows in `batch`."""
    return {
        name: jax.make_array_from_process_local_data(where, np.asarray(array))
        for name, array in batch.items()
    }


def spread(leaves: Any, where: Any) -> Any:
    """Returns arrays placed as `where` says.

    An array that lies on the mesh already moves between its devices; of any other every process has the whole, and
    gives its own devices their shards.
    """
    if jax.process_count() == 1:
        return jax.device_put(leaves, where)
    return jax.tree.map(_spread_one, leaves, where)


def _spread_one(leaf: Any, where: Any) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=where)(leaf)
    return from_host(np.asarray(leaf), where)
