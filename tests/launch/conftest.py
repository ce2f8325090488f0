"""What tests of the launchers share."""

from __future__ import annotations

from launch.simulated_slurm import slurm

__all__ = ["slurm"]
