"""A program in a process of its own that has the TPU compiler and no TPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemma_qat.plan import has_compiler

needs_compiler = pytest.mark.skipif(
    not has_compiler(), reason="needs libtpu: pip install '.[tpu]' on Linux, x86-64"
)

_THERE = {
    "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


def printed(program: str) -> Any:
    """Runs a program and returns the JSON in the last line it prints; fails with its errors when it does."""
    ran = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | _THERE, capture_output=True, text=True,
        check=False, cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])
