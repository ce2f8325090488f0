"""Several processes, one program: joining, waiting for one another, and making global arrays of local ones.

A process that dies stops the others: collectives with it fail, and jax's coordination service ends every process that
has not heard from it for `HEARTBEAT` seconds, or that waits for it while shutting down for `SHUTDOWN` seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gemma_qat.errors import InputError
from gemma_qat.sharding import from_host

HEARTBEAT = 30
SHUTDOWN = 30
JOIN = 300
"""Seconds that processes may start apart from one another."""


def join(coordinator: str, processes: int | None, process: int | None) -> None:
    """Makes this process one of several; to be called before anything touches a device.

    `coordinator` is host:port of process 0, or "auto" where jax finds all by itself (TPU pods, Slurm, Open MPI).
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
        initialize()
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


def _settle() -> None:
    """Turns the compilation cache off on CPU.

    jax 0.10.2 runs the collectives of a program read from it in an order that differs between processes, and gloo ends
    them ("received data size doesn't match expected size").
    """
    if jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)


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
