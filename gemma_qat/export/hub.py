"""A directory as the hub has them: tensors, config, tokenizer, model card, and what the export was made of.

    model.safetensors        or shards with an index
    config.json              the decoder, and how it is quantized
    README.md                the model card
    gemma_qat.json           recipe, plans, step, versions, digests; says that the directory is an export of ours
    tokenizer.json, ...      what lay beside the source

The directory appears by rename when all of it is written and has been read back and compared; until then, and for good
when anything is wrong, what was there before stays.
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from gemma_qat.checkpoint.appear import appearing
from gemma_qat.checkpoint.safetensors_file import Tensor
from gemma_qat.checkpoint.source import Leaf, Reading, Source
from gemma_qat.checkpoint.store import write_json
from gemma_qat.errors import unknown
from gemma_qat.export.artifact import Artifact
from gemma_qat.export.card import model_card
from gemma_qat.export.check import compare
from gemma_qat.export.hub_config import beside_towers, config_json
from gemma_qat.export.hub_rows import reduced_size
from gemma_qat.export.tensor_files import SHARD_BYTES, write_tensors
from gemma_qat.models.declare import declare
from gemma_qat.numerics import Grid
from gemma_qat.quant import Plan, to_json

MARKER = "gemma_qat.json"
"""The file that says that a directory is an export of this project."""

_FLOATS = {"float32": "F32", "bfloat16": "BF16"}
_TABLES = ("float", "packed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubOptions:
    """How a hub directory is written, beside what is in the artifact."""

    dtype: str = "float32"
    """Of arrays that stay in float: float32 as they are, or bfloat16, rounded."""
    tables: str = "float"
    """Of quantized tables that are looked up, in compressed-tensors: the values of their codes (float), or the codes
    (packed)."""
    shard_bytes: int = SHARD_BYTES
    beside: Sequence[Path] = ()
    """Files to copy: tokenizer, chat template, generation config."""
    towers: Sequence[Leaf] = ()
    """Tensors of other models (vision, audio) for beside a float decoder, under the names the hub has for them."""
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Those that came with the checkpoint and are not written, by name, and what they are; the card says so."""
    report: Mapping[str, Any] | None = None
    """A report.json of `evals`, whose figures go to the model card."""
    progress: Callable[[int, int], object] | None = None

    @property
    def stored(self) -> str:
        """The dtype by its name in safetensors.

        Raises: InputError for another one than float32 and bfloat16.
        """
        if self.dtype not in _FLOATS:
            raise unknown("dtype", self.dtype, _FLOATS)
        return _FLOATS[self.dtype]

    def __post_init__(self) -> None:
        if self.tables not in _TABLES:
            raise unknown("form of tables", self.tables, _TABLES)


def write_directory(
    artifact: Artifact,
    out: Path,
    tensors: Sequence[Tensor],
    *,
    format: str,
    options: HubOptions,
    verify: Callable[[Path], Mapping[str, int]],
    quantization: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, int]:
    """Writes a hub directory, lets `verify` read it, and only then lets it appear as `out`.

    `notes` are paragraphs for the model card. Returns {"bytes", "tensors"} and what `verify` counted.
    Raises: InputError when `out` is not an export of ours; whatever `verify` raises.
    """
    config = config_json(artifact.config, options.stored)
    if options.towers:
        original = next((file for file in options.beside if file.name == "config.json"), Path())
        config = beside_towers(config, original)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    with appearing(out, MARKER) as temporary:
        digests = write_tensors(
            temporary, tensors, shard_bytes=options.shard_bytes, progress=options.progress
        )
        for file in options.beside:
            shutil.copyfile(file, temporary / file.name)
        write_json(temporary / "config.json", config)  # in the place of the source's own
        known = facts(artifact, format, options.dtype, digests, options.left_out)
        write_json(temporary / MARKER, known)
        card = model_card(
            artifact, format=format, facts=known, report=options.report, notes=notes,
            towers=len(options.towers),
        )  # fmt: skip
        (temporary / "README.md").write_text(card, "utf-8")
        counts = dict(verify(temporary))
        size = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
    return {"bytes": size, "tensors": len(tensors)} | {
        name: n for name, n in counts.items() if name != "tensors"
    }


def facts(
    artifact: Artifact, format: str, dtype: str, digests: Mapping[str, str],
    left_out: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Returns what an export says of itself: recipe, plans, where it came from, versions, digests of its files.

    Of the tensors `left_out`, by name, it counts how many there are of each kind.
    """
    packages = ("gemma_qat", "jax", "flax", "numpy", "safetensors")
    return {
        "format": format,
        "dtype": dtype,
        "recipe": artifact.recipe,
        "model": dataclasses.asdict(artifact.config),
        "plans": {path: to_json(plan) for path, plan in artifact.plans.items()},
        "source": dict(artifact.provenance),
        "left_out": dict(sorted(Counter(left_out.values()).items())),
        "sha256": dict(digests),
        "versions": {name: _version(name) for name in packages}
        | {"python": platform.python_version(), "platform": jax.default_backend()},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "run from its source tree"


def verify_source(artifact: Artifact, source: Source, where: Path) -> dict[str, int]:
    """Returns `compare` of an opened export, all differences zero.

    Raises: ValueError when the model, a plan, a code, a scale or a float is not the artifact's.
    """
    same = dataclasses.replace(source.config, name=artifact.config.name)
    if config_json(same) != config_json(artifact.config):
        raise ValueError(f"{where}: config.json describes another model than was written")
    declared = declare(artifact.config)
    for path in sorted(artifact.plans.keys() | source.plans.keys()):
        mine, found = artifact.plans.get(path), source.plans.get(path)
        size = reduced_size(declared[path])
        if mine is None or found is None or _essence(mine, size) != _essence(found, size):
            raise ValueError(f"{path}: plan {found} read, {mine} expected")
    counts = compare(artifact, Reading(source))
    wrong = {name: n for name, n in counts.items() if n and name != "tensors"}
    if wrong:
        said = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in wrong.items())
        raise ValueError(f"{where}: {said} among {counts['tensors']} arrays")
    return counts


def _essence(plan: Plan, reduced: int) -> tuple[Any, ...]:
    """What of a plan a file can say: not where scales came from, nor how they were trained."""
    grid: Grid = plan.weight
    kept = {name: (how.bits, how.per) for name, how in plan.activations.items()}
    return (grid.number.bits, grid.tiles(reduced), grid.scale_dtype, kept)
