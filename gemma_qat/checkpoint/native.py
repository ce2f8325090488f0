"""Our own checkpoints: float masters, QAT masters with their codes, and packed exports.

Promise: every save of a quantized model stores, beside the masters, the codes and scales that the jitted training
quantizer gives for those very masters on the training device. Exporters and decoding read only these.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gemma_qat.checkpoint.appear import appearing
from gemma_qat.checkpoint.beside import Beside
from gemma_qat.checkpoint.manifest import Manifest
from gemma_qat.checkpoint.stacked import read_stacked
from gemma_qat.checkpoint.store import (
    check_arrays,
    packed_arrays,
    read_manifest,
    restore_arrays,
    save_arrays,
    write_json,
)
from gemma_qat.errors import InputError
from gemma_qat.models import (
    Fitted,
    Gemma4,
    ModelConfig,
    RunOptions,
    abstract_parameters,
    float_parameters,
    layer_shardings,
    quantize_parameters,
    stack_layers,
)
from gemma_qat.numerics import PackedArray, QArray, pack
from gemma_qat.sharding import Placement


def save_model(
    directory: Path,
    parameters: Mapping[str, Any],
    model: ModelConfig | Fitted,
    *,
    step: int = 0,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
    data: Any = None,
) -> None:
    """Writes a float or QAT checkpoint: masters and, for a fitted recipe, the codes training sees for them.

    `extra` are further parts by name (`optimizer`), `data` goes to data.json.
    """
    with appearing(directory) as temporary:
        save_arrays(temporary / "parameters", parameters)
        if isinstance(model, Fitted):
            save_arrays(temporary / "quantized", codes_of(parameters, model))
        for name, part in (extra or {}).items():
            save_arrays(temporary / name, part)
        if data is not None:
            write_json(temporary / "data.json", data)
        write_json(temporary / "manifest.json", manifest_of(model, step).to_json())


def manifest_of(model: ModelConfig | Fitted, step: int) -> Manifest:
    """Returns the manifest of a float or QAT checkpoint after `step` updates."""
    if isinstance(model, ModelConfig):
        return Manifest(kind="float", config=model, recipe=None, plans={}, step=step)
    return Manifest(
        kind="qat", config=model.config, recipe=model.recipe, plans=model.plans, step=step,
        imported=model.imported,
    )  # fmt: skip


def codes_of(parameters: Mapping[str, Any], fitted: Fitted) -> dict[str, Any]:
    """Returns the packed words and scales of every planned site by path: what `quantized/` holds.

    Exactness: codes and scales of the jitted training quantizer; packing moves bits only.
    """
    return _packed(quantize_parameters(parameters, fitted))


@jax.jit
def _packed(quantized: dict[str, QArray]) -> dict[str, Any]:
    return packed_arrays({path: pack(q) for path, q in quantized.items()})


def save_packed(
    directory: Path,
    quantized: Mapping[str, QArray],
    floats: Mapping[str, Any],
    fitted: Fitted,
    verify: Callable[[Path], None] | None = None,
    *,
    imported: bool = False,
    beside: Beside = Beside(),
) -> None:
    """Writes a packed checkpoint: words and scales of planned sites, the rest in float, no masters.

    `beside` goes along; `imported` says that static scales of 0 mean identity. `verify` is called with
    the complete directory before it appears under its name.
    """
    with appearing(directory) as temporary:
        save_arrays(temporary / "parameters", floats)
        save_arrays(temporary / "quantized", _packed(dict(quantized)))
        manifest = Manifest(
            kind="packed", config=fitted.config, recipe=fitted.recipe, plans=fitted.plans,
            imported=imported or fitted.imported,
        )  # fmt: skip
        write_json(temporary / "manifest.json", manifest.to_json())
        beside.keep(temporary)
        if verify:
            verify(temporary)


def save_static_scales(directory: Path, scales: Mapping[str, Any], out: Path) -> None:
    """Writes the checkpoint at `directory` to `out` (it may be the same) with other static scales; all else stays.

    Raises: ValueError naming a scale the checkpoint has no place for.
    """
    _, parameters = load_parameters(directory)
    for path in scales.keys() - parameters.keys():
        raise ValueError(f"{path}: {directory} has no such scale")
    with appearing(out) as temporary:
        shutil.copytree(directory, temporary, dirs_exist_ok=True)
        shutil.rmtree(temporary / "parameters")
        save_arrays(temporary / "parameters", {**parameters, **scales})


def load_parameters(
    directory: Path, placement: Placement | None = None
) -> tuple[Manifest, dict[str, Any]]:
    """Returns the manifest and the arrays of `parameters/`: masters, or what a packed checkpoint keeps in float.

    With a placement every device reads its own part.
    Raises: FileNotFoundError; InputError naming the part that cannot be restored.
    """
    manifest = read_manifest(directory)
    abstract = _abstract(manifest)
    if placement is not None:
        where = layer_shardings(manifest.config, manifest.plans, placement.mesh, placement.preset)
        abstract = {path: _lying(leaf, where[path]) for path, leaf in abstract.items()}
    return manifest, restore_arrays(directory / "parameters", abstract)


def _abstract(manifest: Manifest) -> dict[str, Any]:
    abstract = abstract_parameters(manifest.config, manifest.plans)
    return float_parameters(abstract, manifest.fitted) if manifest.kind == "packed" else abstract


def check_arrays_of(directory: Path) -> Manifest:
    """Returns the manifest of a checkpoint of which every array is there in its shape; none is read.

    Raises: FileNotFoundError; InputError naming what is missing or of another shape.
    """
    manifest = read_manifest(directory)
    check_arrays(directory / "parameters", _abstract(manifest))
    if manifest.kind != "float":
        check_arrays(directory / "quantized", packed_arrays(abstract_packed(manifest)))
    return manifest


def _lying(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def load_quantized(
    directory: Path, placement: Placement | None = None
) -> tuple[Manifest, dict[str, QArray]]:
    """Returns the manifest and the stored codes and scales of every planned site, unpacked.

    With a placement every device reads and unpacks its own part.
    Raises: FileNotFoundError; InputError when the checkpoint is a float one or cannot be restored.
    """
    manifest, packed = _load_packed(directory, placement)
    unpack = jax.jit(PackedArray.unpack)
    return manifest, {path: unpack(array) for path, array in packed.items()}


def _load_packed(
    directory: Path, placement: Placement | None = None
) -> tuple[Manifest, dict[str, PackedArray]]:
    manifest = read_manifest(directory)
    if manifest.kind == "float":
        raise InputError(
            f"{directory}: a float checkpoint, no codes in it; quantize or train it first"
        )
    abstract = abstract_packed(manifest)
    if placement is not None:
        where = layer_shardings(
            manifest.config, manifest.plans, placement.mesh, placement.preset, packed=True
        )
        abstract = {
            path: jax.tree.map(_lying, array, where[path]) for path, array in abstract.items()
        }
    arrays = restore_arrays(directory / "quantized", packed_arrays(abstract))
    packed = {}
    for path, array in abstract.items():
        parts = {"words": arrays[f"{path}/words"], "scale": arrays[f"{path}/scale"]}
        packed[path] = PackedArray(
            grid=array.grid, shape=array.shape, reduced=array.reduced, **parts
        )
    return manifest, packed


def abstract_packed(manifest: Manifest) -> dict[str, PackedArray]:
    """Returns the packed form of every planned site, as shapes; allocates nothing."""
    fitted = manifest.fitted

    def make(parameters: dict[str, Any]) -> dict[str, PackedArray]:
        quantized = quantize_parameters(parameters, fitted)
        return {path: pack(q) for path, q in quantized.items()}

    return jax.eval_shape(make, abstract_parameters(fitted.config, fitted.plans))


def load_model(
    directory: Path,
    options: RunOptions = RunOptions(),
    *,
    packed: bool | None = None,
) -> Gemma4:
    """Returns the model of a checkpoint directory.

    A float checkpoint gives a float model, a QAT one its fake-quantized masters, a packed one packed weights; `packed`
    True reads a QAT checkpoint's stored codes instead of its masters.
    """
    manifest, parameters = load_parameters(directory)
    if manifest.kind == "packed" or (packed and manifest.kind == "qat"):
        plans, config = manifest.plans, manifest.config
        arrays = read_stacked(directory / "quantized", abstract_packed(manifest), config, plans)
        floats = parameters
        if manifest.kind == "qat":
            floats = float_parameters(parameters, manifest.fitted)
        leaves = {path: jnp.asarray(leaf) for path, leaf in floats.items()}
        stacked = stack_layers(leaves, config, plans) | arrays
        return Gemma4(config, stacked, plans, options)
    return Gemma4.from_parameters(manifest.config, parameters, manifest.plans, options)
