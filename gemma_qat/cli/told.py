"""What `gemma-qat train` says: what it was asked for and by whom, where it runs, and a line a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gemma_qat.redaction import redacted, shown

if TYPE_CHECKING:
    from gemma_qat.config import ExperimentConfig
    from gemma_qat.train import Point

GIB = 2**30


def asked_for(
    source: str, base: ExperimentConfig, config: ExperimentConfig, everything: bool
) -> Iterator[str]:
    """Yields the config with the origin of every value: those that are no defaults, or all.

    `base` is the config as the file `source` gave it, `config` with overlays.
    """
    from gemma_qat.config import provenance

    rows = provenance(base, config)
    shown = [row for row in rows if everything or row[2] != "default"]
    yield f"config {source}"
    widths = [max(len(text) for text in column) for column in zip(*map(_texts, shown), strict=True)]
    for row in shown:
        path, value, origin = _texts(row)
        yield f"  {path:<{widths[0]}}  {value:<{widths[1]}}  {origin}"
    if len(shown) < len(rows):
        yield f"  {len(rows) - len(shown)} more as by default: --show-config"


def _texts(row: tuple[str, Any, str]) -> tuple[str, str, str]:
    path, value, origin = row
    said = shown(value) if isinstance(value, str) and value else redacted(repr(value))
    return path, said, origin


def where_it_runs(config: ExperimentConfig) -> Iterator[str]:
    """Yields devices and mesh, the model's parameters, and the memory that a step is going to take of one device.

    Raises: InputError when the config and the devices do not fit together.
    """
    import jax

    from gemma_qat.models import parameter_count
    from gemma_qat.plan import forecast
    from gemma_qat.sharding import make_mesh
    from gemma_qat.start import workload_of

    mesh = make_mesh(config.mesh)
    work = workload_of(config)
    parts = forecast(work, mesh)
    device = jax.local_devices()[0]
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    mesh_said = f"mesh {config.mesh.preset}: {sizes}" if sizes else "no mesh"
    yield f"devices {mesh.size} x {device.device_kind}{processes}, {mesh_said}"
    rows = f"{config.train.batch_size} rows of {config.data.length} tokens a step"
    yield (
        f"model {config.model} as {work.recipe}: {_count(parameter_count(work.config))} parameters, {rows}"
    )
    yield _memory(parts, (device.memory_stats() or {}).get("bytes_limit"))


def _memory(parts: Mapping[str, float], available: int | None) -> str:
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    said = ", ".join(f"{name} {size_said(size)}" for name, size in largest)
    of_all = "" if available is None else f" of {size_said(available)}"
    total = sum(parts.values())
    doubt = "; it may not fit" if available is not None and total > available else ""
    return f"memory about {size_said(total)}{of_all} a device (estimated; {said}){doubt}"


def line_of(point: Point, devices: int) -> str:
    """Returns a report in one line: speed over all devices divided by them, and of the metrics those there are.

    Units: seconds a step; 1 TFLOP is 1e12 model FLOPs.
    """
    found = point.metrics
    parts = {
        "seconds": lambda x: f"{x:.3g} s",
        "model_flops_per_second": lambda x: f"{x / devices / 1e12:.3g} TFLOP/s/device",
        "tokens_per_second": lambda x: f"{_count(x / devices)} tokens/s/device",
        "mfu": lambda x: f"MFU {x:.1%}",
        "loss": lambda x: f"loss {x:.4g}",
        "kl": lambda x: f"KL {x:.3g}",
        "agree": lambda x: f"same-top {x:.1%}",
        "flipped": lambda x: f"flipped {x:.2%}",
    }
    said = [text(found[name]) for name, text in parts.items() if name in found]
    step = f"step {point.step:>{len(str(point.steps))}}/{point.steps}"
    return "  ".join([step, *(text.replace("%", " %") for text in said)])


def _count(x: float | int) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if x >= unit:
            return f"{x / unit:.3g}{letter}"
    return f"{x:.3g}"


def size_said(size: float | int) -> str:
    """Returns bytes for people."""
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"
