"""Damages copies of Orbax checkpoints and opens each: `python tests/checkpoint/damage.py FOLDER SEED COUNT [FORM ...]`.

In a process of its own, which the test may stop, and whose memory is bounded: what is looked for are hangs, a library that
ends the process, and memory without bound as much as tracebacks. Files are taken in turn, so that every kind has its share.
Prints a JSON line for each.
"""

from __future__ import annotations

import dataclasses
import json
import random
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from deepmind_tree import tensors_of, tree_of, write
from hf_directory import random_parameters

from gemma_qat.checkpoint.deepmind import open_deepmind
from gemma_qat.checkpoint.native import load_parameters, load_quantized, save_packed
from gemma_qat.errors import InputError
from gemma_qat.models import SIZES, ModelConfig, fit, float_parameters, quantize_parameters
from gemma_qat.models.sizes import pattern

RESULT = "result: "
MOST = 16 * 2**30
"""Bytes of address space; jax and its threads map more than they use."""

SMALL: ModelConfig = dataclasses.replace(
    SIZES["tiny_12b"], vocab_size=64, layer_kinds=pattern(2, 2)
)
TREES: dict[str, dict[str, bool]] = {
    "ocdbt": {},
    "files": {"use_ocdbt": False},
    "zarr3": {"use_ocdbt": False, "use_zarr3": True},
}
"""How Orbax lays out a tree: in one database (the default), or in a directory for each array."""

_VALUES: tuple[Any, ...] = (
    2**33, 2**63, -1, 0, None, True, 1.5, float("nan"), "x", "x" * 9999, "../../x", [], {}, "deep",
)  # fmt: skip
_NAMES = ("x", "", "..", "../../x", "a\nb", "n" * 300)


def save(directory: Path, form: str) -> None:
    """Writes a sound checkpoint: a tree of DeepMind's in one of the layouts, or a packed one of ours."""
    parameters = random_parameters(SMALL)
    if form != "packed":
        write(directory, tree_of(tensors_of(parameters, SMALL, False), "nested"), **TREES[form])
        return
    fitted = fit(SMALL, "w4a16")
    codes = quantize_parameters(parameters, fitted)
    save_packed(directory, codes, float_parameters(parameters, fitted), fitted)


def arrays_of(directory: Path, form: str) -> dict[str, Any]:
    """Everything that is in a checkpoint, by path."""
    if form != "packed":
        with open_deepmind(directory, SMALL) as source:
            return {leaf.path: leaf.read() for leaf in source.leaves}
    floats, codes = load_parameters(directory)[1], load_quantized(directory)[1]
    return floats | {
        f"{path}/{at}": leaf for path, q in codes.items() for at, leaf in enumerate(jax.tree.leaves(q))
    }  # fmt: skip


def damage(path: Path, draw: random.Random) -> str:
    """Spoils a file; returns how."""
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    how = draw.choice(("cut", "bit", "bit", "bytes", "more", "gone", "json", "json"))
    if how == "json":
        changed = _json(bytes(data), draw)
        if changed is not None:
            path.write_text(changed[0])
            return changed[1]
        how = "bit"
    if how == "gone":
        path.unlink()
        return how
    if how == "cut":
        del data[at:]
    elif how == "bit":
        data[at] ^= 1 << draw.randrange(8)
    elif how == "bytes":
        data[at : at + 8] = draw.choice((bytes(8), b"\xff" * 8, draw.randbytes(8)))
    else:
        data[at:at] = draw.randbytes(1)
    path.write_bytes(data)
    return f"{how} at {at}"


def _json(data: bytes, draw: random.Random) -> tuple[str, str] | None:
    """Another text in which one value of the JSON is gone, renamed or another; None when it is no JSON object."""
    try:
        raw = json.loads(data)
    except ValueError:
        return None
    places: list[tuple[Any, Any]] = []
    todo = [raw]
    while todo:
        node = todo.pop()
        inside = list(node.items() if isinstance(node, dict) else enumerate(node))
        places += [(node, key) for key, _ in inside]
        todo += [value for _, value in inside if isinstance(value, (dict, list))]
    if not places:
        return None
    node, key = draw.choice(places)
    how = draw.randrange(len(_VALUES) + 2)
    if how == len(_VALUES):
        del node[key]
        return json.dumps(raw), f"{key} gone"
    if how == len(_VALUES) + 1 and isinstance(node, dict):
        name = draw.choice(_NAMES)
        node[name] = node.pop(key)
        return json.dumps(raw), f"{key} now {name!r}"
    value = _VALUES[how % len(_VALUES)]
    node[key] = json.loads("[" * 900 + "]" * 900) if value == "deep" else value
    return json.dumps(raw), f"{key} = {str(value)[:20]}"


def attempt(good: dict[str, Any], act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What became of reading: the arrays that differ, the line it was refused with, or an error that is none of ours."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = act()
        differ = [path for path in good if not np.array_equal(good[path], found.get(path))]
        outcome: dict[str, Any] = {"differ": differ + sorted(found.keys() - good.keys())}
    except (InputError, FileNotFoundError) as error:
        outcome = {"refused": str(error)}
    except Exception as error:  # reported to the test, which fails with it
        outcome = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return outcome | {"megabytes": more // 1024}


def sweep(folder: Path, form: str, draw: random.Random, count: int) -> None:
    """Damages one file of a checkpoint at a time, `count` times."""
    sound, spoiled = folder / form, folder / f"{form}_spoiled"
    save(sound, form)
    good = arrays_of(sound, form)
    files = sorted(path.relative_to(sound) for path in sound.rglob("*") if path.is_file())
    draw.shuffle(files)
    for turn in range(count):
        file = files[turn % len(files)]
        shutil.rmtree(spoiled, ignore_errors=True)
        shutil.copytree(sound, spoiled)
        case = {"form": form, "file": str(file), "how": damage(spoiled / file, draw)}
        print(json.dumps(case), flush=True)  # the last one before a hang or an end without a word
        outcome = attempt(good, lambda: arrays_of(spoiled, form))
        print(RESULT + json.dumps({**case, "path": str(spoiled), **outcome}), flush=True)


def main(folder: Path, seed: int, count: int, forms: list[str]) -> None:
    """Damages every form `count` times."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST))
    for form in forms:
        sweep(folder, form, random.Random(f"{form} {seed}"), count)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
