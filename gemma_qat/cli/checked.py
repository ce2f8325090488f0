"""What `gemma-qat train --check` says: what a step and a save take, how long, and what stands in the way."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gemma_qat.cli.told import size_said

if TYPE_CHECKING:
    from gemma_qat.preflight import Report, Step


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --check and the options that belong to it."""
    parser.add_argument(
        "--check", action="store_true",
        help="train nothing: say whether this would start, what it would take, how long; status 2 if it would not",
    )  # fmt: skip
    parser.add_argument(
        "--on", metavar="MACHINE", help="with --check: on a machine such as v5p:4x4x4 or h100:4x8, not on this one",
    )  # fmt: skip
    parser.add_argument(
        "--slices", type=int, metavar="N", help="with --on a TPU slice: so many of it, which mesh.dcn_* join",
    )  # fmt: skip
    parser.add_argument(
        "--no-paths", action="store_true",
        help="with --check: leave out files, folders and free space, where this machine does not have the cluster's",
    )  # fmt: skip
    parser.add_argument(
        "--estimate", action="store_true", help="with --check: do not compile for TPUs"
    )
    parser.add_argument(
        "--json", metavar="FILE", default=None, help="with --check: write what was found there"
    )


def refuse_without_check(arguments: argparse.Namespace) -> None:
    """Refuses options of the check for a run that trains.

    Raises: InputError.
    """
    from gemma_qat.errors import InputError

    given = {
        "--on": arguments.on, "--slices": arguments.slices, "--no-paths": arguments.no_paths,
        "--estimate": arguments.estimate, "--json": arguments.json,
    }  # fmt: skip
    for name, value in given.items():
        if value:
            raise InputError(f"{name} belongs to --check, which is not given")


def check(arguments: argparse.Namespace) -> int:
    """Prints what was found; 2 when the config cannot work, 0 when it can."""
    if arguments.on:
        from gemma_qat.cli.plan import describe_the_host

        describe_the_host()
    from gemma_qat.cli.asked import config_asked_for
    from gemma_qat.cli.console import keep_json, say, writable
    from gemma_qat.cli.plan import describe_the_slice
    from gemma_qat.cli.told import asked_for
    from gemma_qat.errors import InputError
    from gemma_qat.launch.machines import machine_named
    from gemma_qat.preflight import preflight

    writable(arguments.json)
    if arguments.slices is not None and not arguments.on:
        raise InputError("--slices belongs to --on MACHINE, which is not given")
    slices = 1 if arguments.slices is None else arguments.slices
    machine = machine_named(arguments.on, slices) if arguments.on else None
    if machine is not None:
        describe_the_slice(machine.accelerator_type)
    source, base, config = config_asked_for(arguments)
    if arguments.show_config:
        print("\n".join(asked_for(str(source), base, config, True)))
    compiles = False if arguments.estimate else None
    found = preflight(config, machine, paths=not arguments.no_paths, compiles=compiles)
    keep_json(arguments.json, found.to_json())
    print("\n".join(lines(found, not arguments.no_paths)), flush=True)
    for problem in found.problems:
        say(InputError(problem))
    return 2 if found.problems else 0


def lines(found: Report, paths: bool) -> Iterator[str]:
    """Yields what was found, a line each; problems are not among them."""
    where = found.machine or "this machine"
    hosts = f" on {found.hosts} hosts" if found.hosts > 1 else ""
    sizes = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items() if size > 1)
    yield f"config   {found.name}: {found.model} as {found.recipe}, loss {found.loss}"
    yield (
        f"machine  {where}: {found.devices} devices{hosts}, {f'mesh {sizes}' if sizes else 'no mesh'}, "
        f"{found.rows} rows of {found.length} tokens a step"
    )
    for one in found.data:
        what = f"{one.documents:,} documents, about {one.tokens:,.0f} tokens each"
        said = what if one.written else "is written when training begins"
        yield f"data     {one.kind} {one.path}: {said}"
    if found.step is not None:
        yield from _step(found.step)
    yield from _time(found)
    if found.save is not None:
        yield from _saves(found)
    for space in found.spaces:
        written, free = size_said(space.total), size_said(space.free)
        yield f"space    {space.path}: {written} to write, {free} free; a quota is not seen"
    for warning in found.warnings:
        yield f"warning  {warning}"
    if not found.problems:
        left_out = "" if paths else ", paths and space left out"
        yield f"ready    {found.name} can start on {where}{left_out}"


def _step(step: Step) -> Iterator[str]:
    largest = sorted(step.memory.items(), key=lambda part: -part[1])[:4]
    parts = ", ".join(f"{name} {size_said(size)}" for name, size in largest)
    of_all = "" if step.available is None else f" of {size_said(step.available)}"
    yield f"memory   {size_said(step.peak)}{of_all} a device ({step.how}; {parts})"
    for note in step.notes:
        yield f"         {note}"


def _time(found: Report) -> Iterator[str]:
    step, hours = found.step, found.hours
    begun = found.begun or 0
    if begun >= found.steps:
        yield f"time     step {begun} of {found.steps} is done: nothing is left to train"
        return
    from_there = f"goes on from step {begun}" if begun else "begins at step 0"
    if step is None:
        yield f"time     {from_there} of {found.steps}"
        return
    if hours is None or step.best is None or step.worst is None:
        yield f"time     {from_there} of {found.steps}; how long a step takes is not known for these devices"
        return
    tokens = found.rows * found.length / step.best
    yield (
        f"time     {step.best:.3g} to {step.worst:.3g} s a step (a bound at peak rates: real steps are slower), "
        f"at best {tokens:,.0f} tokens/s"
    )
    yield f"         {from_there} of {found.steps}: {hours[0]:.3g} to {hours[1]:.3g} hours"


def _saves(found: Report) -> Iterator[str]:
    save, step = found.save or {}, found.step
    parts = ", ".join(f"{name} {size_said(size)}" for name, size in save.items())
    every = "at the end"
    if found.save_every:
        every = f"every {found.save_every} steps"
        if step is not None and step.best is not None and step.worst is not None:
            best, worst = (found.save_every * x / 3600 for x in (step.best, step.worst))
            every += f" ({best:.3g} to {worst:.3g} hours)"
    yield f"save     {size_said(sum(save.values()))} ({parts})"
    yield f"         {every}, {found.saves} to come, at most {found.saves_at_once} there at once"
