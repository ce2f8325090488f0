"""Work is not lost, shown on real processes that are killed, stopped, and lose their peers.

Longer forms (more kills, four processes) are marked slow:  bash launch/test.sh -m slow tests/train
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gemma_qat.checkpoint.native import load_parameters, load_quantized
from gemma_qat.checkpoint.store import restore_arrays
from gemma_qat.models import quantize_parameters
from gemma_qat.models.capture import differing
from gemma_qat.runs import latest_save, saves
from gemma_qat.train.distributed import HEARTBEAT

Until = Callable[..., None]
STEPS = 16


def ended(process: subprocess.Popen[str], status: int) -> tuple[str, str]:
    """Waits for a process and returns what it printed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, (process.returncode, out, err)
    return out, err


def whole(save: Path) -> dict[str, np.ndarray]:
    """Every array of a save, by part and path."""
    found = {}
    for part in ("parameters", "quantized", "optimizer"):
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(save / part).item_metadata.tree
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        abstract = {
            "/".join(str(key.key) for key in path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for path, leaf in flat
        }
        arrays = restore_arrays(save / part, abstract)
        found |= {f"{part}/{path}": np.asarray(array) for path, array in arrays.items()}
    return found


def equal(one: Path, other: Path, stopped: int | None = None) -> None:
    """Two saves are the same bits, curves and place in the data included.

    How far codes moved is reported since the last look, and a run that goes on from where it was `stopped` looks there: of
    those two curves alone the first point after it counts from there, so it is left out.
    """
    left, right = whole(one), whole(other)
    assert left.keys() == right.keys()
    for path, array in left.items():
        np.testing.assert_array_equal(array, right[path], err_msg=path)
    assert _data(one, stopped) == _data(other, stopped)
    assert (one / "manifest.json").read_text() == (other / "manifest.json").read_text()


def _data(save: Path, stopped: int | None) -> dict[str, Any]:
    data = json.loads((save / "data.json").read_text())
    for name in ("flipped", "scale_drift") if stopped is not None else ():
        points = data["curves"][name]
        after = next((i for i, (step, _) in enumerate(points) if step > stopped), len(points))
        data["curves"][name] = points[:after] + points[after + 1 :]
    return data


@pytest.fixture(scope="module")
def reference(project: Any) -> Path:
    """The last save of a run that was never stopped."""
    ended(project.start("whole"), 0)
    return project.saves("whole") / str(STEPS)


def newest(directory: Path) -> int:
    last = latest_save(directory) if directory.is_dir() else None
    return int(last.name) if last else 0


def kill_some_times(
    project: Any, until: Until, name: str, times: int, seed: int
) -> tuple[list[str], bool]:
    """Kills a run at moments drawn at random, in and between saves; returns a line for each, and whether it ended."""
    draw, directory, log = random.Random(seed), project.saves(name), []
    for turn in range(times):
        before = newest(directory)
        goal = min(before + draw.choice((0, 2, 2)), STEPS - 2)
        process = project.start(name)
        # From the moment on when a save is complete, or the one after it has begun.
        until(
            process,
            lambda: (
                newest(directory) >= goal and list(directory.glob(f"{goal + 2}.*tmp*"))
                if goal == before
                else newest(directory) >= goal
            ),
        )
        delay = draw.uniform(0, 0.4)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        left = [path.name for path in directory.iterdir() if not path.name.isdigit()]
        log.append(
            f"kill {turn}: went on from {before}, killed {delay:.3f} s after "
            f"{'beginning to save' if goal == before else 'having saved'} step {goal + 2 if goal == before else goal}, "
            f"last complete {newest(directory)}, left over {left}"
        )
        if newest(directory) == STEPS:
            return log, True
    return log, False


def check_kills(
    project: Any, until: Until, reference: Path, name: str, times: int, seed: int
) -> None:
    log, done = kill_some_times(project, until, name, times, seed)
    print("\n".join(log))
    directory, at = project.saves(name), None
    if not done:
        stopped = project.start(name)
        before = newest(directory)
        until(stopped, lambda: newest(directory) > before)
        stopped.send_signal(signal.SIGTERM)
        out, err = stopped.communicate(timeout=300)
        if stopped.returncode != 0:  # It may have been in its last step.
            assert stopped.returncode == 75, (out, err)
            said = re.search(r"stopped after step (\d+), saved in", err)
            assert said and newest(directory) == int(said.group(1)) < STEPS, err
            at = newest(directory)
            print(f"SIGTERM: saved step {at}, status 75")
    # Also when it was killed after its last save: the next start clears what was left.
    ended(project.start(name), 0)
    equal(directory / str(STEPS), reference, stopped=at)
    # The step at which it was stopped may be among the three that are kept.
    kept = sorted(path.name for path in directory.iterdir())
    assert kept == [path.name for path in saves(directory)] and len(kept) == 3


def test_killed_and_stopped_it_equals_a_run_that_never_was(
    project: Any, until: Until, reference: Path
) -> None:
    """If it fails, kill -9 or SIGTERM costs more than the steps since the last save, or changes the run after it."""
    check_kills(project, until, reference, "killed", times=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_many_times(project: Any, until: Until, reference: Path, seed: int) -> None:
    """If it fails, there is a moment at which a kill loses or changes something."""
    check_kills(project, until, reference, f"killed_{seed}", times=8, seed=seed)


def test_a_truncated_shard_is_one_line_that_names_the_save_before(
    project: Any, reference: Path
) -> None:
    """If it fails, a damaged save ends in a traceback, is trained on, or leaves no way out."""
    shards = reference / "parameters" / "ocdbt.process_0" / "d"
    # All of them: which arrays stand in which file, and what of a file is still used, depends on the order of writes.
    good = {path: path.read_bytes() for path in shards.iterdir()}
    for path, data in good.items():
        path.write_bytes(data[: len(data) // 2])
    _, err = ended(project.start("whole", "train.steps=18"), 2)
    for path, data in good.items():
        path.write_bytes(data)
    assert err.startswith(f"gemma-qat: error: {reference}/parameters: cannot be restored (")
    assert err.endswith(
        f"the save before it is {reference.parent}/14: move {reference} away to go on from there\n"
    )
    assert err.count("\n") == 1, err
    assert load_parameters(reference.parent / "14")[0].step == 14


@pytest.fixture
def disk(project: Any) -> Iterator[Path]:
    """A run's directory on a tmpfs of 4 MiB, or on the disk where we may not mount one."""
    folder = project.folder / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    able = shutil.which("mount") and subprocess.run(mount, capture_output=True, check=False)
    yield folder
    if able and able.returncode == 0:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_costs_no_older_save(
    project: Any, reference: Path, disk: Path
) -> None:
    """If it fails, a save that had no room is taken for one, takes the last good one with it, or is not heard of."""
    directory = project.saves("disk")
    shutil.copytree(reference.parent, directory)
    shutil.copytree(reference.parents[2] / "rows", disk / "rows")  # Rows need no room again.
    if disk.is_mount():
        space = os.statvfs(disk)
        (disk / "ballast").write_bytes(bytes(space.f_bavail * space.f_frsize - 32_768))
    limit = 0 if disk.is_mount() else 16
    _, err = ended(project.start("disk", "train.steps=20", largest=limit), 2)
    said = r"gemma-qat: error: .*/18: cannot be saved \(.*(No space left on device|File too large).*\)\n"
    assert re.fullmatch(said, err), err
    # What it had written is deleted by the next start; writes may still be under way when a run ends.
    assert [path.name for path in saves(directory)] == ["12", "14", "16"]
    equal(directory / str(STEPS), reference)


def curve(save: Path) -> np.ndarray:
    return np.asarray(json.loads((save / "data.json").read_text())["curves"]["loss"])


def lose_one_and_go_on(
    project: Any, until: Until, reference: Path, name: str, processes: tuple[int, int]
) -> float:
    """Kills one of several processes, starts them again, stops them, and ends the run on fewer.

    Returns the seconds from the kill to the end of the others.
    """
    directory = project.saves(name)
    first = project.start(name, processes=processes[0])
    until(first, lambda: newest(directory) >= 2)
    listed = subprocess.run(["pgrep", "-P", str(first.pid), "-f", "gemma_qat"], capture_output=True, text=True, check=True)  # fmt: skip
    victim = int(listed.stdout.split()[-1])
    began = time.monotonic()
    subprocess.run(["kill", "-9", str(victim)], check=True)
    _, err = first.communicate(timeout=300)
    seconds = time.monotonic() - began
    assert first.returncode in (1, 134, 137), err
    assert seconds < HEARTBEAT + 15, err

    # Longer than the reference, so that the signal does not come when the run is at its end; the rate is constant.
    again = project.start(name, "train.steps=100000", processes=processes[0])
    before = newest(directory)
    until(again, lambda: newest(directory) > before)
    again.send_signal(signal.SIGTERM)
    _, err = ended(again, 75)
    steps = set(re.findall(r"stopped after step (\d+), saved in", err))
    assert steps == {str(newest(directory))}, err
    saved = directory / str(newest(directory))
    _, parameters = load_parameters(saved)
    manifest, codes = load_quantized(saved)
    assert differing(codes, quantize_parameters(parameters, manifest.fitted)) == {
        "codes": 0,
        "scales": 0,
    }
    last = newest(directory) + 4
    ended(project.start(name, f"train.steps={last}", processes=processes[1]), 0)
    assert newest(directory) == last
    ours, theirs = curve(directory / str(last)), curve(reference)
    both = min(len(ours), len(theirs)) - 1
    assert both >= 2 and ours[:both, 0].tolist() == theirs[:both, 0].tolist()
    # The same batches and arithmetic, but sums over processes are taken in another order. Adam makes of a gradient near
    # zero a step of up to the learning rate either way: 16 steps of 3e-4 in a few of the weights.
    np.testing.assert_allclose(ours[:both, 1], theirs[:both, 1], atol=5e-3)
    return seconds


def test_two_processes_lose_one_go_on_and_end_as_one(
    project: Any, until: Until, reference: Path
) -> None:
    """If it fails, several processes hang without one another, or their saves are theirs alone."""
    seconds = lose_one_and_go_on(project, until, reference, "two", (2, 1))
    print(f"one of two killed: the other ended after {seconds:.1f} s")


@pytest.mark.slow
def test_four_processes_lose_one_go_on_and_end_as_two(
    project: Any, until: Until, reference: Path
) -> None:
    """If it fails, what two processes do does not hold for four, or for going from some to fewer."""
    seconds = lose_one_and_go_on(project, until, reference, "four", (4, 2))
    print(f"one of four killed: the others ended after {seconds:.1f} s")


def test_several_processes_refuse_together(project: Any) -> None:
    """If it fails, bad input to several processes hangs some of them or has another status than for one."""
    _, err = ended(project.start("refused", "train.batch_size=3", processes=2), 2)
    lines = [line for line in err.splitlines() if line.startswith("gemma-qat: error")]
    assert len(lines) in (1, 2)  # The second may be ended before it says so.
    assert all("train.batch_size=3" in line and "multiple of 2" in line for line in lines), err
