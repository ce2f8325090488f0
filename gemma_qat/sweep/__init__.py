"""Sweeps: many runs from one config, each resumed where it stopped, compared in one table."""

from gemma_qat.sweep.marks import State, states
from gemma_qat.sweep.plan import Plan, Planned, plan_of
from gemma_qat.sweep.run import jobs, put_together, run, run_cell
from gemma_qat.sweep.show import console_table, markdown

__all__ = [
    "Plan",
    "Planned",
    "State",
    "console_table",
    "jobs",
    "markdown",
    "plan_of",
    "put_together",
    "run",
    "run_cell",
    "states",
]
