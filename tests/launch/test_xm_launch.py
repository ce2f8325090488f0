"""launch/xm_launch.py without XManager (test_xmanager_local.py is with it): dry runs against kept ones, what is refused, how hosts join one another.

To keep dry runs anew after a change that is meant:  GEMMA_QAT_KEEP=1 python -m pytest tests/launch/test_xm_launch.py
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from launch.xm_cases import BINARY, CASES, CUDA, GOLDEN, ROOT, TPU, TRAIN, script

from gemma_qat.cli.main import main
from gemma_qat.errors import InputError
from gemma_qat.launch import custom
from gemma_qat.launch.jobs import environment_of, jobs_of, name_of
from gemma_qat.launch.xm import dockerfile_for


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("case", CASES)
def test_dry_runs_are_those_that_are_kept(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """If it fails, what is submitted is no longer what was looked at."""
    assert script().run(["--dry-run", *CASES[case]]) == 0
    said = capsys.readouterr().out
    kept = GOLDEN / f"xm_{case}.json"
    if os.environ.get("GEMMA_QAT_KEEP"):
        kept.write_text(said, "utf-8")
    assert json.loads(said) == json.loads(kept.read_text("utf-8"))


def test_a_dry_run_needs_no_xmanager() -> None:
    """If it fails, nobody can look at what would be started before they have 600 MB of clients."""
    hidden = "import sys; sys.modules['xmanager'] = None; import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    started = [sys.executable, "-c", hidden, "launch/xm_launch.py", "--dry_run", *CASES["local"]]
    ended = subprocess.run(started, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == json.loads((GOLDEN / "xm_local.json").read_text("utf-8"))


def test_xmanager_is_missed_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, a person is told by a traceback that XManager is not there, or after the preflight."""
    monkeypatch.setitem(sys.modules, "xmanager", None)
    monkeypatch.setattr(script(), "_check", lambda _: pytest.fail("the preflight ran"))
    assert script().run(CASES["local"]) == 2
    assert "pip install '.[xm]'" in capsys.readouterr().err


def test_a_sweep_is_a_work_unit_for_each_cell_after_those_it_needs() -> None:
    """If it fails, a cell starts before what it begins from is there, or is told apart from no other."""
    jobs = json.loads((GOLDEN / "xm_local_sweep.json").read_text("utf-8"))["jobs"]
    names = [job["name"] for job in jobs]
    assert names[0] == "sweep-tiny-float" and len(set(names)) == len(names) == 5
    for place, job in enumerate(jobs):
        assert set(job["needs"]) <= set(names[:place])
        cell = job["command"][job["command"].index("--cell") + 1]
        assert job["name"] == "sweep-tiny-" + cell.replace("_", "-")
        assert job["command"][job["command"].index("--logs") + 1] == f"runs/logs/{job['name']}"
    assert jobs[1]["needs"] == ["sweep-tiny-float"]


def test_secrets_are_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, a token stands in a log."""
    secret = [f"--env={name}=hidden" for name in ("HF_TOKEN", "my_password", "A_KEY", "CREDENTIALS")]  # fmt: skip
    for case in CASES.keys() - {"local_sweep"}:
        assert script().run(["--dry_run", *secret, *CASES[case]]) == 0
        said = capsys.readouterr()
        assert "hidden" not in said.out + said.err
        assert said.out.count("(redacted)") >= 4
        assert "can be read in the job" in said.err
    monkeypatch.setenv("HF_TOKEN", "hidden")
    for words in (
        [*TRAIN, "start=/x/hidden"],
        ["--env=A=hidden", *TRAIN],
        ["--tag=no hidden", *TRAIN],
    ):
        script().run(["--dry_run", *words])
        said = capsys.readouterr()
        assert "<redacted: HF_TOKEN>" in said.out + said.err and "hidden" not in said.out + said.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "train CONFIG [overlay ...] or sweep CONFIG"),
        (["train"], "a config is expected"),
        (["bench", "configs/e2b_q4_0.py"], "train CONFIG [overlay ...] or sweep CONFIG"),
        (["train", "configs/none.py"], "configs/none.py: no such config file"),
        (["--executor=slurm", *TRAIN], "unknown executor 'slurm': expected one of local, kube"),
        (["--on=h100:1x8", *TRAIN], "runs on this machine"),
        (["--executor=vertex", CUDA, *TRAIN], "--on MACHINE is expected"),
        (["--executor=vertex", "--on=h100:1x8", *TRAIN], "--image IMAGE or --build TAG"),
        (["--executor=vertex", "--on=v5p:2x2x4", TPU, *TRAIN], "v5e and v6e; for v5p take --executor kubernetes, launch/gke.sh"),
        (["--executor=kubernetes", "--on=v4:2x2", TPU, *TRAIN], "unknown chip 'v4'"),
        (["--executor=kubernetes", "--on=h100:4x3", CUDA, *TRAIN], "no machine type of Google Cloud has 3"),
        (["--executor=kubernetes", "--on=h100:8", CUDA, "--volume=/data", *TRAIN], "CLAIM:/PATH expected"),
        (["--executor=kubernetes", "--on=h100:2x8", CUDA, "sweep", "configs/sweep_tiny.py"], "runs on one host, this has 2"),
        ([CUDA, *TRAIN], "no --image"),
        ([BINARY, "--name=My_Run", *TRAIN], "at most 40 lower-case letters"),
        ([BINARY, "--tag=a b", *TRAIN], "--tag a b"),
        ([BINARY, "--env=TOKEN", *TRAIN], "NAME=VALUE expected"),
        ([BINARY, "--retry=many", *TRAIN], "retry"),
        ([BINARY, "--nmae=x", *TRAIN], "Unknown command line flag 'nmae'"),
        (["sweep", "configs/sweep_tiny.py", "--list"], "for gemma-qat sweep itself"),
    ],
)  # fmt: skip
def test_refused_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, bad input is found out on the cluster, or told in a traceback."""
    assert script().run(["--dry_run", *arguments]) == 2
    heard = capsys.readouterr()
    assert heard.out == "" and heard.err.count("\n") == 1
    assert heard.err.startswith("xm_launch.py: error: ") and said in heard.err


