"""launch/xm_launch.py with XManager itself: runs on this machine for real, and what the others are given.

XManager is 600 MB and pins what the tests pin otherwise, so it has an environment of its own; in it, without Docker and
without a login:

    python3.11 -m venv .venv-xm && .venv-xm/bin/pip install -e '.[xm]' 'pytest>=9,<10' beartype
    GEMMA_QAT_PYTHON=$PWD/.venv-test/bin/python \\
    .venv-xm/bin/python -m pytest -o addopts= -o filterwarnings=default tests/launch/test_xmanager_local.py

Kubernetes and Vertex AI are not here: the clients' calls are caught by stand-ins, which see what would be sent.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launch.xm_cases import CASES, GOLDEN, ROOT, script

pytestmark = [
    pytest.mark.judges,
    pytest.mark.skipif(
        importlib.util.find_spec("xmanager") is None,
        reason="needs XManager in an environment of its own: pip install -e '.[xm]'",
    ),
]

PROGRAM = Path(os.environ.get("GEMMA_QAT_PYTHON", sys.executable)).with_name("gemma-qat")
"""Of the environment that trains: XManager's has a protobuf that newer sentencepiece refuses."""


def launched(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the launcher; XManager's database is in `home`."""
    command = [sys.executable, "launch/xm_launch.py", "--binary", str(PROGRAM), "--no_check"]
    environment = os.environ | {"HOME": str(home), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False, timeout=900,
    )  # fmt: skip


def test_a_sweep_runs_on_this_machine(tmp_path: Path) -> None:
    """If it fails, XManager's Local executor does not run our work units to their end, in order."""
    overlays = [f"directory={tmp_path / 'a $HOME b'}", "name=sweep", "train.steps=4"]
    ended = launched(
        tmp_path, "--logs", str(tmp_path / "logs"), "--tag", "try", "--env", "NAME=a 'b' $c",
        "sweep", "configs/sweep_tiny.py", *overlays, "--variant", "tiny",
    )  # fmt: skip
    print(ended.stdout, ended.stderr)
    assert ended.returncode == 0
    cells = ["float", "q4_0-mse", "w4a16-mse", "q4_0-qat-seed1", "w4a16-qat-seed1"]
    for cell in cells:
        folder = tmp_path / "a $HOME b" / "sweep" / cell
        assert (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()
        job = f"sweep-tiny-{cell.replace('_', '-')}"
        assert (tmp_path / "logs" / job / "process-0.log").stat().st_size
    with sqlite3.connect(tmp_path / ".xmanager/experiments.sqlite3") as database:
        [title] = database.execute("select experiment_title from experiment").fetchone()
        [count] = database.execute("select count(*) from work_unit").fetchone()
    assert (title, count) == ("sweep-tiny [try]", len(cells))


def test_what_needs_a_cell_that_failed_is_left_out(tmp_path: Path) -> None:
    """If it fails, a failure is not told, or cells start from what is not there."""
    overlays = [f"directory={tmp_path}", "name=sweep", "data.kind=text", "data.path=/none"]
    ended = launched(tmp_path, "--logs", str(tmp_path / "logs"), "sweep", "configs/sweep_tiny.py",
                     *overlays, "--variant", "tiny")  # fmt: skip
    print(ended.stdout, ended.stderr)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("left out, as what it needs failed") == 4
    assert "xm_launch.py: sweep-tiny-float: " in ended.stderr


def test_xmanager_launch_starts_it() -> None:
    """If it fails, XManager's own command does not take the script."""
    words = ["launch", "launch/xm_launch.py", "--", "--dry_run", *CASES["local"]]
    program = Path(sys.executable).with_name("xmanager")
    ended = subprocess.run([program, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == json.loads((GOLDEN / "xm_local.json").read_text("utf-8"))


class Stand:
    """Stands in for a client of a cloud: keeps what it is called with."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.taken = False


@pytest.fixture
def kubernetes_stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    from kubernetes import client as api
    from xmanager.cloud import kubernetes

    stand = Stand()

    def keep(kind: str) -> Any:
        def create(_: Any, *, namespace: str, body: dict[str, Any]) -> Any:
            if stand.taken:
                raise api.ApiException(status=409)
            # Read as the type of the API, which refuses what it lacks where a field is required.
            data = SimpleNamespace(data=json.dumps(body))
            read = api.ApiClient().deserialize(data, kind)
            assert api.ApiClient().sanitize_for_serialization(read) == body
            stand.sent.append(body)
            read.metadata.uid, read.metadata.namespace = "uid-1", namespace
            return read

        return create

    monkeypatch.setattr(kubernetes, "client", lambda: SimpleNamespace(api_client=None))
    monkeypatch.setattr(api.BatchV1Api, "create_namespaced_job", keep("V1Job"))
    monkeypatch.setattr(api.CoreV1Api, "create_namespaced_service", keep("V1Service"))
    return stand


@pytest.fixture
def no_storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    from xmanager.cloud import auth, docker_lib

    # A login is what tells XManager the project.
    monkeypatch.setattr(auth, "get_project_name", lambda: "project")
    monkeypatch.setattr(auth, "get_bucket", lambda: "bucket")
    monkeypatch.setattr(auth, "get_service_account", lambda: "account")
    monkeypatch.setattr(docker_lib, "is_docker_installed", lambda: False)


def submitted(case: str) -> Any:
    [job] = json.loads((GOLDEN / f"xm_{case}.json").read_text("utf-8"))["jobs"]
    return job["submitted"]


@pytest.mark.parametrize("case", ["kubernetes_v5e", "kubernetes_h100"])
@pytest.mark.usefixtures("no_storage")
def test_kubernetes_is_sent_what_the_dry_run_says(case: str, kubernetes_stand: Stand) -> None:
    """If it fails, the dry run shows another job than XManager starts."""
    arguments = [word.replace("=hidden", "=(redacted)") for word in CASES[case]]
    assert script().run(["--no_check", *arguments]) == 0
    *services, job = submitted(case)
    sent_job, *sent_services = kubernetes_stand.sent
    for service in sent_services:
        [owner] = service["metadata"].pop("ownerReferences")
        assert owner["uid"] == "uid-1" and owner["name"] == job["metadata"]["name"]
    assert [sent_job, *sent_services] == [job, *services]


@pytest.mark.usefixtures("no_storage")
def test_a_job_that_is_there_is_not_replaced(
    kubernetes_stand: Stand, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, a run that is under way is met by a second one, or the reason is a traceback."""
    kubernetes_stand.taken = True
    assert script().run(["--no_check", *CASES["kubernetes_v5e"]]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("xm_launch.py: error: a Job e2b-q4-0 is there already")


@pytest.mark.parametrize("case", ["vertex_v6e", "vertex_h100"])
@pytest.mark.usefixtures("no_storage")
def test_vertex_is_sent_what_the_dry_run_says(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """If it fails, the dry run shows another job than XManager starts, or Vertex AI has no such field."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import aiplatform, aiplatform_v1
    from xmanager.cloud import build_image, vertex

    aiplatform.init(project="project", credentials=AnonymousCredentials())
    monkeypatch.setattr(aiplatform, "init", lambda **_: None)
    monkeypatch.setattr(script(), "ROOT", tmp_path)
    for name in ("gemma_qat", "configs", "launch"):
        (tmp_path / name).mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).touch()
    (tmp_path / "launch/Dockerfile").write_text("ARG ACCELERATOR=cpu\n", "utf-8")
    built = []

    def build(path: str, dockerfile: str, tag: str, **_: object) -> str:
        built.append(Path(dockerfile).read_text("utf-8"))
        return tag

    monkeypatch.setattr(build_image, "build_by_dockerfile", build)
    sent: list[tuple[Any, dict[str, Any]]] = []

    def submit(custom: Any, **options: Any) -> None:
        sent.append((custom._gca_resource, options))

    monkeypatch.setattr(aiplatform.CustomJob, "submit", submit)
    monkeypatch.setattr(aiplatform.CustomJob, "resource_name", "projects/project/customJobs/1")
    monkeypatch.setattr(vertex.VertexHandle, "save_to_storage", lambda *_: None)
    assert script().run(["--no_check", *CASES[case]]) == 0
    assert built == ([] if case == "vertex_v6e" else ["ARG ACCELERATOR=cuda\n"])
    [(resource, options)] = sent
    said = submitted(case)
    restarts = said["job_spec"].pop("scheduling")["restart_job_on_worker_restart"]
    assert options["restart_job_on_worker_restart"] is restarts
    assert options["service_account"] == (None if case == "vertex_v6e" else "account")
    expected = aiplatform_v1.CustomJob(said)
    assert resource.job_spec.worker_pool_specs == expected.job_spec.worker_pool_specs
    assert (resource.display_name, resource.labels) == (expected.display_name, expected.labels)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("kubernetes_v5e", "xm.JobRequirements(tpu_v5e=xm.Topology('4x8')"),
        ("kubernetes_h100", "xm.JobRequirements(h100=8.0"),
    ],
)
@pytest.mark.usefixtures("no_storage")
def test_the_executor_says_what_the_machine_is(case: str, said: str) -> None:
    """If it fails, XManager's own words for a job name another machine."""
    from gemma_qat.launch import xm

    module = script()
    for name in module.OWN:
        module.FLAGS[name].unparse()
    experiment = module.experiment_of(module.FLAGS([str(ROOT), *CASES[case]])[1:])
    [job] = experiment.jobs
    requirements = xm.executor(experiment, job).requirements
    assert repr(requirements).startswith(said)
    assert job.machine is not None
    if not job.machine.is_tpu:
        assert requirements.replicas == job.machine.hosts


@pytest.mark.parametrize(("ended", "raises"), [("Complete", False), ("Failed", True)])
@pytest.mark.usefixtures("no_storage")
def test_a_cell_that_others_need_is_waited_for(
    ended: str, raises: bool, kubernetes_stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, a launcher waits for ever for a Job that failed, as XManager's own handle does."""
    from kubernetes import client as api

    from gemma_qat.launch import xm

    looks = iter([None, [SimpleNamespace(type=ended, status="True", message="why")]])
    monkeypatch.setattr(xm, "_SECONDS_BETWEEN_LOOKS", 0)
    monkeypatch.setattr(
        api.BatchV1Api, "read_namespaced_job_status",
        lambda *_, **__: SimpleNamespace(status=SimpleNamespace(conditions=next(looks))),
    )  # fmt: skip
    module = script()
    for name in module.OWN:
        module.FLAGS[name].unparse()
    experiment = module.experiment_of(module.FLAGS([str(ROOT), *CASES["kubernetes_v5e"]])[1:])
    [job] = experiment.jobs
    after = dataclasses.replace(job, name="after", needs=(job.name,))
    both = dataclasses.replace(experiment, jobs=(job, after))
    assert asyncio.run(xm.submit(both, ROOT)) == int(raises)
    names = [body["metadata"]["name"] for body in kubernetes_stand.sent if body["kind"] == "Job"]
    assert names == ([job.name] if raises else [job.name, "after"])


def test_a_signal_has_what_runs_saved_and_stopped(tmp_path: Path) -> None:
    """If it fails, a launcher that is told to end leaves processes behind, or says that nothing was saved."""
    command = [
        sys.executable,
        "launch/xm_launch.py",
        "--binary",
        str(PROGRAM),
        "--no_check",
        "--logs",
        str(tmp_path / "logs"),
    ]
    train = [
        "train",
        "configs/e2b_q4_0.py",
        "--variant",
        "tiny",
        "train.steps=100000",
        f"directory={tmp_path}",
        "data.kind=stdlib",
    ]
    environment = os.environ | {"HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    started = subprocess.Popen([*command, *train], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)  # fmt: skip
    log = tmp_path / "logs/e2b-q4-0/process-0.log"
    try:
        for _ in range(300):
            if log.exists() and "\nstep " in log.read_text("utf-8"):
                break
            time.sleep(1)
        started.send_signal(signal.SIGTERM)
        _, said = started.communicate(timeout=120)
    finally:
        started.kill()
    print(said)
    assert started.returncode == 75
    assert "Traceback" not in said
    assert any((tmp_path / "tiny_e2b_q4_0" / "checkpoints").iterdir())
