"""Processes that are watched over: what they print is kept and shown, signals reach them, the first failure is found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gemma_qat.cli.launch_worker import environment, number_of
from gemma_qat.cli.main import main
from gemma_qat.errors import InputError
from gemma_qat.launch.failures import Failure, failures_in, in_order, kind_of, last_words
from gemma_qat.launch.lines import Console, Lines, Log, redacted
from gemma_qat.plan.gpus import FRACTION

ROOT = Path(__file__).resolve().parents[2]

Start = Callable[..., "subprocess.Popen[bytes]"]

NOTES_A_SIGNAL = """
import pathlib, signal, sys, time
def end(number, frame):
    print("asked", number, flush=True)
    sys.exit({status})
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, end)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts an action of `gemma-qat launch` on a piece of Python; logs go to tmp_path/logs.

    Signals are as a terminal's, also where the tests themselves run under nohup, which processes inherit.
    """

    def begin(action: str, code: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "gemma_qat", "launch", action, *arguments]
        command += ["--logs", str(tmp_path / "logs"), "--", sys.executable, "-c", code]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)} | {"SLURM_PROCID": "3"}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )  # fmt: skip

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield begin
    signal.signal(signal.SIGHUP, before)


def ended(process: subprocess.Popen[bytes], status: int) -> tuple[bytes, bytes]:
    """Waits for it and returns what it printed."""
    out, err = process.communicate(timeout=30)
    assert process.returncode == status, (process.returncode, out, err)
    return out, err


def when_ready(logs: Path, count: int = 1) -> None:
    end = time.monotonic() + 20
    while sum(b"ready" in log.read_bytes().splitlines() for log in logs.glob("*.log")) < count:
        assert time.monotonic() < end, "it never began"
        time.sleep(0.02)


def test_output_is_kept_raw_and_shown_with_the_number(start: Start, tmp_path: Path) -> None:
    """If it fails, a log lacks a last line, a bar, a long line, or says which password a command was given."""
    code = "import sys; print('out'); sys.stderr.write('10%\\r20%\\r\\n'); sys.stdout.write('y' * 200_000 + '\\nlast')"
    out, err = ended(start("worker", code, "--process", "5"), 0)
    assert out == b"[5] out\n[5] " + b"y" * 200_000 + b"\n[5] last\n"
    assert err == b"[5] 10%\r[5] 20%\r\n"
    header, *body, end = (tmp_path / "logs" / "process-5.log").read_bytes().split(b"\n")[:-1]
    assert header.startswith(b"=== began 20") and b" -c 'import sys; print(" in header
    assert b"\n".join(sorted(body)) == b"\n".join(
        sorted([b"out", b"10%\r20%\r", b"y" * 200_000, b"last"])
    )
    assert end.startswith(b"=== ended 20") and end.endswith(b"with status 0")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_reaches_the_command_and_its_status_us(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    """If it fails, a scheduler's signal ends the worker and not the run, or a saved run is taken for a failure."""
    process = start("worker", NOTES_A_SIGNAL.format(status=75))
    when_ready(tmp_path / "logs")
    process.send_signal(number)
    out, err = ended(process, 75)
    heard = signal.SIGTERM if number == signal.SIGHUP else number
    assert err == b""
    assert out == f"[3] ready\n[3] asked {heard.value}\n".encode()
    assert not list((tmp_path / "logs").glob("*.failed"))


def test_it_is_started_again_until_it_does_not_stop(start: Start, tmp_path: Path) -> None:
    """If it fails, --retry starts too often, or gives up a run that only had to go on."""
    code = f"import pathlib, sys; file = pathlib.Path({str(tmp_path / 'n')!r}); file.open('a').write('x')"
    code += "; sys.exit(75 * (file.stat().st_size < 3))"
    ended(start("worker", code, "--retry", "1"), 75)
    assert (tmp_path / "n").stat().st_size == 2
    ended(start("worker", code, "--retry", "5"), 0)
    assert (tmp_path / "n").stat().st_size == 3
    log = (tmp_path / "logs" / "process-3.log").read_text()
    assert log.count("=== began") == log.count("=== ended") == 3


def test_one_that_is_told_to_end_is_not_started_again(start: Start, tmp_path: Path) -> None:
    """If it fails, Ctrl-C or a scheduler that takes the machine away does not end the worker."""
    process = start("worker", NOTES_A_SIGNAL.format(status=75), "--retry", "3")
    when_ready(tmp_path / "logs")
    process.send_signal(signal.SIGTERM)
    ended(process, 75)
    assert (tmp_path / "logs" / "process-3.log").read_text().count("=== began") == 1


