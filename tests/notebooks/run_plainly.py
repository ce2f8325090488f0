"""A program, run for the test beside it: a notebook's code cells in order, without Jupyter; figures are drawn, not shown.

python run_plainly.py NOTEBOOK      prints, last, {"cells": how many ran, "figures": how many were drawn}
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

drawn = 0


def draw() -> None:
    """Stands in for `plt.show`, which does nothing without a display: here a figure that cannot be drawn is an error."""
    global drawn
    for number in plt.get_fignums():
        plt.figure(number).savefig(io.BytesIO(), format="png")
        drawn += 1
    plt.close("all")


def main() -> None:
    plt.show = draw
    cells = [
        cell
        for cell in json.loads(Path(sys.argv[1]).read_text("utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    names = {"__name__": "__main__"}
    for cell in cells:
        exec(compile("".join(cell["source"]), f"<cell {cell['id']}>", "exec"), names)
    print(json.dumps({"cells": len(cells), "figures": drawn}))


if __name__ == "__main__":
    main()
