"""Watches over processes: output kept and shown, signals passed on, one exit status, the first failure told last.

Each runs in a process group of its own, so that an interrupt from the terminal reaches it once, through us; what it
leaves behind is ended with it. Should we be killed, Linux kills it too: a run that nobody watches would hold the chips
and write into the directory of the run that is started again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_qat.errors import RETRY
from gemma_qat.launch.failures import (
    MARK,
    Failure,
    Kind,
    in_order,
    keep,
    kind_of,
    last_words,
    log_of,
    note_of,
    stamp,
    told,
)
from gemma_qat.launch.lines import Console, Lines, Log, redacted

PASSED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,  # The terminal is gone: nothing but to save and end.
}


def watch_over(
    commands: Mapping[int, Sequence[str]],
    logs: Path,
    environment: Mapping[str, str],
    *,
    who: str,
    grace: float = 10.0,
    retries: int = 0,
) -> int:
    """Runs the commands, by number of process, side by side, and returns the status of them all.

    0 when all ended so; that of the first failing process (`failures`) when any failed; else 75. After a failure the
    others have `grace` seconds to end before they are killed. When they end with 75, and no signal but USR1 asked for
    it, they are started again up to `retries` times. `who` begins the lines that we say.
    Raises: OSError when the logs cannot be written or a command cannot be started.
    """
    logs.mkdir(parents=True, exist_ok=True)
    # Python has None for an output that is closed.
    out, err = (Console(stream.buffer if stream else None) for stream in (sys.stdout, sys.stderr))

    def say(*lines: str) -> None:
        err.write("".join(f"{who}: {line}\n" for line in lines).encode())

    with _Signals() as signals:
        while True:
            children = _run(commands, logs, environment, signals, (out, err), grace, say)
            failures = [child.failure for child in children if child.failure]
            status = RETRY if any(child.status for child in children) else 0
            if failures or not status or retries < 1 or signals.end:
                break
            retries -= 1
            say(f"saved and stopped; going on, and {retries} more times if need be")
    if failures:
        if len(children) > 1:
            say(*told(failures)[:1])
            err.write("".join(f"{line}\n" for line in told(failures)[1:]).encode())
        say(f"logs are in {logs}")
        return in_order(failures)[0].status
    return status


def _run(
    commands: Mapping[int, Sequence[str]],
    logs: Path,
    environment: Mapping[str, str],
    signals: _Signals,
    consoles: tuple[Console, Console],
    grace: float,
    say: Callable[[str], None],
) -> list[_Child]:
    """Runs every command once and returns the processes when all have ended."""
    children: list[_Child] = []
    try:
        for process, command in commands.items():
            children.append(_Child(process, command, logs, environment, consoles))
        with selectors.DefaultSelector() as selector:
            selector.register(signals.wake, selectors.EVENT_READ)
            for child in children:
                child.register(selector)
            deadline = None
            while running := [child for child in children if child.status is None]:
                _wait(selector, signals, None if deadline is None else deadline - time.monotonic())
                for number in signals.taken():
                    for child in running:
                        child.send(number, told_to_end=signals.end)
                for child in running:
                    if child.has_ended(selector) and child.failure:
                        say(f"process {child.process} ended with status {child.status}")
                        deadline = deadline or time.monotonic() + grace
                left = [child for child in running if child.status is None]
                if left and deadline is not None and time.monotonic() >= deadline:
                    say(f"ending the {len(left)} that are left")
                    for child in left:
                        child.kill()
                    deadline = None
    finally:
        for child in children:
            child.close()
    return children


def _wait(selector: selectors.BaseSelector, signals: _Signals, seconds: float | None) -> None:
    """Passes on what processes print; returns when it did, on a signal, or after so many seconds."""
    for key, _ in selector.select(None if seconds is None else max(seconds, 0)):
        if key.data is None:
            signals.drain()
        elif data := _read(key.fd):
            key.data.add(data)
        elif data is not None:
            selector.unregister(key.fileobj)


def _read(file: int) -> bytes | None:
    """What is there to read; empty at the end, None when there is nothing yet."""
    try:
        return os.read(file, 65_536)
    except BlockingIOError:
        return None


class _Signals:
    """Signals to pass on, in the order in which they came; a descriptor wakes whoever waits for them."""

    def __init__(self) -> None:
        self._came: list[int] = []
        self.end = False
        """Whether any of them asks us to end for good."""

    def __enter__(self) -> _Signals:
        self.wake, self._write = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before: dict[int, Any] = {}
        for number in (*PASSED_ON, signal.SIGCHLD):
            # nohup has it ignored, and so it stays.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self.wake)
        os.close(self._write)

    def _note(self, number: int, _: Any) -> None:
        if number in PASSED_ON:
            self._came.append(number)
            self.end = self.end or number != signal.SIGUSR1

    def drain(self) -> None:
        """Empties the descriptor."""
        while _read(self.wake):
            pass

    def taken(self) -> list[int]:
        """Returns what came since the last time."""
        came, self._came = self._came, []
        return came


class _Child:
    """One process, its log and what became of it."""

    def __init__(
        self,
        process: int,
        command: Sequence[str],
        logs: Path,
        environment: Mapping[str, str],
        consoles: tuple[Console, Console],
    ) -> None:
        self.process, self._logs = process, logs
        self.status: int | None = None
        self.failure: Failure | None = None
        self._killed = self._told_to_end = False
        note_of(logs, process).unlink(missing_ok=True)
        self._log = Log(log_of(logs, process))
        shown = shlex.join(redacted(command)).replace("\n", " ")
        self._log.write(
            f"{MARK}began {stamp(time.time())} on {socket.gethostname()}: {shown}\n".encode()
        )
        self._popen = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, process_group=0, preexec_fn=_dies_with_us,
        )  # fmt: skip
        prefix = f"[{process}] ".encode()
        assert self._popen.stdout is not None and self._popen.stderr is not None
        out, err = consoles
        self._outputs = {
            self._popen.stdout: Lines(self._log, out, prefix),
            self._popen.stderr: Lines(self._log, err, prefix),
        }

    def register(self, selector: selectors.BaseSelector) -> None:
        """Has its output waited for."""
        for pipe, lines in self._outputs.items():
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, lines)

    def send(self, number: int, *, told_to_end: bool) -> None:
        """Passes a signal on."""
        self._told_to_end = told_to_end
        if self._popen.poll() is None:
            self._popen.send_signal(PASSED_ON[signal.Signals(number)])

    def kill(self) -> None:
        """Kills it with all that it started."""
        self._killed = True
        self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)

    def has_ended(self, selector: selectors.BaseSelector) -> bool:
        """Returns whether it has; if so its output is complete and its status known."""
        code = self._popen.poll()
        if code is None:
            return False
        ended = time.time()
        self._kill_group()
        for pipe, lines in self._outputs.items():
            while data := _read(pipe.fileno()):
                lines.add(data)
            lines.end()
            with contextlib.suppress(KeyError):
                selector.unregister(pipe)
        self.status = code if code >= 0 else 128 - code
        if self.status not in (0, RETRY):
            said = last_words(list(self._log.recent))
            self.failure = Failure(
                process=self.process, status=self.status, time=ended, host=socket.gethostname(),
                kind=self._kind(code, said), said=said,
            )  # fmt: skip
            keep(self._logs, self.failure)
        self._log.write(f"{MARK}ended {stamp(ended)} with status {self.status}\n".encode())
        return True

    def _kind(self, code: int, said: Sequence[str]) -> Kind:
        if self._killed or (self._told_to_end and code in (-signal.SIGTERM, -signal.SIGINT)):
            return "followed"
        # jax aborts a process that lost the others; any other signal came from outside, or is a bug of its own.
        return "own" if code < 0 and code != -signal.SIGABRT else kind_of(said)

    def close(self) -> None:
        """Lets go of pipes and log; what still runs is killed."""
        if self._popen.poll() is None:
            self._kill_group()
            self._popen.wait()
        for pipe in self._outputs:
            pipe.close()
        self._log.close()


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _dies_with_us() -> None:
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """Returns a port of this machine that nobody listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
