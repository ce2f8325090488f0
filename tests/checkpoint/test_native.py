"""Our own checkpoints: if these fail, what is loaded is not what was saved, or a failed save costs the one before."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_qat.checkpoint.appear import appearing
from gemma_qat.checkpoint.manifest import Manifest
from gemma_qat.checkpoint.native import (
    load_model,
    load_parameters,
    load_quantized,
    save_model,
    save_packed,
)
from gemma_qat.checkpoint.store import on_device, read_manifest, restore_arrays
from gemma_qat.errors import InputError
from gemma_qat.models import (
    SIZES,
    Fitted,
    Gemma4,
    ModelConfig,
    abstract_parameters,
    declare,
    fit,
    float_parameters,
    quantize_parameters,
)
from gemma_qat.models.capture import differing
from gemma_qat.models.sizes import pattern
from gemma_qat.numerics import PackedArray

Q = "layers/0/attn/q/kernel"


@dataclasses.dataclass(frozen=True)
class Saved:
    """A float and a QAT checkpoint of one small model, and a packed one; read only."""

    root: Path
    config: ModelConfig
    fitted: Fitted
    parameters: dict[str, jax.Array]
    masters: dict[str, jax.Array]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    root = tmp_path_factory.mktemp("native")
    changes: dict[str, Any] = {
        "vocab_size": 64,
        "per_layer_vocab": 64,
        "layer_kinds": pattern(4, 2),
    }
    config = dataclasses.replace(SIZES["tiny_e2b"], **changes)
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(rng.uniform(-0.3, 0.3, shape).astype(np.float32))

    parameters = {path: draw(p.shape) for path, p in declare(config).items()}
    fitted = fit(config, "mobile", scales="learned")
    masters = {
        path: abs(draw(leaf.shape)) + 0.05
        if path not in declare(fitted.config)
        else parameters.get(path, draw(leaf.shape))
        for path, leaf in abstract_parameters(fitted.config, fitted.plans).items()
    }
    save_model(root / "float", parameters, config, step=3)
    save_model(root / "qat", masters, fitted, step=4, data={"next": 5})
    codes, floats = quantize_parameters(masters, fitted), float_parameters(masters, fitted)
    save_packed(root / "packed", codes, floats, fitted)
    return Saved(root, config, fitted, parameters, masters)


@pytest.fixture
def copied(saved: Saved, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the checkpoints, to spoil."""
    return lambda kind: Path(shutil.copytree(saved.root / kind, tmp_path / kind))


def refused(act: Callable[[], Any], *parts: str, kind: type[Exception] = InputError) -> None:
    """Ends in one line that names all `parts`."""
    with pytest.raises(kind) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("kind", ["float", "qat"])
def test_masters_come_back_bit_for_bit(saved: Saved, kind: str) -> None:
    want = saved.parameters if kind == "float" else saved.masters
    manifest, parameters = load_parameters(saved.root / kind)
    assert (manifest.kind, manifest.step) == (kind, 3 if kind == "float" else 4)
    assert parameters.keys() == want.keys()
    for path, leaf in want.items():
        np.testing.assert_array_equal(parameters[path], leaf, err_msg=path)
        assert parameters[path].dtype == leaf.dtype


def test_a_qat_checkpoint_says_how_it_was_made(saved: Saved) -> None:
    manifest = read_manifest(saved.root / "qat")
    assert manifest.fitted == saved.fitted
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert json.loads((saved.root / "qat" / "data.json").read_text()) == {"next": 5}
    with pytest.raises(ValueError, match="float checkpoint has no recipe"):
        _ = read_manifest(saved.root / "float").fitted


def test_codes_are_the_training_quantizers(saved: Saved) -> None:
    want = quantize_parameters(saved.masters, saved.fitted)
    for kind in ("qat", "packed"):
        _, found = load_quantized(saved.root / kind)
        assert differing(found, want) == {"codes": 0, "scales": 0}
        assert all(found[path].scale.dtype == want[path].scale.dtype for path in want)


def test_a_packed_checkpoint_holds_no_masters(saved: Saved) -> None:
    manifest, floats = load_parameters(saved.root / "packed")
    assert manifest.kind == "packed"
    assert floats.keys() == float_parameters(saved.masters, saved.fitted).keys()
    assert not floats.keys() & saved.fitted.plans.keys()


