"""Runs cases in a process with eight devices: `python tests/sharded/eight.py on_experts.py [case ...]`.

The devices of a process are fixed before jax is first used, and the test process has one. A file `on_*.py` has a function
`case(name)` for every name in its `CASES`, which returns figures or raises; this prints one JSON line for each. With
`SHAPES_CHECKED = False` annotations are not checked, which they are everywhere else and which would take most of the time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

# Before jax is imported. Partitioning is what is tested, not the code for one core: no time is spent on optimizing that.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"

HERE = Path(__file__).resolve().parent
RESULT = "result: "


def load(name: str) -> Any:
    """Returns the module in a file of this directory."""
    sys.path.insert(0, str(HERE))
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), HERE / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(file: str, names: list[str]) -> None:
    """Prints what each case found, or how it failed."""
    import jax
    from jaxtyping import install_import_hook

    if "\nSHAPES_CHECKED = False\n" not in (HERE / file).read_text("utf-8"):
        install_import_hook("gemma_qat", "beartype.beartype")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_default_matmul_precision", "highest")
    module = load(file)
    for name in names or module.CASES:
        try:
            found: dict[str, Any] = {"found": module.case(name)}
        except Exception:  # reported to the test, which fails with it
            found = {"error": traceback.format_exc()}
        print(RESULT + json.dumps({"case": name, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