def test_a_killed_worker_takes_its_command_along(start: Start, tmp_path: Path) -> None:
    """If it fails, a run goes on unwatched, holds the chips, and writes beside the one that is started again."""
    if sys.platform != "linux":
        pytest.skip("only Linux ends a process with its parent")
    code = f"import os; print('pid', os.getpid()){NOTES_A_SIGNAL.format(status=0)}"
    process = start("worker", code)
    when_ready(tmp_path / "logs")
    process.kill()
    out, _ = ended(process, -signal.SIGKILL)
    child, end = int(out.split()[2]), time.monotonic() + 10
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < end, "it still runs"
        time.sleep(0.02)
    (lost,) = failures_in(tmp_path / "logs")
    assert (lost.process, lost.kind, lost.said) == (3, "lost", (f"pid {child}", "ready"))


FAILS_AFTER_THE_OTHER = """
import sys, time
process = int(sys.argv[-1])
if process == 1:
    time.sleep(0.7)
    raise ZeroDivisionError("its own error")
print("E1128 coordination_service: task 1 is UNAVAILABLE", file=sys.stderr)
if process == 0:
    raise RuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:4243")
time.sleep(60)
"""


def test_the_first_failure_is_told_and_the_rest_is_ended(start: Start, tmp_path: Path) -> None:
    """If it fails, a person reads the traceback of a process that only lost another, or the last of them hangs."""
    process = start("local", FAILS_AFTER_THE_OTHER, "3", "--grace", "1")
    began = time.monotonic()
    _, err = ended(process, 1)
    assert time.monotonic() - began < 20
    report = err.decode().partition("local: process 1 failed first: status 1")[2].splitlines()
    assert report[1] == "Traceback (most recent call last):"
    assert report[3] == "ZeroDivisionError: its own error"
    assert report[4].startswith("process 0: status 1 ") and "another process was gone" in report[4]
    assert report[5].startswith("process 2: status 137 ") and "told to end" in report[5]
    assert report[6:] == [f"local: logs are in {tmp_path / 'logs'}"]
    assert [failure.process for failure in failures_in(tmp_path / "logs")] == [1, 0, 2]


def test_all_that_stop_are_stopped_and_one_that_fails_fails(start: Start, tmp_path: Path) -> None:
    """If it fails, a preempted run is not requeued, or one that failed is."""
    stopped = start("local", NOTES_A_SIGNAL.format(status=75), "2")
    when_ready(tmp_path / "logs", 2)
    stopped.send_signal(signal.SIGINT)
    ended(stopped, 75)
    ended(start("local", "import sys; sys.exit([75, 2][int(sys.argv[-1])])", "2"), 2)


def failure(process: int, when: float, *said: str, **others: object) -> Failure:
    given = {"status": 1, "host": "h", "kind": kind_of(said), **others}
    return Failure(process=process, time=when, said=said, **given)  # type: ignore[arg-type]


def test_an_error_of_its_own_is_first_whatever_the_clock_says() -> None:
    """If it fails, hosts whose clocks differ hide which process failed."""
    found = [
        failure(0, 1.0, "F1128 Terminating process because the JAX distributed service detected fatal errors"),
        failure(1, 2.0, "jax.errors.JaxRuntimeError: DEADLINE_EXCEEDED: Barrier timed out"),
        failure(2, 4.0, "Traceback (most recent call last):", "  f()  # peer", "ValueError: x", "Gloo AllGather failed"),
        failure(3, 3.0, kind="lost"),
        failure(5, 6.0, "[Gloo] Rank 0 is connected to 1 peer ranks.", "step 3: loss 4.1", "Bus error"),
        failure(4, 5.0, "gemma-qat: error: process 4 of 5: no space", "E1128 heartbeat"),
    ]  # fmt: skip
    assert [f.process for f in in_order(found)] == [2, 4, 5, 3, 0, 1]


def test_the_last_traceback_near_the_end_is_what_a_process_said() -> None:
    """If it fails, a warning of hours ago is shown for what killed a process."""
    old = ["Traceback (most recent call last):", "ValueError: old"]
    assert last_words([*old, *(["step"] * 400)]) == ("step",) * 20
    both = last_words([*old, "During", "Traceback (most recent call last):", "  f", "KeyError: 1"])
    assert both == ("Traceback (most recent call last):", "  f", "KeyError: 1")


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("--token abc x", "--token *** x"),
        ("HF_TOKEN=abc data.tokenizer=t", "HF_TOKEN=*** data.tokenizer=t"),
        ("--api-key=abc --max-tokens 5", "--api-key=*** --max-tokens 5"),
        ("--password --flag", "--password --flag"),
    ],
)
def test_secrets_are_not_shown(command: str, shown: str) -> None:
    """If it fails, a password lies in a log that others read, or a value that is none cannot be read."""
    assert redacted(command.split()) == shown.split()