def test_a_preflight_that_says_no_ends_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, what cannot work is submitted all the same."""
    module, started = script(), []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        started.append(command)
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(module, "_need_xmanager", lambda: None)
    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    monkeypatch.setattr(module.subprocess, "run", run)
    assert module.run(CASES["kubernetes_v5e"]) == 2
    program = BINARY.partition("=")[2]
    assert [list(words) for words in started] == [[program, *TRAIN, "--check", "--on", "v5e:4x8"]]
    assert "the preflight found" in capsys.readouterr().err
    assert module.run(["--no-paths", *CASES["kubernetes_v5e"]]) == 2
    assert started[1] == (*started[0], "--no-paths")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """If it fails, an option is told nowhere."""
    assert script().run(["--help"]) == 0
    said = capsys.readouterr().out
    assert "--executor kubernetes --on v5p:4x4x4" in said
    assert all(f"--{name}" in said.replace("[no]", "") for name in script().OWN)


@pytest.mark.parametrize(
    ("pool", "index", "process"), [("workerpool0", 0, 0), ("workerpool1", 0, 1), ("workerpool1", 1, 2)]
)  # fmt: skip
def test_hosts_of_vertex_find_one_another(
    pool: str, index: int, process: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, two hosts take the same number, or look for process 0 elsewhere."""
    hosts = {"workerpool0": ["a-0:2222"], "workerpool1": ["b-0:2222", "b-1:2222"]}
    monkeypatch.setenv("CLUSTER_SPEC", json.dumps({"cluster": hosts, "task": {"type": pool, "index": index}}))  # fmt: skip
    became: list[tuple[str, list[str], str]] = []
    monkeypatch.setattr(
        "os.execvpe", lambda file, words, env: became.append((file, words, env["JOB_COMPLETION_INDEX"]))
    )  # fmt: skip
    with pytest.raises(TypeError):  # nothing was executed, so there is no status
        assert main(["launch", "vertex", "--", "gemma-qat", "train", "a b.py"]) + 1
    joined = ["--coordinator", "a-0:2222", "--num-processes", "3", "--process-id", str(process)]
    assert became == [("gemma-qat", ["gemma-qat", "train", "a b.py", *joined], str(process))]


def test_no_host_of_vertex(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, a command that was started elsewhere waits for hosts that are not."""
    monkeypatch.delenv("CLUSTER_SPEC", raising=False)
    assert main(["launch", "vertex", "--", "gemma-qat", "train", "x.py"]) == 2
    assert "no host of a Vertex AI job" in capsys.readouterr().err
    with pytest.raises(InputError, match="not what Vertex AI sets"):
        custom.joined('{"task": {}}')


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("configs/e2b_q4_0+q8_0_acts.py", "e2b-q4-0-q8-0-acts"),
        ("/a b/26b_A4B.py", "gemma-26b-a4b"),
        ("x" * 60 + ".py", "x" * 40),
    ],
)
def test_names(config: str, name: str) -> None:
    """If it fails, a scheduler refuses the name."""
    assert name_of(config) == name


def test_names_of_cells_are_told_apart() -> None:
    """If it fails, one cell's job takes another's place."""
    parts = [{"name": name, "needs": [], "command": ["gemma-qat"]} for name in ("a_b", "a-b")]
    with pytest.raises(InputError, match="another job is called s-a-b too"):
        jobs_of("s", parts)
    with pytest.raises(InputError, match="at most 57 letters"):
        jobs_of("s", [{"name": "a" * 60, "needs": [], "command": ["gemma-qat"]}])


def test_variables() -> None:
    """If it fails, a value with = in it is cut."""
    assert environment_of(["A=b=c d", "B="]) == {"A": "b=c d", "B": ""}


def test_an_image_is_built_for_the_accelerator() -> None:
    """If it fails, XManager, which gives no build arguments, packages the project without its accelerator."""
    text = (ROOT / "launch/Dockerfile").read_text("utf-8")
    assert dockerfile_for("tpu", text) == text.replace("ARG ACCELERATOR=cpu", "ARG ACCELERATOR=tpu")
    with pytest.raises(InputError, match="0 found"):
        dockerfile_for("tpu", "FROM x\n")


def test_the_page_shows_the_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    """If it fails, docs/launch/xmanager.md shows what the launcher no longer prints."""
    page = (ROOT / "docs/launch/xmanager.md").read_text("utf-8")
    found = re.search(r"```\n\$ python launch/xm_launch.py (.+)\n((?:.|\n)+?)\n```", page)
    assert found is not None
    assert script().run(shlex.split(found[1])) == 0
    assert capsys.readouterr().out.strip() == found[2].strip()
    assert len(page.splitlines()) <= 70
