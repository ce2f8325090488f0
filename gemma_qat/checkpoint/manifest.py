"""What a checkpoint is, in JSON: kind, model, recipe, and the plan of every quantized site."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from gemma_qat.errors import InputError
from gemma_qat.models import Fitted, ModelConfig, declare
from gemma_qat.quant import Plans
from gemma_qat.quant.recipe_json import from_json, to_json

Kind = Literal["float", "qat", "packed"]
VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What a converted checkpoint was made of, and what of it is not here."""

    format: str
    """Of the source, as `convert` names it."""
    digests: Mapping[str, str]
    """SHA-256 of every array's bytes (C order, little endian) by path; of a quantized one `/codes` and `/scale`."""
    left: Mapping[str, str]
    """Tensors of the source that no parameter is made of, by their name there, and what they are."""
    carried: bool = False
    """Whether those of other models (vision, audio) are in `carried.safetensors`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the arrays beside it are."""

    kind: Kind
    config: ModelConfig
    recipe: str | None
    plans: Plans
    step: int = 0
    imported: bool = False
    """Whether it came from elsewhere: a static scale of 0 then means identity, not a site that was forgotten."""
    origin: Origin | None = None
    """Of a converted checkpoint."""

    @property
    def fitted(self) -> Fitted:
        """The recipe as it was resolved when this was saved.

        Raises: ValueError for a float checkpoint.
        """
        if self.recipe is None:
            raise ValueError("a float checkpoint has no recipe")
        return Fitted(
            config=self.config, recipe=self.recipe, plans=self.plans, imported=self.imported
        )

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-able form that `from_json` reads back equal."""
        plans = {path: to_json(plan) for path, plan in self.plans.items()}
        origin = {} if self.origin is None else {"origin": dataclasses.asdict(self.origin)}
        return {
            "version": VERSION,
            "kind": self.kind,
            "config": dataclasses.asdict(self.config),
            "recipe": self.recipe,
            "plans": plans,
            "step": self.step,
            "imported": self.imported,
            **origin,
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Manifest:
        """Returns the manifest of a parsed file.

        Raises: InputError naming the first key that is missing, unknown, of another type, or contradicts others.
        """
        if raw.get("version") != VERSION:
            raise InputError(f"version {raw.get('version')!r:.20}; this program reads {VERSION}")
        rest = {key: value for key, value in raw.items() if key != "version"}
        manifest: Manifest = from_json(rest, cls, "manifest")
        manifest._check()
        return manifest

    def _check(self) -> None:
        if (self.recipe is None) != (self.kind == "float"):
            raise ValueError(f"recipe {self.recipe} in a {self.kind} checkpoint")
        for path in self.plans.keys() - declare(self.config).keys():
            raise ValueError(f"a plan for {path}, which {self.config.name} does not have")
