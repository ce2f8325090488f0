"""Compiles a config's training step for a TPU slice that is not there: memory, FLOPs, collectives, a bound on time."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "config", help="a Python file with get_config(variant), such as configs/26b_a4b_q4_0.py"
    )
    parser.add_argument(
        "overlays", nargs="*", default=[], metavar="path=value",
        help="such as mesh.fsdp=-1 train.batch_size=256",
    )  # fmt: skip
    parser.add_argument(
        "--topology",
        required=True,
        help="chip and shape of the slice, such as v5p:4x4x4 or v6e:16x16; or nodes of GPUs, estimated: h100:4x8",
    )
    parser.add_argument("--variant", default="default", help="default, or tiny")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the plan there")
    parser.add_argument(
        "--search", action="store_true", help="try batch x remat x mesh and rank what fits"
    )
    parser.add_argument("--best", type=int, default=3, help="how many a search compiles")
    parser.add_argument(
        "--quick", action="store_true", help="compile with little effort: minutes become seconds"
    )
    parser.add_argument(
        "--estimate", action="store_true", help="do not compile: from eval_shape alone"
    )


def run(arguments: argparse.Namespace) -> int:
    """Plans and prints."""
    describe_the_host()
    import json
    from pathlib import Path

    from rich.console import Console

    from gemma_qat.cli.console import progress, writable
    from gemma_qat.config import apply, load_config
    from gemma_qat.errors import InputError
    from gemma_qat.launch.machines import machine_named
    from gemma_qat.plan import plan, search

    machine = machine_named(arguments.topology)
    topology = machine.place
    describe_the_slice(machine.accelerator_type)
    writable(arguments.json)
    if arguments.best < 1:
        raise InputError("--best has to be at least 1")
    config = apply(load_config(Path(arguments.config), arguments.variant), arguments.overlays)
    work = _workload(config)
    compiles = False if arguments.estimate else None
    console = Console(width=None if Console().is_terminal else 140)
    if arguments.search:
        with progress() as report:
            found = search(work, topology, best=arguments.best, compiles=compiles, progress=report)
        console.print(_ranking(found, topology))
        saved: Any = [choice.row() for choice in found]
    else:
        one = plan(work, topology, compiles=compiles, quick=arguments.quick)
        for table in _tables(one):
            console.print(table)
        saved = one.to_json()
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(saved, indent=1) + "\n", "utf-8")
    return 0


def describe_the_host() -> None:
    """Says, before jax is imported, that this machine has no TPU and nobody is to be asked about one."""
    import os

    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_ID="0", TPU_WORKER_HOSTNAMES="localhost",
                      ALLOW_MULTIPLE_LIBTPU_LOAD="1")  # fmt: skip


def describe_the_slice(accelerator_type: str) -> None:
    """Says, before the TPU compiler is loaded, what kind of machine it is to think it is on."""
    import os

    if accelerator_type:  # GPUs have none.
        os.environ["TPU_ACCELERATOR_TYPE"] = accelerator_type


def _workload(config: Any) -> Any:
    from gemma_qat.errors import InputError
    from gemma_qat.start import workload_of

    if config.teacher_cache:
        raise InputError(
            "teacher_cache: a plan has the teacher in the step, an upper bound; leave teacher_cache out"
        )
    return workload_of(config)


def _tables(one: Any) -> list[Any]:
    from gemma_qat.plan import verdict

    mesh = ", ".join(f"{name} {value}" for name, value in one.mesh.items())
    head = (
        f"{one.name}: {one.size} as {one.recipe}, loss {one.loss}, on {one.topology} ({one.devices} chips; {mesh}), "
        f"{one.batch_size} rows of {one.length}, {one.dtype}, remat {one.remat}"
    )
    how = "compiled quickly" if one.quick else "compiled"
    timing = f"{how} in {one.compile_seconds:.0f} s" if one.how == "compiled" else one.how
    lines = [head, f"{timing}; {verdict(one)}", *one.notes]
    return [*lines, _memory(one), _time(one), _collectives(one)]


def _memory(one: Any) -> Any:
    from rich.table import Table

    table = Table(title="memory of one chip")
    table.add_column("part")
    for name in ("bytes", "GiB", "of HBM"):
        table.add_column(name, justify="right")
    for part, size in one.memory.items():
        share = f"{size / one.memory['available']:.1%}"
        table.add_row(part, f"{size:,.0f}", f"{size / 2**30:.3f}", share)
    return table


def _time(one: Any) -> Any:
    from rich.table import Table

    table = Table(title="one step")
    table.add_column("")
    table.add_column("", justify="right")
    rows = {
        "model FLOPs, all chips": f"{one.model_flops:.4g}",
        "FLOPs of one chip (loops multiplied out)": f"{one.flops:.4g}",
        "executed FLOPs / declared ones": f"{one.flops_ratio:.4f}",
        "model FLOPs / executed FLOPs": f"{one.model_flops / one.devices / one.flops:.3f}",
        "int8 operations of one chip": f"{one.int8_operations:.4g}",
        "HBM bytes of one chip": f"{one.hbm_bytes:.4g}",
    } | {f"seconds, {name}": f"{value:.4g}" for name, value in one.seconds.items()}
    rows |= {
        "limit": one.limit,
        "MFU at best (messages hidden)": f"{one.mfu['best']:.1%}",
        "MFU at worst (none hidden)": f"{one.mfu['worst']:.1%}",
        "tokens/s at best, all chips": f"{one.tokens_per_second:,.0f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    table.caption = "a bound, at peak rates: real steps are slower"
    return table


def _collectives(one: Any) -> Any:
    from rich.table import Table

    table = Table(title="collectives of one step")
    table.add_column("kind")
    for name in ("count", "bytes", "seconds"):
        table.add_column(name, justify="right")
    for kind, row in one.collectives.items():
        table.add_row(kind, f"{row['count']:,.0f}", f"{row['bytes']:,.0f}", f"{row['seconds']:.4g}")
    return table


def _ranking(found: Any, topology: Any) -> Any:
    from rich.table import Table

    table = Table(title=f"what fits {topology.name}, fastest first")
    for name in ("mesh", "rows", "remat", "GiB", "step s", "MFU", "tokens/s", "how"):
        table.add_column(name, justify="left" if name in ("mesh", "how") else "right")
    for choice in found[:20]:
        row = choice.row()
        table.add_row(
            row["mesh"], str(row["batch_size"]), row["remat"], f"{row['peak'] / 2**30:.2f}",
            f"{row['seconds']:.3g}", f"{row['mfu']:.1%}", f"{row['tokens_per_second']:,.0f}", row["how"],
        )  # fmt: skip
    return table
