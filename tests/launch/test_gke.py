"""A run as a JobSet, and the launcher that creates it. kubectl is a stand-in; no cluster is reached."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from stand_ins import HOSTILE, ROOT, Tools, complaint, expanded, printed, shown_in

from gemma_qat.cli.main import main
from gemma_qat.launch.jobset import TEMPLATE, written
from gemma_qat.launch.machines import machine_named

GOLDEN = Path(__file__).parent / "golden"
SCRIPT = "launch/gke.sh"
PAGE = (
    "--image", "us-docker.pkg.dev/mine/images/gemma-qat:tpu", "--name", "e2b-q4-0", "--slices", "2",
    "--volume", "gcs:runs-of-mine:/app/runs", "--service-account", "trainer",
    "--", "train", "configs/e2b_q4_0.py", "mesh.dcn_data=2", "train.microbatches=8",
)  # fmt: skip
GPUS = (
    "--image", "us-docker.pkg.dev/mine/images/gemma-qat:cuda", "--name", "e2b-w4a16", "--volume", "pvc:filestore:/app/runs",
    "--namespace", "research", "--queue", "team", "--env", "NCCL_DEBUG=WARN", "--secret", "HF_TOKEN=hugging-face:token",
    "--", "train", "configs/e2b_w4a16.py",
)  # fmt: skip
CASES = {"v5e_4x8": ("v5e:4x8", 2, PAGE), "h100_4x8": ("h100:4x8", 1, GPUS)}
BASE = ("--image", "i", "--name", "n")


def rendered(on: str, *words: str) -> dict[str, Any]:
    """The manifest of a run, as a tree."""
    return yaml.safe_load(printed("launch", "render", "--on", on, *words))


def job_of(tree: dict[str, Any]) -> dict[str, Any]:
    """The one replicated job."""
    (job,) = tree["spec"]["replicatedJobs"]
    return job


def pod_of(tree: dict[str, Any]) -> dict[str, Any]:
    """What all pods of a manifest are made of."""
    return job_of(tree)["template"]["spec"]["template"]["spec"]


def container_of(tree: dict[str, Any]) -> dict[str, Any]:
    """The container of a manifest's pods."""
    (container,) = pod_of(tree)["containers"]
    return container


@pytest.mark.parametrize("case", CASES)
def test_manifest(case: str) -> None:
    """If it fails, another JobSet is created than the one that was read and kept."""
    on, slices, words = CASES[case]
    text = printed("launch", "render", "--on", on, *words)
    assert text == (GOLDEN / f"{case}.yaml").read_text(encoding="utf-8")
    tree, machine = yaml.safe_load(text), machine_named(on)
    job = job_of(tree)
    (chips,) = container_of(tree)["resources"]["limits"].values()
    task = job["template"]["spec"]
    assert task["completions"] == task["parallelism"] == machine.hosts
    assert job["replicas"] * machine.hosts * chips == machine.place.devices * slices
    longest = f"{tree['metadata']['name']}-{job['name']}-{slices - 1}-{machine.hosts - 1}-xxxxx"
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", longest) and len(longest) <= 63
    assert "<" not in text.replace("<=", "")


def test_the_words_of_a_command_arrive() -> None:
    """If it fails, an overlay means something else in the pod than on the command line."""
    command = ["train", "configs/e2b_q4_0.py", *HOSTILE]
    values = {f"V{i}": word for i, word in enumerate(HOSTILE)}
    given = [word for name, value in values.items() for word in ("--env", f"{name}={value}")]
    tree = rendered("h100:2x8", *BASE, *given, "--", *command)
    container = container_of(tree)
    known = {"COORDINATOR": "n-slice-0-0.n:8476", "PROCESS_ID": "1", "HOME": "/root", "X": "x"}
    found = [expanded(word, known) for word in container["command"]]
    assert found == [
        "gemma-qat", "launch", "worker", "--logs", "runs/logs/n", "--", "gemma-qat", *command,
        "--coordinator", "n-slice-0-0.n:8476", "--num-processes", "2", "--process-id", "1",
    ]  # fmt: skip
    seen = {one["name"]: one.get("value", "") for one in container["env"]}
    assert {name: expanded(seen[name], known) for name in values} == values


