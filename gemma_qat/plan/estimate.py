"""What a step needs and costs by arithmetic alone: where no compiler is at hand, and to prune a search.

Memory of one device, from shapes and their shardings (`eval_shape`; exact) and a formula (not exact):

    parameters, optimizer,
    teacher, batch          bytes of their shards
    gradients               as the parameters, float32
    ready weights           as the parameters, in the activation dtype: rounded, or narrowed
    working copies          the weights of one layer whole on every device, in the activation dtype, twice (the layer
                            in use and the next one on its way), and its gradient in float32
    kept activations        remat: the residual once per period; without: what every layer writes
    working activations     what one period's layers write (remat), or one layer's (without)
    loss                    3 float32 arrays [rows, chunk, V] (logits, probabilities, gradient), 2 more with a teacher
    hidden states           with train.hidden=layers: the residual after every layer of both models, and the gradient
                            of the student's, in the activation dtype

    a layer writes, per token: 8 D + 3 N H + 4 K H + 3 F, with experts X (2 D + 3 F_e) more, in the activation dtype,
    and scores and probabilities N T in float32 and once more in the activation dtype; a device's tokens are those of
    one microbatch

Time: FLOPs of the declared contractions (`declared_flops`) over peak; weights gathered for the forward and the backward
pass (once more with remat) and gradients scattered, for every microbatch, over the links of a whole torus, or over
NVLink and the network of nodes of GPUs (`Cluster.wire_seconds`); the larger of the two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_qat.models import flops_per_token, forward_flops_per_token, parameter_count
from gemma_qat.models.account import BACKWARD, forward_flops_by_role
from gemma_qat.models.leaves import groups_of
from gemma_qat.nn.shapes import LayerShape
from gemma_qat.plan.chips import Topology
from gemma_qat.plan.gpus import Cluster
from gemma_qat.plan.program import Workload, arguments, by_part
from gemma_qat.sharding import abstract_mesh, batch_sharding
from gemma_qat.train.state import Student

Place = Topology | Cluster
"""Where a step runs: a TPU slice, or nodes of GPUs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes of one device by part, and seconds of one step.

    Units: bytes; FLOPs and seconds per device and step.
    """

    parts: dict[str, float]
    flops: float
    wire_bytes: float
    compute_seconds: float
    wire_seconds: float

    @property
    def peak(self) -> float:
        """Bytes of all parts together."""
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        """Of one step, wires hidden behind arithmetic or the other way round."""
        return max(self.compute_seconds, self.wire_seconds)


def model_flops(workload: Workload) -> float:
    """Returns the model FLOPs of one step over all devices: the student's training, the teacher's forward pass."""
    per_token = flops_per_token(workload.config, workload.length)
    if workload.teacher is not None:
        per_token += forward_flops_per_token(workload.teacher, workload.length)
    return per_token * workload.tokens


_OUTSIDE = ("embed", "head", "per_layer_model_projection")
"""Roles of matrices that no period of layers holds."""


def declared_flops(workload: Workload) -> float:
    """Returns the FLOPs that a program of one step, over all devices, should have by the model's declarations.

    Forward, twice that backward, the teacher's forward; with remat the forward once more, but for what stands outside
    the periods of layers: the head and the projection to per-layer inputs. Scores of all pairs, masked ones too.
    `remat` "dots" and "offload" keep results of products: then it is an upper bound.
    """
    config, length = workload.config, workload.length
    forward = forward_flops_per_token(config, length, "full")
    per_token = (1 + BACKWARD) * forward
    if workload.options.remat != "none":
        roles = forward_flops_by_role(config, length)
        per_token += forward - sum(roles.get(role, 0.0) for role in _OUTSIDE)
    if workload.teacher is not None:
        per_token += forward_flops_per_token(workload.teacher, length, "full")
    return per_token * workload.tokens


def held_bytes(workload: Workload, topology: Place) -> dict[str, float]:
    """Returns the bytes on one device of what a step is given; it depends on the mesh, not on batch or remat.

    Raises: InputError when the mesh does not fit the topology.
    """
    mesh = abstract_mesh(workload.mesh, topology.devices)
    return {part: float(size) for part, size in by_part(arguments(workload, mesh)).items()}


def forecast(
    workload: Workload, mesh: Any, held: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Returns the bytes on one device of a step on a mesh (of devices, or of sizes alone), by part; the formulas above.

    Raises: InputError when the batch does not divide over the mesh.
    """
    if held is None:
        held = {name: float(n) for name, n in by_part(arguments(workload, mesh)).items()}
    return {**held, **_activations(workload, held, mesh)}


