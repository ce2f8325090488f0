"""Prints what a machine is called where it is rented, a line of NAME=VALUE each, for scripts to read."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the action's arguments."""
    parser.add_argument(
        "machine", help="a TPU slice such as v5p:4x4x4, nodes of GPUs such as h100:4x8"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints."""
    from gemma_qat.launch.machines import machine_named

    machine = machine_named(arguments.machine)
    said = {
        "NAME": machine.name,
        "CHIP": machine.chip,
        "CHIPS": machine.place.devices,
        "HOSTS": machine.hosts,
        "CHIPS_PER_HOST": machine.chips_per_host,
        "TOPOLOGY": machine.topology,
        "ACCELERATOR_TYPE": machine.accelerator_type,
    }
    print("\n".join(f"{name}={value}" for name, value in said.items()))
    return 0
