"""`gemma-qat train --check` as a person meets it: its lines, its status, its file, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_qat.cli.main import main
from gemma_qat.errors import InputError, refuse_address
from gemma_qat.plan import cluster_named

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/12b_q4_0.py")
TINY = ["train", CONFIG, "--variant", "tiny", "--check"]


@pytest.fixture(autouse=True)
def forgets_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The verb says which slice it is to think it is on: here that is to be forgotten again."""
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE",
                 "ALLOW_MULTIPLE_LIBTPU_LOAD"):  # fmt: skip
        monkeypatch.setenv(name, "")
    monkeypatch.chdir(tmp_path)


def test_it_says_what_it_found_and_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, a person or a launcher cannot read the check."""
    assert main([*TINY, "--json", "found.json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[-1] == "ready    tiny_12b_q4_0 can start on this machine"
    heads = [line.split(" ")[0] for line in out.splitlines() if line[0] != " "]
    assert heads == ["config", "machine", "data", "memory", "time", "save", "space", "ready"]
    kept = Path("found.json").read_text("utf-8")
    assert json.loads(kept)["problems"] == [] and json.loads(kept)["steps"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_each_problem_is_a_line_and_the_status_is_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, a launcher submits what cannot start; or a log or file shows what the environment holds."""
    monkeypatch.setenv("HF_TOKEN", "secret-of-mine")
    wrong = ["data.kind=text", "data.path=no/such", "start=no/secret-of-mine"]
    assert main([*TINY, *wrong, "--json", "found.json"]) == 2
    out, err = capsys.readouterr()
    kept = Path("found.json")
    assert "secret-of-mine" not in out + err + kept.read_text("utf-8")
    kept.unlink()
    lines = err.splitlines()
    assert len(lines) == 3 and all(line.startswith("gemma-qat: error: ") for line in lines)
    assert "ready" not in out
    assert not list(tmp_path.iterdir())


def test_a_machine_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """If it fails, what is checked is the laptop that submits."""
    on = [*TINY, "--no-paths", "--estimate", "train.batch_size=8", "--on"]
    assert main([*on, "v6e:2x2"]) == 0
    out = capsys.readouterr().out
    assert "machine  v6e:2x2: 4 devices, mesh fsdp 4, 8 rows of 128 tokens a step" in out
    assert "warning  options.dtype=float32" in out
    assert out.splitlines()[-1].endswith("can start on v6e:2x2, paths and space left out")
    assert main([*on, "v7:2x2"]) == 2
    assert "unknown chip 'v7'" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--on", "v5e:2x2"], ["--no-paths"], ["--json", "x"]])
def test_options_of_the_check_do_not_train(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, somebody who forgot --check trains."""
    assert main(["train", CONFIG, *option]) == 2
    assert f"{option[0]} belongs to --check" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gs://bucket/run", "gs://bucket/run: an address"),
        ("gs:/bucket/run", "gs:/bucket/run: an address"),
        ("s3://key:secret@bucket/x?token=y", "s3://bucket/x: an address"),
        ("https://host/x", "mount the bucket"),
    ],
)
def test_addresses_are_no_paths(given: str, said: str) -> None:
    """If it fails, a bucket is taken for a new folder of this host, or a key is printed."""
    with pytest.raises(InputError) as raised:
        refuse_address(given)
    assert said in str(raised.value)
    assert "secret" not in str(raised.value) and "token" not in str(raised.value)


@pytest.mark.parametrize("path", ["runs/gs/x", "/data/a:b/c", "C:/x", "", "gs", "s3/x"])
def test_paths_are_paths(path: str) -> None:
    """If it fails, somebody's folder is taken for a bucket."""
    refuse_address(path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", CONFIG, "start=gs://b/x"],
        ["train", CONFIG, "data.path=gs://b/x"],
        ["train", CONFIG, "directory=gs://b/x"],
        ["convert", "gs://b/x", "--out", "y"],
        ["ptq", "gs://b/x", "--recipe", "q4_0", "--out", "y"],
        ["evaluate", "m", "--text", "y", "--reference", "gs://b/x", "--tokenizer", "t"],
    ],
)
def test_every_verb_says_to_mount_the_bucket(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails, a verb says that there is no such folder, or makes one."""
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "an address, a path expected: mount the bucket" in err
    assert not list(tmp_path.iterdir())


def test_a_plan_for_gpus_is_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    """If it fails, `gemma-qat plan` knows other machines than the launchers."""
    plan = ["plan", CONFIG, "--variant", "tiny", "train.batch_size=8", "--topology", "h100:2x4"]
    assert main(plan) == 0
    assert "an estimate for GPUs" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("h100:1x8", (9e9, 0.0, 1), 9e9 / 450e9),
        # Half of 9 GB crosses between two nodes, each GPU of eight bringing an eighth of it in: 11 ms; NVLink: 20 ms.
        ("h100:2x8", (9e9, 0.0, 1), 9e9 / 450e9),
        # With eight that hold parts of different matrices nobody shares: 4.5 GB at 50 GB/s.
        ("h100:2x8", (9e9, 0.0, 8), 4.5e9 / 50e9),
        # Nodes of one GPU have the network alone, residuals too.
        ("h100:2x1", (9e9, 1e9, 2), 5e9 / 50e9),
        ("h100:1x1", (0.0, 0.0, 1), 0.0),
    ],
)
def test_wires_of_nodes(name: str, arguments: Any, expected: float) -> None:
    """If it fails, an estimate for GPUs has the wrong wires."""
    assert cluster_named(name).wire_seconds(*arguments) == pytest.approx(expected)
