"""Training: losses, optimizer, state, the jitted step, and the loop that resumes exactly."""

# The loop.
from gemma_qat.train.loop import TrainConfig, Trained, latest_save, train

# What is minimized, and how.
from gemma_qat.train.losses import LOSSES, chunked, cross_entropy, divergence, token_scores
from gemma_qat.train.optimizer import OptimizerConfig, make_optimizer

# Learned scales.
from gemma_qat.train.scales import with_scales

# One step.
from gemma_qat.train.state import Student, TrainState
from gemma_qat.train.step import Fixed, Objective, gradients, make_step

__all__ = [
    "LOSSES",
    "Fixed",
    "Objective",
    "OptimizerConfig",
    "Student",
    "TrainConfig",
    "TrainState",
    "Trained",
    "chunked",
    "cross_entropy",
    "divergence",
    "gradients",
    "latest_save",
    "make_optimizer",
    "make_step",
    "token_scores",
    "train",
    "with_scales",
]
