"""A model quantized layer by layer: what each layer sees, what is in memory, and what is on disk."""

import dataclasses
import gc
import weakref
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn_parameters

from gemma_qat.checkpoint.native import load_model, load_parameters, load_quantized
from gemma_qat.errors import InputError
from gemma_qat.models import Flow, Gemma4, Layerwise, declare, fit, initialize, size_named
from gemma_qat.numerics import Grid
from gemma_qat.ptq import METHODS, PtqConfig, batch_of, quantize_model, write_quantized
from gemma_qat.ptq.layer import LayerTask, Quantized
from gemma_qat.ptq.rtn import ROUNDINGS
from gemma_qat.ptq.stream import Stream, rows_of

SIZES = ("tiny_26b_a4b", "tiny_e2b", "tiny_e4b", "tiny_12b", "tiny_31b")


def _short(size, layers=2):
    """A narrow size of few layers: the first ones, of which E2B's last shares keys and values."""
    config = size_named(size)
    return dataclasses.replace(
        config, layer_kinds=config.layer_kinds[:layers], vocab_size=128, width=64,
        per_layer_vocab=128 if config.per_layer_width else 0, head_width=32, global_head_width=64,
        shared_kv_layers=1 if config.shared_kv_layers else 0,
    )  # fmt: skip


def _batches(vocab, count=2, rows=4, length=32):
    rng = np.random.default_rng(0)
    return [batch_of(rng.integers(0, vocab, (rows, length)), vocab) for _ in range(count)]


def _values(codes, floats):
    return {p: jnp.asarray(leaf) for p, leaf in floats.items()} | {
        p: q.dequantize() for p, q in codes.items()
    }


def test_a_layer_sees_what_the_quantized_ones_before_it_make():
    """If it fails, layers are calibrated on the float model's activations, or on rows of other tokens."""
    fitted = fit(_short("tiny_e2b", 3), "w4a8")
    parameters = initialize(fitted.config, 0)
    batches = _batches(fitted.config.vocab_size)
    behind = {}

    def by_rounding(task):
        codes = {
            n: ROUNDINGS["rtn"](task.leaves[n], p.weight, task.reduced[n])
            for n, p in task.plans.items()
        }
        changed = {"pre_ffn_norm/weight": 1.5 * task.leaves["pre_ffn_norm/weight"]}
        behind[task.index] = [flow.x for flow in task.outputs(codes, changed)]
        return Quantized(codes=codes, changed=changed)

    method = dataclasses.replace(METHODS["rtn"], layer=by_rounding)
    codes, floats = {}, {}
    for piece in Stream(
        parameters=parameters, fitted=fitted, method=method, config=PtqConfig(), batches=batches
    ).pieces():
        codes |= piece.codes
        floats |= piece.floats
    assert set(codes) == set(fitted.plans)
    # The whole model on the codes that were made.
    plans = {p: dataclasses.replace(plan, scales="learned") for p, plan in fitted.plans.items()}
    scales = {f"{p}_scale": q.scale.astype(jnp.float32) for p, q in codes.items()}
    model = Gemma4.from_parameters(fitted.config, _values(codes, floats) | scales, plans)
    forward = jax.jit(lambda b: model.hidden(b["tokens"], b["positions"], b["segments"])[0])
    for x, batch in zip(behind[2], batches, strict=True):
        found = x / np.sqrt((x**2).mean(-1, keepdims=True) + fitted.config.eps)
        apart = np.abs(found * np.asarray(floats["final_norm/weight"]) - forward(batch)).max(-1)
        # Two programs differ by 1e-7, which takes an activation of a few tokens over an edge of its int8 codes: there a
        # step of 1/127 shows. Without any rounding of activations every token is off by that much.
        assert np.median(apart) < 1e-5
        assert apart.max() < 0.05
    np.testing.assert_allclose(
        floats["layers/1/pre_ffn_norm/weight"], 1.5 * parameters["layers/1/pre_ffn_norm/weight"]
    )