def estimate(
    workload: Workload, topology: Place, held: Mapping[str, float] | None = None
) -> Estimate:
    """Returns memory and time of a step by the formulas above; `held` spares finding `held_bytes` again.

    Raises: InputError when the mesh does not fit the topology.
    """
    mesh = abstract_mesh(workload.mesh, topology.devices)
    held = held_bytes(workload, topology) if held is None else held
    parts = forecast(workload, mesh, held)
    remat = workload.options.remat != "none"
    flops = declared_flops(workload) / topology.devices
    gathered, within = _wire_bytes(workload, mesh, remat)
    together = mesh.shape.get("tensor", 1) * mesh.shape.get("expert", 1)
    return Estimate(
        parts=parts, flops=flops, wire_bytes=gathered + within, compute_seconds=flops / topology.flops,
        wire_seconds=topology.wire_seconds(gathered, within, together),
    )  # fmt: skip


def _activations(workload: Workload, held: Mapping[str, float], mesh: Any) -> dict[str, float]:
    config, options = workload.config, workload.options
    width = np.dtype(options.dtype).itemsize
    rows, length = batch_sharding(mesh).shard_shape((workload.train.batch_size, workload.length))
    rows = math.ceil(rows / workload.train.microbatches)
    here = rows * length
    groups = groups_of(config, Student.of(workload.model).plans)
    layers = [_layer_bytes(shape, length, width) * here for shape in config.layer_shapes()]
    longest = max(len(group.period) for group in groups)
    period = max(sum(layers[i : i + longest]) for i in range(0, len(layers), longest))
    periods = sum(group.repeats for group in groups)
    residual = here * config.width * width
    chunk = workload.train.loss_chunk or length
    shards = mesh.shape.get("tensor", 1)
    logits = rows * min(chunk, length) * config.vocab_size * 4 / shards
    weights = parameter_count(config) / config.layers / shards
    if config.experts is not None:
        weights /= mesh.shape.get("expert", 1)
    found = {
        "gradients": held["parameters"],
        "ready weights": held["parameters"] * width / 4,
        "working copies": weights * (2 * width + 4),
        "kept activations": periods * residual if options.remat != "none" else sum(layers),
        "working activations": period if options.remat != "none" else max(layers),
        "loss": logits * (5 if workload.teacher is not None else 3),
    }
    if workload.train.hidden_weight and workload.train.hidden == "layers":
        found["hidden states"] = 3 * config.layers * residual
    return {part: float(size) for part, size in found.items()}


def _layer_bytes(shape: LayerShape, length: int, width: int) -> int:
    """Bytes that one layer writes per token."""
    heads, head = shape.query_heads, shape.head_width
    elements = 8 * shape.width + 3 * heads * head + 3 * shape.ffn_width
    elements += 0 if shape.shares_kv else 4 * shape.kv_heads * head
    if shape.experts is not None:
        elements += shape.experts.per_token * (2 * shape.width + 3 * shape.experts.width)
    return elements * width + heads * length * (4 + 4 + width)


def _wire_bytes(workload: Workload, mesh: Any, remat: bool) -> tuple[float, float]:
    """Bytes into one device and step: weights in the activation dtype with gradients in float32; residuals (tensor)."""
    over = mesh.shape["fsdp"] * mesh.shape["data"]
    if over < 2:
        return 0.0, 0.0
    width = np.dtype(workload.options.dtype).itemsize
    held = parameter_count(workload.config) / mesh.shape.get("tensor", 1)
    if workload.config.experts is not None:
        held /= mesh.shape.get("expert", 1)
    passes = 3 if remat else 2
    gathered = (passes * width + 4.0) * workload.train.microbatches
    if workload.teacher is not None:
        gathered += np.dtype(workload.teacher_dtype).itemsize * workload.train.microbatches
    tensor = mesh.shape.get("tensor", 1)
    within = 0.0
    if tensor > 1:
        rows = math.ceil(workload.train.batch_size / over)
        residual = rows * workload.length * workload.config.width * width
        within = 4 * passes * workload.config.layers * residual * (tensor - 1) / tensor
    return held * gathered * (over - 1) / over, within
