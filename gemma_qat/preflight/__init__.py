"""Before a run: whether a config would start on a machine, what it would need there, and how long it would take."""

# The check.
from gemma_qat.preflight.check import Report, preflight

# What is found.
from gemma_qat.preflight.disk import Space
from gemma_qat.preflight.step import Step

__all__ = ["Report", "Space", "Step", "preflight"]
