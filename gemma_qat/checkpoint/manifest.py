"""What a checkpoint is, in JSON: kind, model, recipe, and the plan of every quantized site."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from gemma_qat.errors import unknown
from gemma_qat.models import Fitted, ModelConfig, declare
from gemma_qat.nn.rope import Rope
from gemma_qat.nn.shapes import ExpertsShape
from gemma_qat.quant import Plans
from gemma_qat.quant.recipe_json import plan_from_json, to_json

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

        Raises: KeyError, TypeError, AttributeError or ValueError when it is not one.
        """
        if raw["version"] != VERSION:
            raise KeyError(f"version {raw['version']}; this program reads {VERSION}")
        if raw["kind"] not in get_args(Kind):
            raise unknown("kind", str(raw["kind"]), get_args(Kind))
        config = dict(raw["config"])
        config["layer_kinds"] = tuple(config["layer_kinds"])
        config["local_rope"] = Rope(**config["local_rope"])
        config["global_rope"] = Rope(**config["global_rope"])
        if config["experts"] is not None:
            config["experts"] = ExpertsShape(**config["experts"])
        plans = {path: plan_from_json(plan, path) for path, plan in raw["plans"].items()}
        manifest = cls(
            kind=raw["kind"],
            config=ModelConfig(**config),
            recipe=raw["recipe"],
            plans=plans,
            step=raw["step"],
            imported=raw.get("imported", False),
            origin=Origin(**raw["origin"]) if "origin" in raw else None,
        )
        manifest._check()
        return manifest

    def _check(self) -> None:
        if (self.recipe is None) != (self.kind == "float"):
            raise ValueError(f"recipe {self.recipe} in a {self.kind} checkpoint")
        for path in self.plans.keys() - declare(self.config).keys():
            raise ValueError(f"a plan for {path}, which {self.config.name} does not have")