def _kl(config, parameters, codes, floats, batch):
    @jax.jit
    def kl(leaves, others):
        p, q = (
            jax.nn.log_softmax(Gemma4.from_parameters(config, own)(jnp.asarray(batch["tokens"])))
            for own in (leaves, others)
        )
        return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))

    return float(kl(parameters, jax.jit(_values)(codes, floats)))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_gptq_keeps_more_of_the_model_than_searched_scales(size):
    """If it fails, a kind of layer (experts, shared or equal keys and values, per-layer inputs) is told wrong moments."""
    config = size_named(size)
    if config.experts:
        config = dataclasses.replace(config, layer_kinds=config.layer_kinds[:2])
    fitted = fit(config, "q4_0")
    parameters, batches = initialize(config, 1), _batches(config.vocab_size)
    heard = []
    kl = {}
    for method in ("mse", "gptq"):
        made = quantize_model(parameters, fitted, method, batches, heard=heard.append)
        kl[method] = _kl(config, parameters, *made, batches[0])
    assert kl["gptq"] < 0.9 * kl["mse"]
    told = [line for found in heard for line in found.coverage()]
    assert all("experts saw fewer than" in line for line in told)


def test_experts_that_few_tokens_chose_are_judged_by_all_tokens():
    """If it fails, moments of a handful of tokens (or of none) decide how an expert is rounded, and nobody hears of it."""
    rng = np.random.default_rng(0)
    sums = jnp.asarray(rng.uniform(1, 2, (3, 4)) * np.asarray([[100.0], [5.0], [0.0]]), jnp.float32)
    counts = jnp.asarray([100.0, 5.0, 0.0])

    class Told(Layerwise):
        def moments(self, index, leaves, flow, *, full, only=None):
            return {name: {"sum": sums, "count": counts} for name in only}

    empty = Flow(tokens=None, positions=None, segments=None, x=None)
    task = LayerTask(
        index=3, walk=Told(size_named("tiny_26b_a4b")), leaves={}, plans={}, reduced={},
        flows=[empty, empty],
    )  # fmt: skip
    names = ("experts/gate/kernel", "experts/up/kernel", "experts/down/kernel")
    seen, notes = task.seen(names, full=False)
    own = sums[0] / 100
    for name in names[:2]:
        np.testing.assert_allclose(seen[name].importance[0], own, rtol=1e-6)
        for expert in (1, 2):
            np.testing.assert_allclose(
                seen[name].importance[expert], jnp.sum(sums, 0) / 105, rtol=1e-6
            )
    np.testing.assert_allclose(seen[names[2]].importance[0], own, rtol=1e-6)
    np.testing.assert_array_equal(seen[names[2]].importance[1:], jnp.ones((2, 4)))
    down, gate = notes
    assert "layers/3/experts/gate/kernel: 2 of 3 experts saw fewer than 32 tokens" in gate
    assert down.endswith("equal importance")


class _Watched(np.ndarray):
    """An array whose end can be noticed."""


class Watched(Mapping):
    """Parameters that are made when asked for; knows which are alive, and how many bytes were at once at most."""

    def __init__(self, parameters, break_at=None):
        self.parameters, self.break_at = parameters, break_at
        self.alive, self.most, self.asked = {}, 0, []

    def __getitem__(self, path):
        if path == self.break_at:
            raise KeyboardInterrupt
        array = np.asarray(self.parameters[path]).copy().view(_Watched)
        if sum(self.alive.values()) + array.nbytes > self.most:
            gc.collect()
        key = len(self.asked)
        self.asked.append(path)
        self.alive[key] = array.nbytes
        weakref.finalize(array, self.alive.pop, key)
        self.most = max(self.most, sum(self.alive.values()))
        return array

    def __iter__(self):
        return iter(self.parameters)

    def __len__(self):
        return len(self.parameters)


