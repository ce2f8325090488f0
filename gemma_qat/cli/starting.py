"""SIGTERM and USR1 while a run starts: it ends with 75 at once, for nothing is there yet that could be lost.

Their default would be a status that no launcher requeues. Importing jax, joining other processes, reading data and
compiling take minutes, much of it outside Python, where a handler would have to wait: a thread hears of signals through
the wakeup descriptor and ends the process as `kill -9` does, which costs a run nothing but its start.

One of several processes does so until it has joined the others; then all of them stop together, after the first step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from gemma_qat.errors import RETRY

HEARD = (signal.SIGTERM, signal.SIGUSR1)


class Starting:
    """What the thread does on a signal, which changes as the run gets under way."""

    def __init__(self) -> None:
        self._ends = True
        self._hands_on = False

    def joined(self) -> None:
        """From now on others run with this process: USR1 is handed to jax's preemption service, which hears SIGTERM."""
        self._ends, self._hands_on = False, True

    def over(self) -> None:
        """From now on somebody else answers signals."""
        self._ends = self._hands_on = False

    def hear(self, number: int) -> None:
        """Answers a signal; called in the thread."""
        if number not in HEARD:
            return
        if self._ends:
            name = signal.Signals(number).name
            os.write(
                2,
                f"gemma-qat: {name} before the first step; the same command starts again\n".encode(),
            )
            os._exit(RETRY)
        if self._hands_on and number == signal.SIGUSR1:
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def answers_while_starting() -> Iterator[Starting]:
    """Answers signals as the module says until told otherwise; to be entered in the main thread, before jax is."""
    starting = Starting()
    wake, write = os.pipe()
    os.set_blocking(write, False)
    before = {number: signal.signal(number, lambda *_: None) for number in HEARD}
    previous = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def listen() -> None:
        while heard := os.read(wake, 64):
            for number in heard:
                starting.hear(number)

    thread = threading.Thread(target=listen, daemon=True, name="signals")
    thread.start()
    try:
        yield starting
    finally:
        starting.over()
        signal.set_wakeup_fd(previous)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)
        thread.join()
        os.close(wake)
