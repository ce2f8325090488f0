"""Writes `collectives.json` anew from every case of `test_step.py`: `python tests/sharded/write_collectives.py`.

Half an hour of one core; compare with `git diff` and say why a count changed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    from test_step import EVERY, write

    command = [sys.executable, str(HERE / "eight.py"), "on_step.py", *EVERY]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    lines = [json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("result")]
    write({one["case"]: one for one in lines})
