"""A checkpoint of bfloat16 values on a lattice, read as one of codes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hf_directory import tensors_of

from gemma_qat.checkpoint.native import load_quantized
from gemma_qat.checkpoint.source import Leaf, Source
from gemma_qat.cli.main import main
from gemma_qat.convert.lattice import Tally, on_lattice
from gemma_qat.convert.parts import digest
from gemma_qat.errors import InputError
from gemma_qat.models import Fitted, fit, initialize, quantize_parameters, size_named
from gemma_qat.numerics import QArray


def source_of(fitted: Fitted, arrays: Mapping[str, Any]) -> Source:
    """The arrays as a reader of bfloat16 files gives them."""
    leaves = [
        Leaf(path=path, shape=x.shape, dtype="bfloat16", bytes=x.nbytes, read=lambda x=x: x)
        for path, x in arrays.items()
    ]
    return Source(format="safetensors", config=fitted.config, leaves=tuple(leaves))


@pytest.fixture(
    scope="module", params=["tiny_e2b", pytest.param("tiny_26b_a4b", marks=pytest.mark.slow)]
)
def trained(request: pytest.FixtureRequest) -> tuple[Fitted, dict[str, QArray], dict[str, Any]]:
    """A recipe, the codes that were trained, and the arrays of the released file."""
    fitted = fit(size_named(request.param), "q4_0")
    masters = initialize(fitted.config, 0)
    codes = quantize_parameters(masters, fitted)
    values = {path: q.dequantize() for path, q in codes.items()}
    return fitted, codes, {p: np.asarray((masters | values)[p].astype(jnp.bfloat16)) for p in masters}  # fmt: skip


def test_all_codes_of_a_release_come_back(trained: Any) -> None:
    """Experts included; what is in float stays as it was."""
    fitted, codes, arrays = trained
    tally = Tally()
    found = on_lattice(source_of(fitted, arrays), "q4_0", tally)
    assert (found.recipe, found.plans) == ("q4_0", fitted.plans)
    for leaf in found.leaves:
        read = leaf.read()
        if leaf.path not in codes:
            np.testing.assert_array_equal(read, arrays[leaf.path])
            continue
        assert isinstance(read, QArray) and read.scale.shape == codes[leaf.path].scale.shape
        np.testing.assert_array_equal(read.codes, codes[leaf.path].codes, err_msg=leaf.path)
        values = dataclasses.replace(read, codes=jnp.asarray(read.codes)).dequantize()
        again = np.asarray(values.astype(jnp.bfloat16))
        np.testing.assert_array_equal(again, arrays[leaf.path])
    assert tally.fitting == tally.tiles > 0 and 0.4 < tally.naive / tally.tiles < 0.6
    print(*tally.lines(), sep="\n")


def test_parts_of_a_large_array_are_put_together(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Whatever the size of the parts, the same codes and scales in the same places."""
    fitted, _, arrays = trained
    path = next(p for p in fitted.plans if p.endswith("attn/o/kernel"))
    source = source_of(fitted, arrays)
    leaf = next(leaf for leaf in on_lattice(source, "q4_0", Tally()).leaves if leaf.path == path)
    whole = leaf.read()
    monkeypatch.setattr("gemma_qat.convert.lattice.PART", 1000)
    cut = leaf.read()
    np.testing.assert_array_equal(whole.codes, cut.codes)
    np.testing.assert_array_equal(whole.scale, cut.scale)


def test_bad_input_is_one_line(trained: Any) -> None:
    """Weights on no lattice, a recipe without one, a checkpoint that is quantized already."""
    fitted, _, arrays = trained
    path = next(iter(fitted.plans))
    noise = np.asarray(jnp.asarray(np.random.default_rng(0).standard_normal(arrays[path].shape), jnp.bfloat16))  # fmt: skip
    source = source_of(fitted, arrays | {path: noise})
    leaf = next(leaf for leaf in on_lattice(source, "q4_0", Tally()).leaves if leaf.path == path)
    with pytest.raises(InputError, match=f"{path}: .* tiles are on no q4_0 lattice"):
        leaf.read()
    with pytest.raises(InputError, match="puts nothing on the q4_0 grid"):
        on_lattice(source, "w4a16", Tally())
    with pytest.raises(InputError, match="already"):
        on_lattice(on_lattice(source, "q4_0", Tally()), "q4_0", Tally())


def test_from_a_release_to_codes_by_the_command(
    hugging_face: Any, bfloat16: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Hugging Face directory of bfloat16 values; what it is, then codes and scales that give its bits back."""
    made = hugging_face("tiny_e2b", dtype=bfloat16)
    fitted = fit(made.config, "q4_0")
    # Masters that are no bfloat16 numbers: of those that are, rounding anew would give every bit back.
    masters = {p: 1.001 * jnp.asarray(x, jnp.float32) for p, x in made.parameters.items()}
    codes = quantize_parameters(masters, fitted)
    values = {p: np.asarray(q.dequantize()).astype(bfloat16) for p, q in codes.items()}
    made.tensors = tensors_of(made.parameters | values, made.config, "model.")
    source, out = str(made.write()), tmp_path / "out"

    assert main(["inspect", source, "--digests"]) == 0
    shown = capsys.readouterr().out
    assert "format safetensors" in shown and f"{len(made.parameters)} bfloat16" in shown
    path = next(iter(values))
    assert f"{digest(values[path])}  {path}" in shown.splitlines()

    assert main(["convert", source, "--out", str(out), "--recover-lattice"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"([\d,]+) of \1 tiles give back their bfloat16 bits \(100.00%\); rounding .*: \d\d\.\d\d%", shown)  # fmt: skip
    manifest, found = load_quantized(out)
    assert (manifest.kind, manifest.recipe) == ("packed", "q4_0")
    for path, q in found.items():
        np.testing.assert_array_equal(q.codes, codes[path].codes, err_msg=path)
        np.testing.assert_array_equal(np.asarray(q.dequantize()).astype(bfloat16), values[path])

    assert (
        main(["convert", source, "--out", str(tmp_path / "no"), "--recover-lattice", "mobile"]) == 2
    )
    assert "static scales" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