def test_a_gpu_is_taken_as_a_plan_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it fails, what a check found to fit does not, or nobody can choose another share."""
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    monkeypatch.delenv(name, raising=False)
    assert float(environment()[name]) == FRACTION
    monkeypatch.setenv(name, ".5")
    assert environment()[name] == ".5"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_lines_do_not_depend_on_how_they_were_read(tmp_path: Path, size: int) -> None:
    """If it fails, a line that comes in two pieces is shown as two."""
    data = b"one\r\ntwo\n\n10%\r20%\rthree"
    with (tmp_path / "shown").open("wb") as stream:
        log = Log(tmp_path / "log")
        lines = Lines(log, Console(stream), b"> ")
        for start in range(0, len(data), size):
            lines.add(data[start : start + size])
        lines.end()
        log.close()
    assert (tmp_path / "log").read_bytes() == data + b"\n"
    assert (tmp_path / "shown").read_bytes() == b"> one\r\n> two\n> \n> 10%\r> 20%\r> three\n"


def test_schedulers_number_processes() -> None:
    """If it fails, all hosts write the log of process 0."""
    assert number_of({}) == 0
    assert number_of({"TPU_WORKER_ID": "4", "JOB_COMPLETION_INDEX": ""}) == 4
    assert number_of({"TPU_WORKER_ID": "4", "SLURM_PROCID": "2"}) == 2
    with pytest.raises(InputError, match="SLURM_PROCID=x"):
        number_of({"SLURM_PROCID": "x"})


def test_the_local_page_shows_what_the_script_prints() -> None:
    """If it fails, docs/launch/local.md tells a person to expect something else than what happens."""
    page = (ROOT / "docs" / "launch" / "local.md").read_text()
    command, shown = page.partition("```\n$ ")[2].partition("```")[0].split("\n", 1)
    environment = {name: value for name, value in os.environ.items() if name != "GEMMA_QAT_PYTHON"}
    run = {"cwd": ROOT, "env": environment, "text": True, "capture_output": True}
    stamp = ROOT / ".venv" / ".installed"
    before = stamp.stat().st_mtime if stamp.exists() else None
    assert subprocess.run(command.split(), **run, check=True).stdout == shown  # type: ignore[call-overload]
    assert (stamp.stat().st_mtime if stamp.exists() else None) == before, "a dry run made .venv"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["0", "train", "c"], "a number of processes"),
        (["two", "train", "c"], "a number of processes is expected, not two"),
        (["2"], "a command is expected"),
        (["2", "configs/e2b_q4_0.py"], "train or sweep expected, not configs/e2b_q4_0.py"),
        (["2", "train", "--variant", "tiny"], "a config right behind it"),
        (["--x"], "option --x"),
    ],
)
def test_the_local_script_refuses(arguments: list[str], said: str) -> None:
    """If it fails, a mistyped command makes an environment, or starts something else."""
    script = str(ROOT / "launch" / "local_multiprocess.sh")
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", [1, 2])
def test_outputs_that_are_closed(tmp_path: Path, closed: int) -> None:
    """If it fails, a worker that a daemon starts without outputs dies before it starts anything."""
    code = "import sys; print('to out'); print('to err', file=sys.stderr); sys.exit(4)"
    worker = [sys.executable, "-m", "gemma_qat", "launch", "worker", "--logs", str(tmp_path), "--"]
    script = f'exec "$@" {closed}>&-'
    done = subprocess.run(
        ["bash", "-c", script, "-", *worker, sys.executable, "-c", code], capture_output=True,
        check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, b"Traceback" in done.stderr) == (4, False), done.stderr
    lines = (tmp_path / "process-0.log").read_text().splitlines()
    assert {"to out", "to err"} <= set(lines)


@pytest.mark.parametrize("option", ["--process", "--retry"])
def test_numbers_below_zero_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """If it fails, a log has a name that `launch failures` cannot read."""
    assert main(["launch", "worker", "--logs", "/dev/null/x", option, "-1", "--", "true"]) == 2
    assert f"{option} -1: 0 or more expected" in capsys.readouterr().err
