"""How a run goes, as data: how long, on what loss, what trains, when rounding sets in, when to look and to save."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, get_args

from gemma_qat.errors import InputError, refuse_outside, unknown
from gemma_qat.train.hidden import Which
from gemma_qat.train.losses import LOSSES


class Phase(NamedTuple):
    """What is rounded in an update, and whether weights are still on their way to the grid."""

    quantize: Literal["all", "weights", "none"]
    blends: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run goes.

    Units: steps count updates; batch_size rows over all devices, taken `microbatches` parts at a time; save_every 0
    saves at the end only; of the saves the newest `keep` stay, and those at multiples of `keep_every` steps (0: none);
    loss_chunk is positions per chunk of the loss (0: all at once). Weights move to the grid over `blend_steps` steps
    from step `weights_from` on (0: at once); activations, keys and values are rounded from step `activations_from`,
    never before weights are; scales are those of the start until then. `only` are patterns over checkpoint paths: what
    trains (none: everything). `hidden_weight` times the relative squared error of hidden states (`hidden.py`) is added
    to the loss: of the states that `hidden` names. `watch_codes` reports how codes move, for one byte a weight.
    `tensorboard` writes metrics, and with `watch_codes` the use of every code, for TensorBoard.
    """

    steps: int = 1000
    batch_size: int = 8
    microbatches: int = 1
    loss: str = "ce"
    seed: int = 0
    log_every: int = 20
    save_every: int = 0
    keep: int = 2
    keep_every: int = 0
    loss_chunk: int = 0
    weights_from: int = 0
    blend_steps: int = 0
    activations_from: int = 0
    only: tuple[str, ...] = ()
    hidden_weight: float = 0.0
    hidden: Which = "layers"
    watch_codes: bool = True
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise unknown("loss", self.loss, LOSSES)
        if self.hidden not in get_args(Which):
            raise unknown("train.hidden", self.hidden, get_args(Which))
        for name in ("steps", "batch_size", "microbatches", "log_every", "keep"):
            refuse_outside(f"train.{name}", getattr(self, name), 1)
        for name in (
            "hidden_weight",
            "seed",
            "save_every",
            "keep_every",
            "loss_chunk",
            "weights_from",
            "blend_steps",
            "activations_from",
        ):
            refuse_outside(f"train.{name}", getattr(self, name), 0)
        if self.batch_size % self.microbatches:
            raise InputError(
                f"train.microbatches={self.microbatches} does not divide train.batch_size={self.batch_size}"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether there is something to learn from a float model, beside the text."""
        return bool(self.asks_for_teacher)

    @property
    def asks_for_teacher(self) -> str:
        """What does, as one types it (`train.loss=kl`); empty where nothing does."""
        if LOSSES[self.loss].has_teacher:
            return f"train.loss={self.loss}"
        return f"train.hidden_weight={self.hidden_weight:g}" if self.hidden_weight else ""

    def check_length(self, length: int) -> None:
        """Refuses rows of `length` positions that the chunks of the loss do not fill evenly.

        Raises: InputError.
        """
        if length % (min(self.loss_chunk, length) or length):
            raise InputError(
                f"train.loss_chunk={self.loss_chunk} does not divide rows of {length} positions"
            )

    def phase(self, step: int) -> Phase:
        """Returns what is rounded in the update that follows `step` updates."""
        on_grid = self.weights_from + self.blend_steps
        if step < self.weights_from:
            return Phase("none", False)
        if step < on_grid:
            return Phase("weights", True)
        return Phase("weights" if step < self.activations_from else "all", False)
