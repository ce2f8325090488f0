"""What a compiled program is: parsed from its text, how often each part runs, and what it moves between devices."""

# What it moves.
from gemma_qat.compiled.collectives import Collective, collectives, summary
from gemma_qat.compiled.groups import group_of

# The program.
from gemma_qat.compiled.hlo import Computation, Instruction, Module, Shape, parse

# How often each part runs.
from gemma_qat.compiled.loops import Runs, executed

__all__ = [
    "Collective",
    "Computation",
    "Instruction",
    "Module",
    "Runs",
    "Shape",
    "collectives",
    "executed",
    "group_of",
    "parse",
    "summary",
]
