"""Compiles the training step of every size for TPU slices, one process a row, and writes the tables of docs/scaling.md.

    python experiments/scaling/run.py              every row that is not there yet, then the tables
    python experiments/scaling/run.py 31b q4_0     only rows whose name has all of these words
    python experiments/scaling/run.py --tables     the tables from the rows that are there

A row is a file in rows/: delete it to make it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gemma_qat.plan import has_compiler

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DOCUMENT = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- rows: begin -->", "<!-- rows: end -->"
GIB = 2**30

COMMON = ("data.length=4096", "options.dtype=bfloat16", "options.remat=full")
"""Overlays of every row; the loss is computed over 512 positions at a time, as the configs say."""

SLICES = {
    "e2b": ("v5p:2x2x2", 32),
    "e4b": ("v5p:2x2x4", 64),
    "12b": ("v5p:2x4x4", 128),
    "26b_a4b": ("v5p:4x4x4", 256),
    "31b": ("v5p:4x4x4", 256),
}
"""Size -> the slice of v5p and the rows of a step: four a chip."""


CUBE = {"v5p:4x4x4": ("mesh.data=2", "mesh.fsdp=32")}
"""On a whole cube of v5p the compiler makes a gather over all 64 chips an all-reduce; over 32 it stays a gather."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled step."""

    size: str
    mode: str
    topology: str
    batch_size: int
    overlays: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.size}-{self.mode}-{self.topology.replace(':', '-')}"

    @property
    def command(self) -> list[str]:
        """Arguments of `gemma-qat` for it, the file to write left out."""
        config, what = MODES[self.mode]
        return [
            "plan", f"configs/{self.size}_{config}.py", "--topology", self.topology,
            f"train.batch_size={self.batch_size}", "--quick", *COMMON, *what, *self.overlays,
        ]  # fmt: skip


MODES: dict[str, tuple[str, tuple[str, ...]]] = {
    "float": ("q4_0", ("recipe=float", "train.loss=ce")),
    "q4_0": ("q4_0", ("train.loss=ce",)),
    "mobile": ("mobile", ("train.loss=ce",)),
    "distillation": ("q4_0", ("train.loss=kl",)),
}
"""Mode -> the config it starts from and what it changes; distillation is q4_0 with a bfloat16 teacher of its size."""


def rows() -> list[Row]:
    """Returns every row of the tables, the most telling first."""
    found = []
    four = ("train.microbatches=4",)
    for mode in ("q4_0", "distillation", "float", "mobile"):
        for size, (topology, batch) in SLICES.items():
            if mode != "mobile" or size in ("e2b", "e4b"):
                found.append(Row(size, mode, topology, batch, four + CUBE.get(topology, ())))
    # A row of 4096 tokens a chip does not fit 16 GiB (scores of all pairs): a row every four chips, heads cut in four.
    quarters = ("mesh.preset=fsdp+tensor", "mesh.tensor=4")
    found.append(Row("e4b", "q4_0", "v5e:8x8", 16, quarters))
    found.append(Row("12b", "q4_0", "v6e:8x8", 64))
    return found


def make(row: Row) -> dict[str, Any]:
    """Compiles one row in a process of its own and returns what was found, with the cost of finding it.

    Units: seconds of wall time and of processors, bytes of memory of that process at its largest.
    """
    file = HERE / "rows" / f"{row.name}.json"
    file.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "gemma_qat", *row.command, "--json", str(file)]
    began = time.monotonic()
    child = subprocess.Popen(command, cwd=ROOT)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        file.unlink(missing_ok=True)
        raise SystemExit(f"{row.name}: exit status {child.returncode} from {' '.join(command)}")
    found = json.loads(file.read_text("utf-8"))
    found["host"] = {
        "wall_seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "memory_bytes": used.ru_maxrss * 1024,
        "python": platform.python_version(),
        "processors": os.cpu_count(),
    }
    found["mode"] = row.mode
    file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return found


def table(of: list[Row]) -> list[str]:
    """Returns the lines of a table, rows that were not made marked as such."""
    head = (
        "size", "what", "slice", "rows x tokens", "state", "peak", "of HBM", "FLOPs a chip", "of declared",
        "sent a chip", "step, bound", "MFU", "limit", "compiled in", "host memory",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(_cells(row))} |" for row in of]


def _cells(row: Row) -> list[str]:
    file = HERE / "rows" / f"{row.name}.json"
    start = [row.size, row.mode, f"`{row.topology}`"]
    if not file.is_file():
        return [*start, "not made", *[""] * 11]
    found = json.loads(file.read_text("utf-8"))
    memory, seconds, mfu = found["memory"], found["seconds"], found["mfu"]
    sent = sum(kind["bytes"] for kind in found["collectives"].values())
    state = memory.get("argument", memory.get("parameters", 0) + memory.get("optimizer", 0))
    return [
        *start, f"{found['batch_size']} x {found['length']}", f"{state / GIB:.1f} GiB",
        f"{memory['peak'] / GIB:.1f} GiB", f"{memory['peak'] / memory['available']:.0%}",
        f"{found['flops'] / 1e12:.0f} T", f"{found['flops_ratio']:.4f}", f"{sent / GIB:.0f} GiB",
        f"{seconds['best']:.2f}-{seconds['worst']:.2f} s", f"{mfu['worst']:.0%}-{mfu['best']:.0%}",
        found["limit"] if found["how"] == "compiled" else found["how"],
        f"{found['host']['processor_seconds']:.0f} s", f"{found['host']['memory_bytes'] / GIB:.1f} GiB",
    ]  # fmt: skip


def write_tables() -> None:
    """Puts the tables into docs/scaling.md, between its two marks."""
    sizes, modes = list(SLICES), list(MODES)
    order = sorted(rows(), key=lambda row: (sizes.index(row.size), modes.index(row.mode)))
    lines: list[str] = []
    for chip in ("v5p", "v5e", "v6e"):
        of = [row for row in order if row.topology.startswith(chip)]
        lines += [f"### {chip}", "", *table(of), ""]
    missing = [row.name for row in order if not (HERE / "rows" / f"{row.name}.json").is_file()]
    if missing:
        how = "`python experiments/scaling/run.py` makes them, minutes each"
        lines += [
            f"{len(missing)} of {len(order)} rows are not made: {', '.join(missing)}. {how}.",
            "",
        ]
    text = DOCUMENT.read_text("utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n{END}{after}", "utf-8")


def main() -> None:
    """Makes what is missing and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only rows whose name has all of them")
    parser.add_argument("--tables", action="store_true", help="make no row")
    arguments = parser.parse_args()
    if not arguments.tables and not has_compiler():
        raise SystemExit(
            "rows are what the TPU compiler says: libtpu expected, pip install -e '.[tpu]'"
        )
    chosen = [row for row in rows() if all(word in row.name for word in arguments.words)]
    for row in [] if arguments.tables else chosen:
        if (HERE / "rows" / f"{row.name}.json").is_file():
            print(f"{row.name}: there", flush=True)
            continue
        found = make(row)
        print(f"{row.name}: {found['how']}, {found['host']['wall_seconds']:.0f} s", flush=True)
    write_tables()


if __name__ == "__main__":
    main()