@pytest.fixture
def little_garbage():
    """What is alive before a test is not looked through each time that it collects garbage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("method", ["rtn", pytest.param("gptq", marks=pytest.mark.slow)])
def test_memory_stays_near_a_layer_and_what_is_written_is_what_is_returned(
    tmp_path, method, little_garbage
):
    """If it fails, a model that is larger than memory cannot be quantized, or the file differs from the API."""
    config = dataclasses.replace(_short("tiny_12b"), layer_kinds=("sliding",) * 6, vocab_size=256)
    fitted = fit(config, "q4_0")
    parameters = {p: np.asarray(x) for p, x in drawn_parameters(config, 0).items()}
    batches = _batches(config.vocab_size) if method == "gptq" else None
    watched = Watched(parameters)
    write_quantized(tmp_path / "out", watched, fitted, method, batches)
    sizes = {path: leaf.nbytes for path, leaf in parameters.items()}
    layer = sum(size for path, size in sizes.items() if path.startswith("layers/0/"))
    largest = max(layer, *sizes.values())
    assert watched.most <= 1.1 * largest < 0.3 * sum(sizes.values())
    reads = [watched.asked.count(path) for path in fitted.plans]
    assert set(reads) == ({1} if method == "rtn" else {2})
    codes, floats = quantize_model(parameters, fitted, method, batches)
    _, stored = load_quantized(tmp_path / "out")
    assert set(stored) == set(codes)
    for path, q in codes.items():
        np.testing.assert_array_equal(stored[path].codes, q.codes)
        np.testing.assert_array_equal(stored[path].scale, q.scale)
    kept = load_parameters(tmp_path / "out")[1]
    for path in declare(config).keys() - codes.keys():
        np.testing.assert_array_equal(kept[path], floats[path])


def test_half_a_quantization_leaves_nothing(tmp_path, little_garbage):
    """If it fails, a directory that looks like a checkpoint has half the layers."""
    config = _short("tiny_12b")
    parameters = drawn_parameters(config, 0)
    broken = Watched(parameters, break_at="layers/1/attn/q/kernel")
    with pytest.raises(KeyboardInterrupt):
        write_quantized(tmp_path / "out", broken, fit(config, "q4_0"), "rtn")
    assert list(tmp_path.iterdir()) == []


def test_static_scales_are_calibrated_on_what_was_written(tmp_path):
    """If it fails, the mobile recipe by way of the disk differs from the one in memory, or its scales stay 0."""
    config = _short("tiny_12b", 4)
    fitted = fit(config, "mobile_like")
    parameters, batches = drawn_parameters(config, 0), _batches(config.vocab_size)
    write_quantized(tmp_path / "out", parameters, fitted, "rtn", batches)
    _, floats = quantize_model(parameters, fitted, "rtn", batches)
    model = load_model(tmp_path / "out")
    stored = model.parameters()
    scales = [path for path in floats if path.endswith("put_scale")]
    assert scales
    for path in scales:
        assert float(stored[path][0]) == float(floats[path][0]) > 0


@pytest.mark.parametrize("method", ["mse", pytest.param("gptq", marks=pytest.mark.slow)])
def test_text_that_makes_nan_is_refused_by_name(method):
    """If it fails, importance of nan picks no scale of a search, and extrema are written as the search's."""
    config = dataclasses.replace(_short("tiny_12b"), layer_kinds=("sliding",))
    parameters = drawn_parameters(config, 0)
    norm = "layers/0/pre_ffn_norm/weight"
    parameters = parameters | {norm: parameters[norm].at[3].set(jnp.nan)}
    options, batches = PtqConfig(importance=True), _batches(config.vocab_size)
    with pytest.raises(
        InputError, match="(embed/table|ffn/down/kernel): the text makes inf or nan of"
    ):
        quantize_model(parameters, fit(config, "q4_0"), method, batches, config=options)


def test_tokens_beyond_a_shorter_table_have_its_first_row():
    """If it fails, layers are told of inputs that the model does not make: another token's per-layer inputs."""
    table = jnp.asarray(np.random.default_rng(0).normal(size=(6, 32)), jnp.float32)
    q = ROUNDINGS["rtn"](table, Grid(format="int4"), (1,))
    on_host = dataclasses.replace(q, codes=np.asarray(q.codes), scale=np.asarray(q.scale))
    ids = np.asarray([2, 5, 9])
    for leaf, values in ((table, table), (q, q.dequantize()), (on_host, q.dequantize())):
        np.testing.assert_array_equal(rows_of(leaf, ids), values[jnp.asarray([2, 5, 0])])


def test_methods_that_look_at_text_say_that_they_need_some():
    """If it fails, GPTQ without text is silently rounding to nearest."""
    config = _short("tiny_12b")
    with pytest.raises(InputError, match="method gptq looks at what weights are multiplied with"):
        quantize_model(drawn_parameters(config, 0), fit(config, "q4_0"), "gptq")
