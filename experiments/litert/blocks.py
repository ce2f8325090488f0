"""A model, or one block of it, in LiteRT, with the codes around every product."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_qat.export import Artifact
from gemma_qat.export.litert.convert import converted
from gemma_qat.export.litert.file import write
from gemma_qat.export.litert.graph import Lengths, cache_shapes, owners, static_cache
from gemma_qat.export.litert.graph import leaves as leaves_of
from gemma_qat.export.litert.quantize import joined
from gemma_qat.export.litert.run import interpreter
from gemma_qat.export.litert.stored import Stored, stored
from gemma_qat.models import Gemma4
from gemma_qat.nn.attention import Attention, Context
from gemma_qat.nn.feedforward import FeedForward
from gemma_qat.nn.module import nest
from gemma_qat.quant import scale_path

Codes = dict[str, np.ndarray]
"""int8 codes [T, features] around every product: NAME/input, NAME/output."""


class Ours:
    """A model of ours, listened to; compiled once for each length."""

    def __init__(self, model: Gemma4, floats: Mapping[str, Any]) -> None:
        self._floats = floats

        @jax.jit
        def forward(tokens: jax.Array) -> dict[str, jax.Array]:
            taps: dict[str, Any] = {}
            hidden, _ = model.hidden(tokens, taps=taps)
            model.logits(hidden, taps)
            ends = ("input_scale", "output_scale")
            return {name: x for name, x in taps.items() if name.endswith(ends)}

        self._forward = forward

    def __call__(self, tokens: np.ndarray) -> tuple[dict[str, np.ndarray], Codes]:
        """Returns of one row (what static scales round, before it is rounded, the codes that it becomes)."""
        values = {name: np.asarray(x) for name, x in self._forward(tokens[None]).items()}
        codes = {}
        for name, x in values.items():
            scale = np.asarray(self._floats[name], np.float32)
            path, suffix = name.removesuffix("_scale").rsplit("_", 1)
            rounded = np.clip(np.round(x.astype(np.float32) * (1 / scale)), -128, 127)
            codes[f"{path}/{suffix}"] = rounded.astype(np.int8).reshape(len(tokens), -1)
        return values, codes


def theirs(path: Path, lengths: Lengths, config: Any, tokens: np.ndarray) -> Codes:
    """Returns the codes of one row of a model that was written with `taps`, one `decode` a token."""
    run = interpreter(path, threads=2).get_signature_runner("decode")
    shapes = cache_shapes(config, lengths.slots(config))
    caches = {name: np.zeros(shape, np.int8) for name, shape in shapes.items()}
    seen = []
    for position, token in enumerate(tokens):
        given = {
            "tokens": np.array([[token]], np.int32),
            "input_pos": np.array([position], np.int32),
        }
        out = run(**given, **caches)
        caches = {name: out.pop(name) for name in caches}
        del out["logits"]
        seen.append({name: x.reshape(-1) for name, x in out.items()})
    return {name: np.stack([one[name] for one in seen]) for name in seen[0]}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Single blocks of an artifact as LiteRT models, written into a folder one after the other."""

    artifact: Artifact
    folder: Path

    def feed_forward(self, layer: int, z: np.ndarray) -> Codes:
        """Returns the codes of a layer's feed-forward of an input [1, T, D]."""

        def block(given: dict[str, Any]) -> jax.Array:
            tree = nest(leaves_of(self.artifact.config, given))["layers"][str(layer)]
            return FeedForward(tree["ffn"], {})(given["x"])

        return self._codes(layer, "ffn", block, {"x": z})

    def attention(self, layer: int, h: np.ndarray) -> Codes:
        """Returns the codes of a layer's attention, which has keys and values of its own, of an input [1, T, D]."""
        config, number = self.artifact.config, owners(self.artifact.config).index(layer)
        names = [f"kv_cache_{kind}_{number}" for kind in "kv"]
        shapes = cache_shapes(config, h.shape[1])
        caches = {name: np.zeros(shapes[name], np.int8) for name in names}
        positions = np.arange(h.shape[1], dtype=np.int32)

        def block(given: dict[str, Any]) -> jax.Array:
            tree = nest(leaves_of(config, given))["layers"][str(layer)]
            context = Context(
                given["input_pos"][None], jnp.ones((1, h.shape[1]), jnp.int32), padded=False
            )
            cache = static_cache(given, given, layer, number)
            return Attention(config.layer_shape(layer), tree["attn"], {})(
                given["x"], context, None, cache
            )[0]

        return self._codes(layer, "attn", block, {"x": h, "input_pos": positions, **caches})

    def _codes(
        self,
        layer: int,
        part: str,
        block: Callable[[dict[str, Any]], jax.Array],
        inputs: dict[str, np.ndarray],
    ) -> Codes:
        whole = self.artifact
        sites = stored(whole.config, whole.plans, whole.quantized, whole.floats)
        used = {
            name: site for name, site in sites.items() if name.startswith(f"layers/{layer}/{part}/")
        }
        others = {name: jnp.zeros(site.shape) for name, site in sites.items() if name not in used}
        names = [*inputs, *used]

        def flat(*values: jax.Array) -> jax.Array:
            return block(others | dict(zip(names, values, strict=True)))

        structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs.values()]
        structs += [jax.ShapeDtypeStruct(site.shape, jnp.float32) for site in used.values()]
        text = jax.jit(flat, keep_unused=True).lower(*structs).as_text(dialect="stablehlo")
        model = joined([converted(text, "block", names, ["y"])], used, taps=True)
        file = self.folder / f"{part}.{layer}.tflite"
        write(file, model, used)
        out = interpreter(file, threads=2).get_signature_runner("block")(**inputs)
        length = inputs["x"].shape[1]
        return {name: x.reshape(length, -1) for name, x in out.items() if name != "y"}


def exact_products(
    codes: Codes, sites: Mapping[str, Stored], artifact: Artifact
) -> dict[str, np.ndarray]:
    """Returns, by matrix, by how many steps LiteRT's outputs differ from fake-quantized products of its own inputs."""
    found = {}
    for path, q in artifact.quantized.items():
        if f"{path}/input" not in codes:
            continue
        steps = [
            np.asarray(artifact.floats[scale_path(path, name)], np.float32)
            for name in ("input_scale", "output_scale")
        ]
        weight = np.moveaxis(np.asarray(q.codes), q.reduced, range(-len(q.reduced), 0))
        weight = weight.reshape(-1, codes[f"{path}/input"].shape[-1]).astype(np.float32)
        weight = weight * np.asarray(sites[path].scale)[:, None]
        product = (codes[f"{path}/input"].astype(np.float32) * steps[0]) @ weight.T
        expected = np.clip(np.round(product * (1 / steps[1])), -128, 127)
        found[path] = codes[f"{path}/output"].astype(np.int32) - expected.astype(np.int32)
    return found
