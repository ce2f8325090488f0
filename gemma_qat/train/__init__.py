"""Training: losses, optimizer, state, the jitted step, and the loop that resumes exactly."""

# The loop.
# Never losing work: saves, signals, several processes.
from gemma_qat.runs import latest_save

# One layer after another, before the loop.
from gemma_qat.train.blockwise import BlockwiseConfig, reconstruct
from gemma_qat.train.codes import code_report
from gemma_qat.train.config import TrainConfig
from gemma_qat.train.distributed import is_first, join, refuse_apart
from gemma_qat.train.loop import Trained, train
from gemma_qat.train.lora import LoraConfig, add_adapters

# What is minimized, and how.
from gemma_qat.train.losses import LOSSES, chunked, cross_entropy, divergence, logit_scores
from gemma_qat.train.optimizer import OptimizerConfig, make_optimizer

# What is told of a run.
from gemma_qat.train.points import Listener, Point
from gemma_qat.train.program import Program, program_of

# Learned scales.
from gemma_qat.train.rebuilt import Rebuilt, forget_layers
from gemma_qat.train.scales import settled, with_scales
from gemma_qat.train.signals import Stop, stop_on_signals

# One step.
from gemma_qat.train.state import Student, TrainState
from gemma_qat.train.step import Fixed, Objective, gradients, make_step

__all__ = [
    "LOSSES",
    "BlockwiseConfig",
    "Fixed",
    "Listener",
    "LoraConfig",
    "Objective",
    "OptimizerConfig",
    "Point",
    "Program",
    "Rebuilt",
    "Stop",
    "Student",
    "TrainConfig",
    "TrainState",
    "Trained",
    "add_adapters",
    "chunked",
    "code_report",
    "cross_entropy",
    "divergence",
    "forget_layers",
    "gradients",
    "is_first",
    "join",
    "latest_save",
    "logit_scores",
    "make_optimizer",
    "make_step",
    "program_of",
    "reconstruct",
    "refuse_apart",
    "settled",
    "stop_on_signals",
    "train",
    "with_scales",
]