def test_all_ways_to_load_are_one_model(saved: Saved) -> None:
    # More rows than a kernel takes: the definition, whose sums come in the order of training's.
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 36)))
    plans = saved.fitted.plans
    fake = Gemma4.from_parameters(saved.fitted.config, saved.masters, plans)(tokens)
    for model in (
        load_model(saved.root / "qat"),
        load_model(saved.root / "qat", packed=True),
        load_model(saved.root / "packed"),
    ):
        np.testing.assert_array_equal(model(tokens), fake)
    plain = load_model(saved.root / "float")(tokens)
    np.testing.assert_array_equal(
        plain, Gemma4.from_parameters(saved.config, saved.parameters)(tokens)
    )
    assert (np.asarray(plain) != np.asarray(fake)).any()
    leaves = load_model(saved.root / "packed").parameters()
    assert {path for path, leaf in leaves.items() if isinstance(leaf, PackedArray)} == set(plans)


def _files(root: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()
    }


def test_a_failed_save_changes_nothing(saved: Saved, copied: Callable[[str], Path]) -> None:
    """Parts fail one after the other: the old checkpoint stays as it was, and nothing else is left lying about."""
    directory = copied("qat")
    before = _files(directory.parent)
    broken = {path: leaf for path, leaf in saved.masters.items() if path != Q}
    with pytest.raises(KeyError):
        save_model(directory, broken, saved.fitted)
    with pytest.raises(TypeError):
        save_model(directory, saved.masters, saved.fitted, data=object())
    nan = saved.masters | {Q: saved.masters[Q].at[0, 0, 0].set(jnp.nan)}

    def refuse(_: Path) -> None:
        raise InputError("not what was to be written")

    codes = quantize_parameters(saved.masters, saved.fitted)
    with pytest.raises(InputError, match="not what"):
        save_packed(directory, codes, float_parameters(nan, saved.fitted), saved.fitted, refuse)
    assert _files(directory.parent) == before
    assert [path.name for path in directory.parent.iterdir()] == ["qat"]


def test_a_save_replaces_the_one_before_whole(saved: Saved, tmp_path: Path) -> None:
    save_model(tmp_path / "a" / "run", saved.masters, saved.fitted, data={"old": 1})
    save_model(tmp_path / "a" / "run", saved.parameters, saved.config)
    assert read_manifest(tmp_path / "a" / "run").kind == "float"
    assert sorted(p.name for p in (tmp_path / "a" / "run").iterdir()) == [
        "manifest.json",
        "parameters",
    ]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["run"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o027, 0o750)])
def test_a_checkpoint_is_as_readable_as_other_directories(
    umask: int, mode: int, tmp_path: Path
) -> None:
    """If it fails, whoever shares the machine, or serves the model, cannot open it."""
    before = os.umask(umask)
    try:
        with appearing(tmp_path / "out") as temporary:
            (temporary / "manifest.json").write_text("{}")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == mode


