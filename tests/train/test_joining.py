"""Before several processes train together: which devices are whose, one file system, signals that come too early."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from gemma_qat.train.distributed import join

ROOT = Path(__file__).resolve().parents[2]

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-4]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_NODEID": "3"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_NODEID": "1"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2),1", "SLURM_NODEID": "2"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "CUDA_VISIBLE_DEVICES": "3"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
    ],
)
def test_one_task_a_node_has_all_its_devices(
    environment: dict[str, str], devices: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it fails, seven of eight GPUs stay idle, or processes of one GPU each take those of the others."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **named: given.update(named))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    join("auto", None, None, STEP | environment)
    assert given["local_device_ids"] == devices


def test_jax_takes_an_empty_list_for_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it fails, what `join` passes on Slurm no longer means what it relies on: look at jax/_src/clusters/cluster.py."""
    from jax._src.clusters import ClusterEnv

    for name, value in {**STEP, "SLURM_NTASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_LOCALID", "5")
    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, [], None, 300)
    assert found[1:] == (4, 1, [])
    alone = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 300)
    assert alone[3] == [5]


APART = """
import os, sys
from pathlib import Path
from gemma_qat.errors import InputError
from gemma_qat.train import join, refuse_apart
address, number, process = sys.argv[2::2]
join(address, int(number), int(process), {})
refuse_apart(Path("same"), seconds=0.2)
os.makedirs(f"host{process}", exist_ok=True)
os.chdir(f"host{process}")
try:
    refuse_apart(Path("own"), seconds=0.2)
except InputError as error:
    print(error, flush=True)
"""


def test_a_disk_of_its_own_is_told(tmp_path: Path) -> None:
    """If it fails, hosts that share no file system train, and save pieces that nobody can put together."""
    command = [sys.executable, "-m", "gemma_qat", "launch", "local", "2", "--logs", "logs", "--"]
    done = subprocess.run(
        [*command, sys.executable, "-c", APART], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = "process 1 of 2 does not see own as process 0 does: it has to be on a file system that all hosts share"
    told = sorted(line for line in done.stdout.splitlines() if "[Gloo]" not in line)
    assert told == [f"[0] {said}", f"[1] {said}"]
    assert {path.name for path in tmp_path.iterdir()} == {"logs", "same", "host0", "host1"}
    assert [
        path for name in ("same", "host0", "host1") for path in (tmp_path / name).iterdir()
    ] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_is_to_be_started_again(
    project: Any, number: signal.Signals
) -> None:
    """If it fails, a job that is preempted while it starts is a failure that nobody requeues."""
    process = project.start(f"early_{number.name}")
    status = Path(f"/proc/{process.pid}/status")
    end = time.monotonic() + 60
    # As soon as the signal has a handler, which is before jax is imported.
    while not status.exists() or not _catches(status.read_text(), number):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, "")
    assert err == f"gemma-qat: {number.name} before the first step; the same command starts again\n"


def _catches(status: str, number: signal.Signals) -> bool:
    line = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)
