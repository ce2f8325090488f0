"""launch/licences.py for tests: it reads what setup.cfg asks for and what is pinned, and belongs to no package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def load() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "launch" / "licences.py"
    spec = importlib.util.spec_from_file_location("licences", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
