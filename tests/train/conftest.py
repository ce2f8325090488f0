"""Batches to train on, and a run as its user sees it: a config file, texts, a tokenizer, commands that can be killed."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from small_run import write_run

ROOT = Path(__file__).resolve().parents[2]


class Batches:
    """Batches that are a function of how many were taken, with the ids of their rows; number `poison` is not finite."""

    def __init__(self, poison: int = -1) -> None:
        self.taken, self.poison = 0, poison

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        self.taken += 1
        tokens = np.random.default_rng(self.taken).integers(0, 64, (2, 8)).astype(np.int32)
        weight = np.nan if self.taken == self.poison else 1
        return {
            "tokens": tokens, "segments": np.ones_like(tokens),
            "positions": np.tile(np.arange(8, dtype=np.int32), (2, 1)),
            "targets": np.roll(tokens, -1, axis=1), "weights": np.full((2, 8), weight, np.float32),
            "ids": np.array([10 * self.taken, 10 * self.taken + 1]),
        }  # fmt: skip

    def get_state(self) -> Any:
        return {"taken": self.taken}

    def set_state(self, state: Any) -> None:
        self.taken = state["taken"]


class OneBatch:
    """The same batch without end: what is learned shows without the noise of others."""

    def __init__(self, batch: dict[str, np.ndarray]) -> None:
        self.batch = batch

    def __next__(self) -> dict[str, np.ndarray]:
        return self.batch

    def get_state(self) -> Any:
        return {}

    def set_state(self, state: Any) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def forget_sizes(known_sizes: None) -> None:
    """Configs here make a size known."""


@pytest.fixture(scope="session")
def batches() -> type[Batches]:
    """Makes batches of vocabulary 64 that begin anew."""
    return Batches


@pytest.fixture(scope="session")
def one_batch() -> type[OneBatch]:
    """Makes a source of one batch, again and again."""
    return OneBatch


@dataclasses.dataclass(frozen=True)
class Project:
    """A folder with everything a run needs; commands share a compilation cache."""

    folder: Path

    def start(
        self, name: str, *arguments: str, processes: int = 1, largest: int = 0
    ) -> subprocess.Popen[str]:
        """Starts a training run whose files go to `name`; no file may outgrow `largest` KiB, if given."""
        what = ["train", f"{self.folder}/config.py", f"directory={self.folder / name}", *arguments]
        command = [sys.executable, "-m", "gemma_qat", *what]
        if processes > 1:
            script = str(ROOT / "launch" / "local_multiprocess.sh")
            logs = str(self.folder / f"{name}_logs")
            command = ["bash", script, "--logs", logs, str(processes), *what]
        if largest:
            command = ["bash", "-c", f'ulimit -f {largest}; exec "$@"', "-", *command]
        environment = {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "GEMMA_QAT_PYTHON": sys.executable,
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            # Compiles in half the time; every run compared here is compiled the same.
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }
        return subprocess.Popen(
            command, env=os.environ | environment, cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def saves(self, name: str) -> Path:
        """Where the saves of a run are."""
        return self.folder / name / "run" / "checkpoints"


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("project")
    write_run(folder, "steps=16, log_every=3, save_every=2, keep=3")
    return Project(folder)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiles the step once for all starts of a run in this process."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("cache")), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def until() -> Callable[..., None]:
    """Waits until something is so, while a process lives."""

    def wait(
        process: subprocess.Popen[str], so: Callable[[], object], seconds: float = 240
    ) -> None:
        end = time.monotonic() + seconds
        while not so():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end, "it never came to that"
            time.sleep(0.005)

    return wait


@pytest.fixture(autouse=True)
def _no_process_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ends what a failing test leaves running, with the processes it started in turn."""
    started: list[subprocess.Popen[str]] = []
    start = Project.start

    def noted(*arguments: str, **options: int) -> subprocess.Popen[str]:
        started.append(start(*arguments, **options))  # type: ignore[arg-type]
        return started[-1]

    monkeypatch.setattr(Project, "start", noted)
    yield
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
