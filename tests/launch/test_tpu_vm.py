"""The launcher for TPU VMs. gcloud is a stand-in: what it would have ssh run on the workers runs in a directory here."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from stand_ins import HOSTILE, ROOT, Tools, complaint, shown_in

SCRIPT = "launch/tpu_vm.sh"
WHERE = ("--zone", "z", "--project", "p")
ON = ("--on", "v5p:4x4x4", *WHERE)
GCLOUD = r"""
case "$*" in
  "auth list"*) echo me@example.com ;;
  *queued-resources\ describe*) cat "$STATE" ;;
  *queued-resources\ create*) echo ACTIVE >"$STATE" ;;
  *tpu-vm\ ssh*)
    [ "$(cat "$STATE")" = ACTIVE ] || exit 255
    for word in "$@"; do
      case $word in --command=*) (cd "$HOME" && bash -c "${word#--command=}") || exit $? ;; esac
    done ;;
  *tpu-vm\ scp*) cp "${4:-}" "$HOME/gemma_qat.tar.gz" 2>/dev/null || cp "$5" "$HOME/gemma_qat.tar.gz" ;;
esac
"""


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    """Stand-ins for gcloud, for the metadata server of a worker, and for gemma-qat on both sides."""
    made = Tools(tmp_path)
    (made.path / "cp").symlink_to(str(shutil.which("cp")))
    made.make_gemma_qat(["v5p:4x4x4", "v5e:2x2", "h100:4x8"])
    made.make("gcloud", GCLOUD)
    made.make("curl", "printf 3")
    made.make("mountpoint")
    (tmp_path / "state").write_text("ACTIVE\n", encoding="utf-8")
    return made


@pytest.fixture
def project(tools: Tools, tmp_path: Path) -> Path:
    """A checkout with the launch scripts and nothing else, so that copying it is quick."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "launch" / "new name.txt").write_text("ü", encoding="utf-8")
    (root / "untracked").write_text("x", encoding="utf-8")
    for command in (["init", "-q"], ["add", "launch"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root


def worker(tools: Tools, *statuses: int) -> None:
    """Puts an environment into the copy of the project on the worker; its runs end with these statuses, in turn."""
    place = tools.home / "gemma_qat" / ".venv" / "bin"
    place.mkdir(parents=True, exist_ok=True)
    queue = tools.home / "statuses"
    queue.write_text("".join(f"{status}\n" for status in statuses), encoding="utf-8")
    script = tools.make(
        "on-the-worker", f"status=$(head -n 1 '{queue}'); sed -i 1d '{queue}'; exit \"$status\""
    )
    (place / "gemma-qat").symlink_to(script)
    shutil.copytree(ROOT / "launch", tools.home / "gemma_qat" / "launch", dirs_exist_ok=True)


def run(tools: Tools, root: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs the launcher in a checkout."""
    state = {"STATE": str(tools.home.parent / "state")}
    return tools.run(SCRIPT, *words, root=root, **{**state, **more})


def ended(tools: Tools, name: str) -> str:
    """Waits for the detached run on the worker, and returns the status that it wrote down."""
    file = tools.home / ".gemma_qat" / f"{name}.status"
    for _ in range(200):
        if file.exists() and file.read_text():
            return file.read_text().strip()
        time.sleep(0.05)
    raise AssertionError(f"{file} was never written")


def test_the_words_of_a_command_arrive(tools: Tools) -> None:
    """If it fails, an overlay means something else on the workers than on the command line."""
    worker(tools, 75)
    words = ["train", "configs/e2b_q4_0.py", *HOSTILE]
    done = run(tools, ROOT, *ON, "run", *words)
    assert done.returncode == 0, done.stderr
    assert ended(tools, "e2b-q4-0") == "75"
    (call,) = tools.calls("on-the-worker")
    assert call[1:] == [
        "launch", "worker", "--process", "3", "--logs", "runs/logs/e2b-q4-0", "--",
        "gemma-qat", *words, "--coordinator", "auto",
    ]  # fmt: skip
    checked = [call[3:] for call in tools.calls("gemma-python") if "--check" in call]
    assert checked == [[*words, "--check", "--on", "v5p:4x4x4"]]
    told = run(tools, ROOT, *WHERE, "--name", "e2b-q4-0", "status")
    assert "[3] ended with status 75" in told.stdout


def test_one_host_is_alone(tools: Tools) -> None:
    """If it fails, a run of one host waits for others."""
    worker(tools, 0)
    assert run(tools, ROOT, "--on", "v5e:2x2", *WHERE, "run", "train", "c.py").returncode == 0
    assert ended(tools, "c") == "0"
    assert tools.calls("on-the-worker")[0][-2:] == ["train", "c.py"]


def test_a_run_is_started_once(tools: Tools) -> None:
    """If it fails, a connection that gcloud tried again starts the run twice, on the same chips."""
    worker(tools, 0)
    tools.make("on-the-worker", "exec sleep 30")
    for expected in ("[3] started", "[3] runs already"):
        done = run(tools, ROOT, *ON, "run", "train", "c.py")
        assert expected in done.stdout, done.stderr
    assert "[3] runs" in run(tools, ROOT, *WHERE, "--name", "c", "status").stdout
    assert run(tools, ROOT, *WHERE, "--name", "c", "stop").returncode == 0
    assert ended(tools, "c") == "143"  # the stand-in does not save; the signal came to it alone
    assert len(tools.calls("on-the-worker", "launch", "worker")) == 1


def test_a_machine_that_goes_down(tools: Tools) -> None:
    """If it fails, the end of a run that saved while its machine went down is taken for a failure."""
    worker(tools, 0)
    tools.make(
        "on-the-worker", "trap 'sleep 0.3; kill $!; exit 75' TERM; echo ready; sleep 20 & wait"
    )
    assert run(tools, ROOT, *ON, "run", "train", "c.py").returncode == 0
    state = tools.home / ".gemma_qat"
    for _ in range(200):
        if (state / "c.out").read_text() == "ready\n":
            break
        time.sleep(0.05)
    for who in ("worker", "pid"):  # all processes are told, not only the one that saves
        os.kill(int((state / f"c.{who}").read_text()), signal.SIGTERM)
    assert ended(tools, "c") == "75"


def test_the_copy_has_what_git_tracks(tools: Tools, project: Path) -> None:
    """If it fails, the workers run other code than the checkout has, or get its runs and environment too."""
    done = run(tools, project, *WHERE, "--name", "n", "copy")
    assert done.returncode == 0, done.stderr
    there = tools.home / "gemma_qat"
    assert (there / "launch" / "new name.txt").read_text(encoding="utf-8") == "ü"
    assert not (there / "untracked").exists()


def test_a_config_that_would_not_be_copied_is_told(tools: Tools, project: Path) -> None:
    """If it fails, a slice is created and set up before a config that git does not track is missed on it."""
    done = run(tools, project, *ON, "up", "train", "untracked")
    assert "untracked is not on the workers" in complaint("tpu_vm.sh", done)
    assert tools.calls("gcloud", "compute") == []


def test_up_does_one_after_the_other(tools: Tools, project: Path) -> None:
    """If it fails, a slice is created for a run that never starts on it."""
    worker(tools, 0)
    tools.make("on-the-worker")
    env = "launch/env.sh"
    (project / env).write_text("find_python() { :; }\nmake_env() { :; }\n", encoding="utf-8")
    done = run(tools, project, *ON, "--spot", "--every", "0", "up", "train", "c.py")
    assert done.returncode == 0, done.stderr
    did = [call[3:5] for call in tools.calls("gcloud") if call[1] == "compute"]
    assert did == [
        ["queued-resources", "create"], ["queued-resources", "describe"], ["tpu-vm", "scp"], *[["tpu-vm", "ssh"]] * 4,
    ]  # fmt: skip
    (create,) = tools.calls("gcloud", "compute", "tpus", "queued-resources", "create")
    assert create[5:] == [
        "c", "--zone=z", "--project=p", "--node-id=c", "--accelerator-type=v5p-128", "--spot",
        "--runtime-version=v2-alpha-tpuv5",
    ]  # fmt: skip
    assert ended(tools, "c") == "0"


def keep_going(tools: Tools, project: Path) -> subprocess.CompletedProcess[str]:
    (project / "launch" / "env.sh").write_text(
        "find_python() { :; }\nmake_env() { :; }\n", encoding="utf-8"
    )
    more = ("--storage", "server:/runs", "--keep-going", "--every", "0")
    return run(tools, project, *ON, *more, "run", "train", "c.py")


def test_what_was_saved_and_stopped_goes_on(tools: Tools, project: Path) -> None:
    """If it fails, a run that ended with 75 stays where it is until somebody looks."""
    worker(tools, 75, 75, 0)
    done = keep_going(tools, project)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "c is done"
    assert len(tools.calls("on-the-worker")) == 3


def test_what_failed_ends_it(tools: Tools, project: Path) -> None:
    """If it fails, a run with a mistake in it is started for ever, or its status is lost."""
    worker(tools, 1, 0, 0)
    done = keep_going(tools, project)
    assert done.returncode == 1
    assert "the run failed with status 1" in done.stderr
    starts = [call[1:3] for call in tools.calls("on-the-worker")]
    assert starts == [["launch", "worker"], ["launch", "failures"]]


def test_a_slice_that_is_taken_away_is_asked_for_again(tools: Tools, project: Path) -> None:
    """If it fails, a preempted run is over, or goes on without the project and the storage on the new machines."""
    worker(tools, 0)
    tools.make(
        "on-the-worker",
        f"""if [ ! -e '{tools.home}/taken' ]; then
          : >'{tools.home}/taken'; echo SUSPENDED >"$STATE"; kill -9 $PPID; exit 1; fi""",
    )
    done = keep_going(tools, project)
    assert done.returncode == 0, done.stderr
    assert "c was preempted: asking for it again" in done.stdout
    assert done.stdout.splitlines()[-1] == "c is done"
    did = [
        call[4] for call in tools.calls("gcloud", "compute", "tpus", "queued-resources")
        if call[4] != "describe"
    ]  # fmt: skip
    assert did == ["delete", "create"]
    hosts = [
        word for call in tools.calls("gcloud") for word in call if "tpu_vm_host.sh setup" in word
    ]
    assert hosts == ["--command=bash gemma_qat/launch/tpu_vm_host.sh setup server:/runs"]
    assert len(tools.calls("on-the-worker", "launch", "worker")) == 2


def test_storage_is_mounted(tools: Tools, project: Path) -> None:
    """If it fails, checkpoints go to a disk that is lost with the machine."""
    worker(tools)
    tools.make("mountpoint", "exit 1")
    for tool in ("gcsfuse", "sudo", "mount.nfs"):
        tools.make(tool)
    host = str(tools.home / "gemma_qat" / "launch" / "tpu_vm_host.sh")
    (tools.home / "gemma_qat" / "launch" / "env.sh").write_text(
        "find_python() { :; }\nmake_env() { :; }\n"
    )
    for storage in ("gs://bucket", "gs://bucket/a/b", "server:/runs"):
        done = tools.run(host, "setup", storage, root=tools.home)
        assert done.returncode == 0, done.stderr
    assert tools.calls("gcsfuse") == [
        ["gcsfuse", "--implicit-dirs", "bucket", "runs"],
        ["gcsfuse", "--implicit-dirs", "--only-dir", "a/b", "bucket", "runs"],
    ]
    assert tools.calls("sudo") == [["sudo", "mount", "-t", "nfs", "server:/runs", "runs"]]


@pytest.mark.parametrize(
    ("more", "beginning", "end"),
    [
        (("--direct",), ["tpu-vm", "create", "n"], ["--accelerator-type=v5p-128", "--version=v2-alpha-tpuv5"]),
        (("--internal-ip", "--runtime-version", "x"), ["queued-resources", "create", "n"], ["--internal-ips", "--runtime-version=x"]),
        (("--service-account", "a@b", "--network", "net"), ["queued-resources", "create", "n"],
         ["--service-account=a@b", "--network=net", "--runtime-version=v2-alpha-tpuv5"]),
    ],
)  # fmt: skip
def test_how_a_slice_is_asked_for(
    tools: Tools, more: tuple[str, ...], beginning: list[str], end: list[str]
) -> None:
    """If it fails, an option of creating is dropped on the way to gcloud."""
    assert run(tools, ROOT, *ON, "--name", "n", *more, "create").returncode == 0
    (call,) = [call for call in tools.calls("gcloud") if "create" in call]
    assert call[3:6] == beginning and call[-len(end) :] == end


def test_a_reservation_needs_alpha(tools: Tools) -> None:
    """If it fails, gcloud refuses the option: only its alpha commands take a reservation by name."""
    assert run(tools, ROOT, *ON, "--name", "n", "--reservation", "r", "create").returncode == 0
    (call,) = tools.calls("gcloud", "alpha", "compute", "tpus", "queued-resources", "create")
    assert "--reservation=r" in call


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*WHERE, "run", "train", "c.py"), "--on MACHINE is expected"),
        (("--on", "v5p:4x4x4", "--zone", "z", "run", "train", "c.py"), "no project"),
        (("--on", "v5p:4x4x4", "--project", "p", "run", "train", "c.py"), "no zone"),
        ((*ON,), "an action is expected"),
        ((*ON, "train", "c.py"), "unknown action train"),
        ((*ON, "run"), "a command is expected"),
        ((*ON, "create"), "--name is expected"),
        ((*ON, "run", "--name", "n", "train", "c.py"), "options stand before the command"),
        ((*ON, "--storage", "bucket", "run", "train", "c.py"), "gs://BUCKET or SERVER:/DIRECTORY expected"),
        ((*ON, "--keep-going", "run", "train", "c.py"), "--keep-going needs --storage"),
        ((*ON, "--spot", "--reservation", "r", "run", "train", "c.py"), "exclude one another"),
        ((*ON, "--every", "soon", "run", "train", "c.py"), "--every soon: a whole number expected"),
        (("--on", "h100:4x8", *WHERE, "run", "train", "c.py"), "h100:4x8 has no TPUs"),
        (("--on", "v3:8", *WHERE, "run", "train", "c.py"), "unknown chip 'v3:8'"),
        ((*ON, "run", "sweep", "s.py", "--cell", "a"), "sweep runs on one host, v5p:4x4x4 has 16"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_at_once(tools: Tools, words: tuple[str, ...], said: str) -> None:
    """If it fails, a mistake is found out on machines that are paid for."""
    assert said in complaint("tpu_vm.sh", run(tools, ROOT, *words))
    assert tools.calls("gcloud", "compute") == []


def test_no_gcloud_or_no_login(tools: Tools) -> None:
    """If it fails, a missing tool or login is found out half way."""
    words = (*ON, "run", "train", "c.py")
    tools.make("gcloud")
    assert "gcloud has no login" in complaint("tpu_vm.sh", run(tools, ROOT, *words))
    tools.drop("gcloud")
    assert "gcloud is not on PATH" in complaint("tpu_vm.sh", run(tools, ROOT, *words))


def test_a_failed_preflight_ends_it(tools: Tools) -> None:
    """If it fails, machines are asked for that the run cannot use."""
    done = run(tools, ROOT, *ON, "up", "train", "c.py", CHECK="2")
    assert "preflight" in complaint("tpu_vm.sh", done)
    assert tools.calls("gcloud", "compute") == []


def test_what_will_not_come_is_not_waited_for(tools: Tools) -> None:
    """If it fails, the launcher waits for ever for a request that was refused."""
    (tools.home.parent / "state").write_text("FAILED\n", encoding="utf-8")
    done = run(tools, ROOT, *WHERE, "--name", "n", "--every", "0", "wait")
    assert done.returncode == 1
    assert "n will not come: gcloud compute tpus queued-resources describe n" in done.stderr


def test_the_page_shows_the_dry_runs(tools: Tools) -> None:
    """If it fails, docs/launch/tpu_vm.md shows another dry run than the launcher prints, or one that needs gcloud."""
    tools.drop("gcloud")
    blocks = shown_in("tpu_vm.md")
    assert len(blocks) == 2
    for command, output in blocks:
        done = tools.call([str(tools.path / "bash"), "-c", command])
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == output + "\n"


@pytest.mark.parametrize("script", ["gke.sh", "tpu_vm.sh", "xpk.sh", "tpu_vm_host.sh"])
def test_help(tools: Tools, script: str) -> None:
    """If it fails, nobody can find out what a launcher takes."""
    done = tools.run(f"launch/{script}", "--help")
    assert done.returncode == 0 and f"bash launch/{script}" in done.stdout
    assert "set -euo" not in done.stdout and "#" not in done.stdout
