"""The launcher for clusters that xpk made. xpk, gcloud and kubectl are stand-ins; no cluster is reached."""

from __future__ import annotations

from pathlib import Path

import pytest
from stand_ins import HOSTILE, Tools, complaint, expanded, shown_in

SCRIPT = "launch/xpk.sh"
WHERE = ("--cluster", "ours", "--zone", "z", "--project", "p")
ON = ("--on", "v5p:4x4x4", *WHERE, "--image", "i")


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    """Stand-ins for xpk, gcloud, kubectl and gemma-qat."""
    made = Tools(tmp_path)
    made.make_gemma_qat(["v5p:4x4x4", "v5e:2x4", "v5e:2x2", "v6e:4x4", "h100:4x8"])
    made.make("xpk")
    made.make("kubectl")
    made.make("gcloud", "echo me@example.com")
    made.make("gemma-qat", "exit 75")
    return made


def command_of(tools: Tools) -> str:
    """What xpk was given as --command."""
    (call,) = tools.calls("xpk", "workload", "create")
    return call[call.index("--command") + 1]


def test_the_words_of_a_command_arrive(tools: Tools) -> None:
    """If it fails, an overlay means something else in the container, or its exit status is lost.

    The script around the command is the one that xpk 1.16 writes into the manifest (src/xpk/core/docker_container.py).
    """
    words = ["train", "configs/e2b_q4_0.py", *HOSTILE]
    done = tools.run(SCRIPT, *ON, "--slices", "2", *words)
    assert done.returncode == 0, done.stderr
    (call,) = tools.calls("xpk", "workload", "create")
    assert call[3 : call.index("--command")] == [
        *WHERE, "--workload", "e2b-q4-0", "--tpu-type", "v5p-4x4x4", "--num-slices", "2", "--priority", "medium",
        "--max-restarts", "100", "--restart-on-exit-codes", "75", "--termination-grace-period-seconds", "600",
        "--docker-image", "i",
    ]  # fmt: skip
    assert "\n" not in command_of(tools)
    around = f"({command_of(tools)}) & PID=$!; while kill -0 $PID 2>/dev/null; do sleep 0.1; done; wait $PID; exit $?"
    known = {"MEGASCALE_SLICE_ID": "1", "X": "x", "COORDINATOR": "c", "HOME": "/root"}
    bash = str(tools.path / "bash")
    ended = tools.call([bash, "-c", expanded(around, known)], MEGASCALE_SLICE_ID="1")
    assert ended.returncode == 75
    (worker,) = tools.calls("gemma-qat")
    logs = ["--logs", "runs/logs/e2b-q4-0/slice-1"]
    assert worker[1:] == [
        "launch",
        "worker",
        *logs,
        "--",
        "gemma-qat",
        *words,
        "--coordinator",
        "auto",
    ]
    checked = [call[3:] for call in tools.calls("gemma-python") if "--check" in call]
    assert checked == [[*words, "--check", "--on", "v5p:4x4x4", "--slices", "2"]]


@pytest.mark.parametrize(
    ("on", "joined"), [("v5e:2x2", False), ("v5e:2x4", True), ("v6e:4x4", True)]
)
def test_hosts_of_a_slice(tools: Tools, on: str, joined: bool) -> None:
    """If it fails, one host waits for others or several do not know of one another; xpk has 2x4 on two machines."""
    assert tools.run(SCRIPT, "--on", on, *WHERE, "--image", "i", "train", "c.py").returncode == 0
    assert command_of(tools).endswith("--coordinator auto") is joined


def test_a_base_image_environment_and_storage(tools: Tools) -> None:
    """If it fails, an option is dropped on the way to xpk."""
    more = ("--base-image", "b", "--env", "A=b c", "--storage", "runs", "--name", "mine")
    done = tools.run(SCRIPT, "--on", "v6e:4x4", *WHERE, *more, "train", "c.py")
    assert done.returncode == 0, done.stderr
    (call,) = tools.calls("xpk")
    text = "\0".join(call)
    for pair in ("--base-docker-image\0b", "--env\0A=b c", "--storage\0runs", "--workload\0mine"):
        assert pair in text
    assert "--docker-image" not in call


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("list",), ["xpk", "workload", "list", *WHERE]),
        (("--name", "n", "delete"), ["xpk", "workload", "delete", *WHERE, "--workload", "n", "--force"]),
    ],
)  # fmt: skip
def test_other_actions(tools: Tools, words: tuple[str, ...], expected: list[str]) -> None:
    """If it fails, a workload that was started cannot be found or ended."""
    assert tools.run(SCRIPT, *WHERE, *words).returncode == 0
    assert tools.calls("xpk") == [expected]


def test_a_failed_preflight_ends_it(tools: Tools) -> None:
    """If it fails, a run that cannot work is submitted all the same."""
    assert "preflight" in complaint("xpk.sh", tools.run(SCRIPT, *ON, "train", "c.py", CHECK="2"))
    assert tools.calls("xpk") == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*WHERE, "--image", "i", "train", "c.py"), "--on MACHINE is expected"),
        (("--on", "v5p:4x4x4", *WHERE, "train", "c.py"), "--image is expected"),
        ((*ON, "--base-image", "b", "train", "c.py"), "exclude one another"),
        (("--on", "v5p:4x4x4", *WHERE[2:], "train", "c.py"), "--cluster is expected"),
        (("--cluster", "c", "--zone", "z", "list"), "no project"),
        (("--cluster", "c", "--project", "p", "list"), "no zone"),
        ((*WHERE, "delete"), "--name is expected"),
        ((*ON, "--slices", "two", "train", "c.py"), "--slices two: a whole number expected"),
        ((*ON, "--env", 'A="', "train", "c.py"), "no value with quotes"),
        (("--on", "h100:4x8", *WHERE, "--image", "i", "train", "c.py"), "h100:4x8 has no TPUs"),
        (("--on", "v7:1", *WHERE, "--image", "i", "train", "c.py"), "unknown chip 'v7:1'"),
        ((*ON, "sweep", "s.py", "--cell", "a"), "sweep runs on one host"),
    ],
)
def test_what_is_wrong_is_said_at_once(tools: Tools, words: tuple[str, ...], said: str) -> None:
    """If it fails, a mistake is found out by xpk, or on the cluster."""
    assert said in complaint("xpk.sh", tools.run(SCRIPT, *words))
    assert tools.calls("xpk") == []


@pytest.mark.parametrize(
    ("tool", "said"),
    [
        ("xpk", "xpk is not on PATH"),
        ("gcloud", "gcloud is not on PATH"),
        ("kubectl", "kubectl is not"),
    ],
)
def test_a_missing_tool(tools: Tools, tool: str, said: str) -> None:
    """If it fails, a missing tool is found out half way."""
    tools.drop(tool)
    assert said in complaint("xpk.sh", tools.run(SCRIPT, *ON, "train", "c.py"))


def test_no_login(tools: Tools) -> None:
    """If it fails, xpk asks for a password in the middle."""
    tools.make("gcloud")
    assert "gcloud has no login" in complaint("xpk.sh", tools.run(SCRIPT, *ON, "train", "c.py"))


def test_the_page_shows_the_dry_runs(tools: Tools) -> None:
    """If it fails, docs/launch/xpk.md shows another dry run than the launcher prints, or one that needs a tool."""
    for tool in ("xpk", "gcloud", "kubectl"):
        tools.drop(tool)
    blocks = shown_in("xpk.md")
    assert len(blocks) == 2
    for command, output in blocks:
        done = tools.call([str(tools.path / "bash"), "-c", command])
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == output + "\n"