@pytest.mark.parametrize(
    "text", ["1e3", "0o7", "0x1F", "yes", "~", "1_000", "", "=", "2026-01-01", "-", ".inf", "on"]
)
def test_text_is_quoted_where_a_reader_could_take_it_for_something_else(text: str) -> None:
    """If it fails, kubectl, whose YAML is not PyYAML's, reads a number where a word was."""
    assert written({"value": text}) == f'value: "{text}"\n'


def actions(tree: dict[str, Any], status: int, disrupted: bool = False) -> str:
    """What the JobSet does after a pod ended so, by a second writing of the rules of Job and JobSet."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for i, rule in enumerate(job_of(tree)["template"]["spec"]["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
        if codes and codes["operator"] == "In" and status in codes["values"]:
            assert codes["containerName"] == container_of(tree)["name"]
            what = f"Container gemma-qat for pod default/n-0 failed with exit code {status}"
        elif (
            conditions
            and disrupted
            and conditions[0] == {"type": "DisruptionTarget", "status": "True"}
        ):
            what = "Pod default/n-0 has condition DisruptionTarget"
        else:
            continue
        reason, message = "PodFailurePolicy", f"{what} matching FailJob rule at index {i}"
        break
    for rule in tree["spec"]["failurePolicy"]["rules"]:
        if reason in rule["onJobFailureReasons"] and any(
            re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"]
        ):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("status", "disrupted", "expected"),
    [
        (75, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (75, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (2, False, "FailJobSet"),
        (1, False, "RestartJobSet"),
        (137, False, "RestartJobSet"),
        (25, False, "RestartJobSet"),
    ],
)
def test_what_an_exit_status_leads_to(status: int, disrupted: bool, expected: str) -> None:
    """If it fails, a preempted run is given up, or a mistyped one is started for ever."""
    tree = rendered("v5e:4x8", *BASE, "--max-restarts", "5", "--", "train", "c.py")
    assert actions(tree, status, disrupted) == expected
    assert tree["spec"]["failurePolicy"]["maxRestarts"] == 5
    assert job_of(tree)["template"]["spec"]["backoffLimit"] == 0
    assert pod_of(tree)["restartPolicy"] == "Never"


def test_one_host_is_alone() -> None:
    """If it fails, a run of one host waits for others."""
    tree = rendered("v5e:2x4", *BASE, "--", "sweep", "configs/sweep_tiny.py", "--cell", "a")
    assert container_of(tree)["command"][-4:] == ["sweep", "configs/sweep_tiny.py", "--cell", "a"]
    assert "env" not in container_of(tree)
    assert "metadata" not in job_of(tree)["template"]


def test_where_it_runs_and_as_whom() -> None:
    """If it fails, Spot, a reservation or a user that is not root is asked for and not had."""
    spot = pod_of(rendered("v6e:4x4", *BASE, "--spot", "--", "train", "c.py"))
    assert spot["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert spot["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    tree = rendered("v6e:4x4", *BASE, "--reservation", "ours", "--", "train", "c.py")
    assert pod_of(tree)["nodeSelector"]["cloud.google.com/reservation-name"] == "ours"
    assert pod_of(tree)["securityContext"]["runAsNonRoot"] is True
    assert container_of(tree)["securityContext"]["allowPrivilegeEscalation"] is False
    root = rendered("v6e:4x4", *BASE, "--privileged", "--", "train", "c.py")
    assert container_of(root)["securityContext"] == {"privileged": True}
    assert "runAsNonRoot" not in pod_of(root)["securityContext"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--on", "v5e:4x9", *BASE), "unknown topology"),
        (("--on", "v5e:2x4", *BASE, "--slices", "2"), "a slice of one host cannot be one of several"),
        (("--on", "h100:2x8", *BASE, "--slices", "2"), "only TPUs have slices"),
        (("--on", "v5e:4x8", *BASE, "--slices", "0"), "0 slices: at least 1 expected"),
        (("--on", "v5e:4x8", *BASE, "--spot", "--reservation", "r"), "exclude one another"),
        (("--on", "v5e:4x8", "--image", "i", "--name", "Big"), "name 'Big': a letter, then"),
        (("--on", "v5e:4x8", "--image", "i", "--name", "n" * 41), "40 at most"),
        (("--on", "v5e:4x8", *BASE, "--volume", "b:/runs"), "gcs:BUCKET:/path or pvc:CLAIM:/path expected"),
        (("--on", "v5e:4x8", *BASE, "--env", "A"), "NAME=VALUE expected"),
        (("--on", "v5e:4x8", *BASE, "--secret", "A=b"), "NAME=SECRET:KEY expected"),
        (("--on", "v5e:4x8", *BASE, "--env", "A=1", "--secret", "A=b:c"), "variable A is given twice"),
        (("--on", "v5e:4x8", *BASE, "--env", "SLICE=1"), "variable SLICE is given twice"),
    ],
)  # fmt: skip
def test_what_cannot_be_rendered(
    words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, a mistake is found out by the cluster, or leaves a file behind."""
    out = tmp_path / "job.yaml"
    assert main(["launch", "render", *words, "--out", str(out), "--", "train", "c.py"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not out.exists()


def test_a_secret_given_as_a_value_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    """If it fails, a mistyped --env prints a token into a log."""
    words = ["--on", "v5e:4x8", *BASE, "--env", "hf-token=abcdef", "--", "train", "c.py"]
    assert main(["launch", "render", *words]) == 2
    assert "abcdef" not in capsys.readouterr().err


def test_a_sweep_of_several_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    """If it fails, every host runs the whole cell, all into one directory."""
    assert main(["launch", "render", "--on", "v5e:4x8", *BASE, "--", "sweep", "s.py"]) == 2
    assert "sweep runs on one host, v5e:4x8 has 8" in capsys.readouterr().err


def test_the_template_reads_as_one_job() -> None:
    """If it fails, the template is no JobSet by itself, and nobody can read what is created."""
    tree = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    assert (tree["apiVersion"], tree["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert container_of(tree)["image"] == "<image>"


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    """Stand-ins for kubectl and gemma-qat."""
    made = Tools(tmp_path)
    made.make_gemma_qat(["v5e:4x8"])
    made.make("kubectl", f"case \"$*\" in *create*) cat >'{tmp_path}/applied' ;; esac")
    return made


ON = ("--on", "v5e:4x8", "--image", "i")


def test_it_checks_renders_and_creates(tools: Tools, tmp_path: Path) -> None:
    """If it fails, another command is checked than the one that runs, or another manifest created."""
    words = ["train", "configs/e2b_q4_0.py", *HOSTILE]
    done = tools.run(SCRIPT, *ON, "--namespace", "us", "--spot", "--env=A=x y", *words)
    assert done.returncode == 0, done.stderr
    ours = [call[3:] for call in tools.calls("gemma-python")]
    assert ours[0][:2] == ["launch", "render"]
    assert ours[0][2 : ours[0].index("--")] == [
        "--on", "v5e:4x8", "--image", "i", "--name", "e2b-q4-0", "--namespace=us", "--spot", "--env=A=x y",
    ]  # fmt: skip
    assert ours[0][ours[0].index("--") + 1 :] == words
    assert ours[1] == [*words, "--check", "--on", "v5e:4x8"]
    assert (tmp_path / "applied").read_text() == "kind: JobSet\n"
    assert "stop:   kubectl --namespace=us delete jobset e2b-q4-0" in done.stdout


def test_a_failed_preflight_ends_it(tools: Tools, tmp_path: Path) -> None:
    """If it fails, a run that cannot work is submitted all the same."""
    done = tools.run(SCRIPT, *ON, "train", "c.py", CHECK="2")
    assert "preflight" in complaint("gke.sh", done)
    assert not (tmp_path / "applied").exists()
    assert tools.run(SCRIPT, *ON, "--no-check", "train", "c.py", CHECK="2").returncode == 0
    assert (tmp_path / "applied").exists()


def test_the_check_can_pass_over_files(tools: Tools) -> None:
    """If it fails, a laptop that does not see the volume has to leave out the check of memory too."""
    done = tools.run(SCRIPT, *ON, "--no-paths", "train", "c.py")
    assert done.returncode == 0 and done.stderr.startswith("gke.sh: warning: no --volume")
    (check,) = [call for call in tools.calls("gemma-python") if "--check" in call]
    assert check[check.index("train") :] == [
        "train", "c.py", "--check", "--on", "v5e:4x8", "--no-paths",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "c.py"), "--on MACHINE is expected"),
        (("--on", "v5e:4x8", "train", "c.py"), "--image is expected"),
        ((*ON,), "a command is expected after the options"),
        ((*ON, "train"), "train needs a config"),
        ((*ON, "evaluate", "c.py"), "train or sweep expected, not evaluate"),
        ((*ON, "--nane", "x", "train", "c.py"), "unknown option --nane"),
        ((*ON, "--name", "Big_One", "train", "c.py"), "--name Big_One: at most 40"),
        ((*ON, "--slices"), "--slices needs a value"),
        (("--on", "v9:1", "--image", "i", "train", "c.py"), "unknown chip 'v9:1'"),
    ],
)
def test_what_is_wrong_is_said_at_once(tools: Tools, words: tuple[str, ...], said: str) -> None:
    """If it fails, a mistake ends in a traceback, or on the cluster."""
    assert said in complaint("gke.sh", tools.run(SCRIPT, *words))
    assert tools.calls("kubectl", "create") == []


@pytest.mark.parametrize(
    ("kubectl", "said"),
    [
        (None, "kubectl is not on PATH"),
        ('[ "$1" != config ]', "kubectl has no current context"),
        ('[ "$1" = config ] || { echo "Error from server (NotFound): no" >&2; exit 1; }', "has no JobSet"),
        ('[ "$1" = config ] || { echo "Unauthorized" >&2; exit 1; }', "does not answer: Unauthorized"),
    ],
)  # fmt: skip
def test_a_cluster_that_is_not_there(tools: Tools, kubectl: str | None, said: str) -> None:
    """If it fails, a missing tool, login or JobSet is found out late or not said."""
    tools.drop("kubectl")
    if kubectl:
        tools.make("kubectl", kubectl)
    assert said in complaint("gke.sh", tools.run(SCRIPT, *ON, "train", "c.py"))


def test_the_page_shows_the_dry_run(tools: Tools) -> None:
    """If it fails, docs/launch/gke.md shows another dry run than the launcher prints; needs no tool and no login."""
    tools.drop("kubectl")
    ((command, output),) = shown_in("gke.md")
    done = tools.call([str(tools.path / "bash"), "-c", command])
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace("kind: JobSet", "...") == output + "\n"
    ours = tools.calls("gemma-python")[0][5:]
    assert ours[:2] == ["--on", "v5e:4x8"]
    text = " ".join(ours[2:]).replace("=", " ")
    assert sorted(text.split()) == sorted(" ".join(PAGE).replace("=", " ").split())


def test_the_dry_run_prints_the_manifest(tools: Tools) -> None:
    """If it fails, what a dry run shows is not what would be created, here with the real gemma-qat."""
    environment = {
        "GEMMA_QAT_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    words = [*PAGE[: PAGE.index("--")], "--dry-run", *PAGE[PAGE.index("--") + 1 :]]
    done = tools.run(SCRIPT, "--on", "v5e:4x8", *words, **environment)
    assert done.returncode == 0, done.stderr
    begin = done.stdout.index("apiVersion")
    assert done.stdout[begin:] == (GOLDEN / "v5e_4x8.yaml").read_text(encoding="utf-8") + "EOF\n"