def test_a_directory_is_not_seen_before_it_is_complete(tmp_path: Path) -> None:
    with appearing(tmp_path / "out") as temporary:
        (temporary / "part").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "part").read_text() == "1"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"version": 1}', '{"version": 9, "kind": "float"}', "\xff\xfe"],
)
def test_a_manifest_that_is_none(copied: Callable[[str], Path], text: str) -> None:
    directory = copied("qat")
    (directory / "manifest.json").write_bytes(text.encode("latin1"))
    refused(lambda: load_model(directory), "manifest.json: not a checkpoint manifest")


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "flot"},
        {"plans": []},
        {"plans": {Q: {"weight": {"format": "int3"}, "scales": "learned"}}},
        {"plans": {Q: {"weight": 3, "scales": "learned"}}},
        {"plans": {"layers/99/attn/q/kernel": {"weight": {"format": "int4"}, "scales": "learned"}}},
        {"config": None},
        {"config": {"name": "x"}},
        {"recipe": None},
    ],
    ids=str,
)
def test_a_manifest_that_makes_no_sense(
    copied: Callable[[str], Path], change: dict[str, Any]
) -> None:
    directory = copied("qat")
    raw = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(raw | change))
    refused(lambda: load_model(directory, packed=True), "manifest.json: not a checkpoint manifest")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("eps", [1e-6], "config.eps: [1e-06] given, float expected"),
        ("eps", 0, "eps is 0.0, finite and above 0 expected"),
        ("vocab_size", 64.0, "config.vocab_size: 64.0 given, int expected"),
        ("vocab_size", 2**40, "below 2^31 expected"),
        ("per_layer_width", -1, "per_layer_width is -1, 0 or more"),
        ("ties_head", 1, "config.ties_head: 1 given, bool expected"),
        ("layer_kinds", ["slide"], "unknown value 'slide' (nearest: sliding)"),
        ("layer_kinds", "full", "config.layer_kinds: 'full' given"),
        ("local_rope", {"theta": 0}, "local_rope: rope of base 0.0"),
        ("local_rope", {"theta": float("nan")}, "local_rope: rope of base nan"),
        ("experts", {"count": 2, "per_token": 3, "width": 8}, "3 of 2 experts a token"),
        ("strange\nkey", 1, "ModelConfig has no 'strange\\nkey'"),
    ],
)
def test_a_config_of_a_manifest_is_checked_where_it_is_read(
    copied: Callable[[str], Path], key: str, value: Any, said: str
) -> None:
    """If it fails, what a manifest says fails somewhere in the model, or makes another one of it."""
    directory = copied("packed")
    raw = json.loads((directory / "manifest.json").read_text())
    raw["config"][key] = value
    (directory / "manifest.json").write_text(json.dumps(raw))
    refused(lambda: read_manifest(directory), "manifest.json: not a checkpoint manifest", said)


def test_a_manifest_nested_without_end(copied: Callable[[str], Path]) -> None:
    """If it fails, brackets take the place of a reason."""
    directory = copied("packed")
    (directory / "manifest.json").write_text("[" * 100_000)
    refused(lambda: read_manifest(directory), "manifest.json: not a checkpoint manifest")


def test_directories_that_are_no_checkpoints(saved: Saved, tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        refused(
            lambda d=directory: load_model(d),
            str(directory),
            "no manifest.json",
            kind=FileNotFoundError,
        )
    refused(lambda: load_quantized(saved.root / "float"), "a float checkpoint, no codes in it")


@pytest.mark.parametrize("part", ["parameters", "quantized"])
def test_a_missing_part(copied: Callable[[str], Path], part: str) -> None:
    directory = copied("packed")
    shutil.rmtree(directory / part)
    refused(lambda: load_model(directory), part, "no such checkpoint part", kind=FileNotFoundError)


def test_an_array_that_is_missing_or_of_another_shape(saved: Saved) -> None:
    abstract = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in saved.parameters.items()
    }
    directory = saved.root / "float" / "parameters"
    more = abstract | {"layers/0/attn/z/kernel": abstract[Q]}
    refused(
        lambda: restore_arrays(directory, more), str(directory), "layers/0/attn/z/kernel is missing"
    )
    wide = abstract | {Q: jax.ShapeDtypeStruct((3, *abstract[Q].shape[1:]), jnp.float32)}
    shape = ", ".join(map(str, abstract[Q].shape[1:]))
    refused(lambda: restore_arrays(directory, wide), str(directory), Q, f"expected (3, {shape})")


def test_arrays_of_any_shape_are_put_on_a_device() -> None:
    """If it fails, a checkpoint with a scalar, or with an array that has nothing in it, cannot be read."""
    for like in (np.float32(3).reshape(()), np.zeros((0, 3), jnp.bfloat16), np.ones(5, np.float16)):
        for count in (1, 2):
            found = on_device([like] * count, stack=count > 1)
            want = np.stack([like] * count) if count > 1 else like
            assert found.dtype == like.dtype
            np.testing.assert_array_equal(found, want)


def test_whatever_orbax_raises_is_one_line(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """A truncated file of arrays ends in a bare Exception of many lines; seen with orbax-checkpoint 0.12.8.

    Done with a real file, in a process of its own, in tests/train/test_lost_work.py: the reads that Orbax leaves behind
    raise when nobody waits for them any more.
    """
    import orbax.checkpoint as ocp

    def fail(*_: Any, **__: Any) -> None:
        raise Exception("OUT_OF_RANGE: byte range is not valid\nsee details")

    monkeypatch.setattr(ocp.Checkpointer, "restore", fail)
    refused(
        lambda: load_parameters(saved.root / "float"),
        "parameters: cannot be restored (OUT_OF_RANGE",
    )
