"""What every exporter is given: codes, scales and floats by checkpoint path, never masters.

An exporter moves bits. Whatever it writes comes from the codes and scales in an `Artifact`; it has
no way to quantize anything again, because the weights the codes were made from are not here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from gemma_qat.checkpoint.beside import Beside
from gemma_qat.errors import InputError, nearest
from gemma_qat.models.config import ModelConfig
from gemma_qat.models.declare import declare
from gemma_qat.models.fit import uncalibrated
from gemma_qat.models.leaves import static_scale_paths
from gemma_qat.numerics import QArray
from gemma_qat.quant.plan import Plans


@runtime_checkable
class Vocabulary(Protocol):
    """A vocabulary, as `data.Tokenizer` is one; an id of -1 means there is none."""

    def pieces(self) -> Sequence[tuple[str, float, str]]:
        """Returns (piece, score, kind) of every id in order.

        Kinds: normal, unknown, control, user_defined, byte.
        """
        ...

    def merges(self) -> Sequence[tuple[str, str]]:
        """Returns the pairs of pieces that join, the first one first; none unless it is byte-pair encoding."""
        ...

    @property
    def bos_id(self) -> int:
        """Id that starts a document."""
        ...

    @property
    def eos_id(self) -> int:
        """Id that ends a document."""
        ...

    @property
    def pad_id(self) -> int:
        """Id of padding."""
        ...

    @property
    def unk_id(self) -> int:
        """Id of the unknown piece."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """A quantized model ready to be written: every declared array once, quantized or in float.

    Shapes: `floats` and the codes have the shapes `models.declare` gives; paths such as
        `layers/17/attn/q/kernel`.
    Raises: InputError when an array is missing, unknown, misshaped, or on another grid than its
        plan says.
    """

    config: ModelConfig
    recipe: str
    plans: Plans
    quantized: dict[str, QArray]
    floats: dict[str, Any]
    """Arrays that convert to float32 exactly: norms, scalars, and sites without a plan."""
    tokenizer: Vocabulary | None = None
    chat_template: str | None = None
    """How conversations become text, in Jinja."""
    beside: Beside = Beside()
    """What travels with the checkpoint."""
    imported: bool = False
    """Whether static scales of 0 mean identity, as in a checkpoint from elsewhere."""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What it was made of, for people: kind and step of the checkpoint, its digest, the config of its run."""

    def __post_init__(self) -> None:
        shapes = {path: parameter.shape for path, parameter in declare(self.config).items()}
        kept = {path: shape for path, shape in shapes.items() if path not in self.plans}
        kept |= dict.fromkeys(static_scale_paths(self.plans), (1,))
        _same_names("quantized", self.quantized, self.plans)
        _same_names("floats", self.floats, kept)
        for path, array in (self.quantized | self.floats).items():
            expected = (shapes | kept)[path]
            if tuple(array.shape) != expected:
                raise InputError(f"{path}: shape {tuple(array.shape)} given, {expected} expected")
        if not self.imported:
            self._refuse_uncalibrated()
        for path, q in self.quantized.items():
            if q.grid != self.plans[path].weight:
                raise InputError(
                    f"{path}: codes on {q.grid} given, the plan says {self.plans[path].weight}"
                )

    def _refuse_uncalibrated(self) -> None:
        missing = uncalibrated(self.floats, self.plans)
        if missing:
            raise InputError(
                f"{missing[0]}: not calibrated, it saw no data ({len(missing)} of "
                f"{len(static_scale_paths(self.plans))} static scales are 0); run gemma-qat calibrate first"
            )


def _same_names(part: str, given: Any, expected: Any) -> None:
    unknown = [path for path in given if path not in expected]
    missing = [path for path in expected if path not in given]
    if unknown:
        close = nearest(unknown[0], missing or expected)
        hint = f" (nearest: {close})" if close else ""
        raise InputError(f"{part}: {len(unknown)} unknown arrays, first {unknown[0]!r}{hint}")
    if missing:
        raise InputError(f"{part}: {len(missing)} arrays missing, first {missing[0]!r}")
