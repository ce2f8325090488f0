"""What tests of launch/xm_launch.py share: the script as a module, and the command lines whose dry runs are kept."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden")

TRAIN = ["train", "configs/e2b_q4_0.py", "data.path=/data/a b/$HOME", "train.steps=100"]
BINARY = "--binary=/opt/gemma-qat/bin/gemma-qat"
CUDA = "--image=us-docker.pkg.dev/project/images/gemma-qat:cuda"
TPU = "--image=us-docker.pkg.dev/project/images/gemma-qat:tpu"

CASES = {
    "local": [BINARY, "--tag", "try", *TRAIN],
    "local_sweep": [BINARY, "--executor=local", "sweep", "configs/sweep_tiny.py", "--variant=tiny"],
    "kubernetes_v5e": [BINARY, "--executor", "kubernetes", "--on", "v5e:4x8", TPU, "--volume=files:/data",
                       "--logs=/data/logs", *TRAIN],
    "kubernetes_h100": [BINARY, "--executor=kubernetes", "--on=h100:4x8", CUDA, "--secret=hub", "--tag=e2b",
                        "--env=NCCL_DEBUG=INFO", "--env=HF_TOKEN=hidden", "--name=first", *TRAIN],
    "vertex_v6e": [BINARY, "--executor=vertex", "--on=v6e:4x4", TPU, "--logs=/gcs/bucket/logs", *TRAIN],
    "vertex_h100": [BINARY, "--executor=vertex", "--on=h100:2x8", "--build=gcr.io/project/gemma-qat:1",
                    "--tag=e2b", "--env=NCCL_DEBUG=INFO", *TRAIN],
}  # fmt: skip
"""Command lines by the name of the file that their dry run is kept in, golden/xm_NAME.json."""


def script() -> ModuleType:
    """launch/xm_launch.py, loaded once: its flags are defined once in a process."""
    if "xm_launch" not in sys.modules:
        spec = importlib.util.spec_from_file_location("xm_launch", ROOT / "launch/xm_launch.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["xm_launch"] = module
        spec.loader.exec_module(module)
    return sys.modules["xm_launch"]
