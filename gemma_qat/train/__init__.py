"""Training: losses, optimizer, state, the jitted step, and the loop that resumes exactly."""

# The loop.
# Never losing work: saves, signals, several processes.
from gemma_qat.train.distributed import first_alone, is_first, join
from gemma_qat.train.loop import TrainConfig, Trained, train

# What is minimized, and how.
from gemma_qat.train.losses import LOSSES, chunked, cross_entropy, divergence, token_scores
from gemma_qat.train.optimizer import OptimizerConfig, make_optimizer
from gemma_qat.train.saves import latest_save

# Learned scales.
from gemma_qat.train.scales import with_scales
from gemma_qat.train.signals import Stop, stop_on_signals

# One step.
from gemma_qat.train.state import Student, TrainState
from gemma_qat.train.step import batch_scores, make_step

__all__ = [
    "LOSSES",
    "OptimizerConfig",
    "Stop",
    "Student",
    "TrainConfig",
    "TrainState",
    "Trained",
    "batch_scores",
    "chunked",
    "cross_entropy",
    "divergence",
    "first_alone",
    "is_first",
    "join",
    "latest_save",
    "make_optimizer",
    "make_step",
    "stop_on_signals",
    "token_scores",
    "train",
    "with_scales",
]
