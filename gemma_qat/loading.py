"""Models from checkpoints of any kind that is read."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from gemma_qat.checkpoint.native import load_model
from gemma_qat.checkpoint.store import read_manifest
from gemma_qat.convert import convert, open_source
from gemma_qat.errors import InputError, unknown
from gemma_qat.models import (
    Gemma4,
    ModelConfig,
    RunOptions,
    check_integer_sums,
    fit,
    laid_for_kernels,
    leaf_shardings,
)
from gemma_qat.numerics import PackedArray
from gemma_qat.quant import recipe_text
from gemma_qat.sharding import MeshConfig, Placement, make_mesh
from gemma_qat.start import read_float, resolve_checkpoint

PathLike = str | Path


def load(
    path: PathLike,
    dtype: str = "float32",
    recipe: str | None = None,
    mesh: MeshConfig | None = None,
    packed: bool = False,
    sums: str = "float",
) -> Gemma4:
    """Returns the model at `path`: a Hugging Face directory, a native checkpoint or a packed export.

    A QAT checkpoint gives its fake-quantized masters, which train on; with `packed` its stored codes, which are what is
    exported, and what the command line measures and decodes. `dtype` is that of activations. `recipe` fake-quantizes a
    float checkpoint on that recipe's grid, scales recomputed. `mesh` (a `MeshConfig`, over all devices) places leaves
    and activations as its preset says. `sums` "integer" multiplies packed weights with inputs of static scales by
    int32 sums of codes, as integer hardware does; "float" by the float dot that training has.
    Raises: FileNotFoundError; InputError in one line for anything that does not fit.
    """
    if sums not in ("float", "integer"):
        raise unknown("sums", sums, ("float", "integer"))
    options = RunOptions(dtype=_dtype(dtype), sums=sums)  # type: ignore[arg-type]
    directory = resolve_checkpoint(path)
    if (directory / "manifest.json").is_file() and recipe is None:
        model = load_model(directory, options, packed=packed)
    else:
        config, parameters = read_float(directory)
        if recipe is None:
            model = Gemma4.from_parameters(config, parameters, None, options)
        else:
            fitted = fit(config, recipe)
            model = Gemma4.from_parameters(
                fitted.config, fitted.adopt(parameters), fitted.plans, options
            )
    if sums == "integer":
        check_integer_sums(model, str(path))
    return laid_for_kernels(model if mesh is None else _placed(model, mesh, options))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named:
    """A checkpoint that a person named: its path, and the recipe on whose grid its floats are to be looked at."""

    path: str
    recipe: str | None = None

    @property
    def directory(self) -> Path:
        """Where it is.

        Raises: FileNotFoundError.
        """
        return resolve_checkpoint(self.path)

    @property
    def identity(self) -> str:
        """A digest of its files by name, size and time, and of what the recipe says."""
        where = self.directory
        files = [where] if where.is_file() else sorted(p for p in where.rglob("*") if p.is_file())
        said = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
        recipe = self.recipe and recipe_text(self.recipe)
        return hashlib.sha256(json.dumps([said, recipe]).encode()).hexdigest()

    def has_masters(self) -> bool:
        """Whether it is a QAT checkpoint of ours, with float masters beside its codes."""
        where = self.directory
        is_ours = (where / "manifest.json").is_file()
        return self.recipe is None and is_ours and read_manifest(where).kind == "qat"


def named(text: PathLike) -> Named:
    """Returns what `PATH` or `PATH+RECIPE` names; a path that is there is a path, whatever signs are in it.

    Raises: FileNotFoundError when no part before a `+` is a path.
    """
    whole = str(text)
    parts = whole.split("+")
    for count in range(len(parts), 0, -1):
        path = "+".join(parts[:count])
        if Path(path).exists():
            return Named(path=path, recipe="+".join(parts[count:]) or None)
    return Named(path=whole)


def config_of(directory: Path) -> ModelConfig:
    """Returns the config of a checkpoint; names and headers are read, no arrays.

    Raises: FileNotFoundError; InputError for a checkpoint that is broken.
    """
    if (directory / "manifest.json").is_file():
        return read_manifest(directory).config
    with open_source(directory) as source:
        return source.config


def checked(what: Named) -> ModelConfig:
    """Returns the config of a model that `load` can make of what was named; names and headers are read, no arrays.

    Raises: FileNotFoundError; InputError for a checkpoint that is broken, a recipe that is unknown or does not fit, or
        a recipe for what is quantized already.
    """
    directory = what.directory
    if (directory / "manifest.json").is_file():
        manifest = read_manifest(directory)
        config, is_float = manifest.config, manifest.kind == "float"
    else:
        with open_source(directory) as source:
            config, is_float = source.config, not source.plans
    if what.recipe is not None:
        if not is_float:
            raise InputError(
                f"{directory}: quantized already, a float checkpoint expected before +{what.recipe}"
            )
        fit(config, what.recipe)
    return config


@contextlib.contextmanager
def readable(what: Named) -> Iterator[Named]:
    """Gives a checkpoint that `load` reads: itself, or one of ours made for now of a quantized one of another format.

    Raises: FileNotFoundError; InputError for a checkpoint that is broken.
    """
    directory = what.directory
    is_quantized = False
    if not (directory / "manifest.json").is_file():
        with open_source(directory) as source:
            is_quantized = bool(source.plans)
    if not is_quantized:
        yield what
        return
    with tempfile.TemporaryDirectory(prefix="gemma_qat-") as folder:
        out = Path(folder, "converted")
        convert(directory, out=out, carry=False)
        yield dataclasses.replace(what, path=str(out))


def _placed(model: Gemma4, mesh: MeshConfig, options: RunOptions) -> Gemma4:
    placement, plans = Placement(make_mesh(mesh), mesh.preset), dict(model.plans)
    leaves = model.leaves()
    packed = any(isinstance(leaf, PackedArray) for leaf in leaves.values())
    where = leaf_shardings(model.config, plans, placement.mesh, mesh.preset, packed=packed)
    return Gemma4(model.config, jax.device_put(leaves, where), plans, options, placement)


def _dtype(name: str) -> str:
    if name not in ("float32", "bfloat16"):
        raise InputError(f"dtype {name!r}: float32 or bfloat16 expected")
    return name
