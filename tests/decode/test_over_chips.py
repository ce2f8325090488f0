"""A decode step over four chips, by the TPU compiler, at the widths of 31B. Needs no TPU."""

from __future__ import annotations

from tpu_process import needs_compiler, printed

PROGRAM = """
import dataclasses, json, math
import jax, jax.numpy as jnp
from jax.experimental import topologies
from gemma_qat.compiled import collectives, parse
from gemma_qat.decode.generate import _step
from gemma_qat.decode.sampling import Sampling
from gemma_qat.models import (
    Gemma4, RunOptions, SIZES, abstract_parameters, fit, float_parameters, leaf_shardings, packed_model,
    quantize_parameters,
)
from gemma_qat.nn.module import split
from gemma_qat.sharding import MeshConfig, Placement, make_mesh, replicated

ROWS, LENGTH = 4, 64
whole = SIZES["31b"]
# Two periods of its ten: a scan over them is what a scan over ten is.
size = dataclasses.replace(whole, layer_kinds=whole.layer_kinds[:12])
fitted = fit(size, "q4_0")
mesh = MeshConfig(preset="decode", fsdp=1, tensor=4)
chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
placement = Placement(make_mesh(mesh, chips), mesh.preset)
there = replicated(placement.mesh)

def lies(tree, where):
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, where)

def leaves(masters):
    return packed_model(quantize_parameters(masters, fitted), float_parameters(masters, fitted), fitted).leaves()

shapes = jax.eval_shape(leaves, abstract_parameters(fitted.config, fitted.plans, "bfloat16"))
where = leaf_shardings(fitted.config, fitted.plans, placement.mesh, mesh.preset, packed=True)
model = Gemma4(fitted.config, lies(shapes, where), fitted.plans, RunOptions(dtype="bfloat16"), placement)
graph, state = split(model)
others = (jax.ShapeDtypeStruct((ROWS, 1), "int32"),) * 2 + (
    jax.eval_shape(lambda: model.empty_caches(ROWS, LENGTH)), jax.eval_shape(lambda: jax.random.key(0)))
others = lies(others, jax.tree.map(lambda _: there, others))
program = _step.lower(graph, state, Sampling(), *others).compile()
text = program.as_text()
module = parse(text)
floats = [math.prod(shape.dims) for part in module.computations.values() for one in part.values()
          for shape in one.shapes if shape.dtype in ("bf16", "f32")]
print(json.dumps({
    "kernels": {name: text.count(name + "/pallas_call") for name in ("packed_products", "packed_top")},
    "calls": text.count('"tpu_custom_call"'), "largest": max(floats),
    "moved": sorted({(one.kind, " ".join(map(str, one.shapes))) for one in collectives(module)}),
    "sums": sum(one.count for one in collectives(module) if one.kind == "all-reduce"),
}))
"""


@needs_compiler
def test_a_step_of_31b_over_four_chips() -> None:
    """If it fails, chips send words to one another, or hold float weights, and a step is bound by that."""
    found = printed(PROGRAM)
    print(found)
    # A period of five local layers of q, k, v, o, gate, up, down and a global one whose values are its keys; the head.
    assert found["calls"] == 6 * 7 - 1 + 1
    assert found["kernels"]["packed_products"] == 41 and found["kernels"]["packed_top"] > 0
    # The table's rows once, then two sums a layer (o, down); of logits one a row and chip.
    assert found["moved"] == [
        ["all-gather", "f32[4,1,4]"], ["all-gather", "s32[4,1,4]"], ["all-reduce", "bf16[4,1,5376]"],
    ]  # fmt: skip
    assert found["sums"] == 1 + 2 * 12
    # The smallest part of a weight, 4 of the 16 heads of k: caches of 64 tokens are smaller.
    assert found["largest"] < 5376 * 4 * 256
