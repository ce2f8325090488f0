"""Being asked to stop: SIGTERM, USR1 or SIGINT once ends a run at a step that all its processes agree on.

USR1 is what Slurm is told to send before the time of a job is over.

With one process a flag is enough. With several, the step has to be the same everywhere, because saving it is something
all of them do together; that is what jax's preemption service is for. It catches SIGTERM itself, in any of the
processes, tells the others, and names a step that none of them has passed. The others are handed to it as a SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax

Stop = Callable[[int], bool]
"""Asked once after every step, with the number of steps done: whether the run is to end here."""


@contextlib.contextmanager
def stop_on_signals(under_way: Callable[[], None] = lambda: None) -> Iterator[Stop]:
    """Gives a `Stop` that SIGTERM, USR1 or SIGINT sets off; a second SIGINT interrupts at once.

    To be entered in the main thread, after jax.distributed is initialized if it is. `under_way` is called when a signal
    has nothing but this to be answered by: with one process when the first step is done, with several at once.
    """
    several = jax.process_count() > 1
    asked: list[int] = []

    def note(number: int, _: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def noted(step: int) -> bool:
        under_way()
        return bool(asked)

    caught = [signal.SIGINT, signal.SIGUSR1] + ([] if several else [signal.SIGTERM])
    before = {number: signal.signal(number, note) for number in caught}
    if several:
        under_way()
    try:
        yield _agreed if several else noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _agreed(step: int) -> bool:
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)
