"""The standard library as documents, and the split of a path."""

from __future__ import annotations

import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from gemma_qat.data import SPLITS, Document, by_split, collect, split_of


def test_only_the_library_is_collected(tmp_path: Path) -> None:
    """Broken: test data, installed packages, empty or non-utf-8 files would enter the corpus."""
    kept = {"b.py": "b = 1\r\n", "a/x.py": "\u00e9 = 2\n", "a.py": "a\n", "testing/t.py": "t\n"}
    left_out = ("site-packages/p.py", "dist-packages/p.py", "a/test/t.py", "a/tests/data/t.py")
    left_out += ("idlelib/idle_test/t.py", "__pycache__/c.py", "notes.txt")
    for name in (*kept, *left_out, "empty.py", "latin.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(kept.get(name, "x = 1\n").encode())
    (tmp_path / "empty.py").write_bytes(b"")
    (tmp_path / "latin.py").write_bytes("\u00e9".encode("latin-1"))
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere.py")
    assert {d.path: d.text for d in collect(tmp_path)} == kept
    assert [d.path for d in collect(tmp_path)] == sorted(kept)


def test_the_running_library_is_found() -> None:
    """Broken: the default corpus would be empty, partial, or polluted by tests."""
    documents = collect()
    paths = [document.path for document in documents]
    root = Path(sysconfig.get_path("stdlib"))
    assert {"argparse.py", "json/decoder.py", "unittest/case.py"} <= set(paths)
    assert paths == sorted(set(paths)) and len(paths) > 400
    assert not {part for path in paths for part in path.split("/")} & {"test", "site-packages"}
    text = next(document.text for document in documents if document.path == "argparse.py")
    assert text.encode() == (root / "argparse.py").read_bytes()


def test_splits_have_their_shares() -> None:
    """Broken: the held-out splits would be empty or take the training data."""
    counts = Counter(split_of(f"package_{i}/module.py") for i in range(10_000))
    # Shares 4 %, 3 %, 93 %: five standard deviations of a binomial count are under 100.
    assert abs(counts["test"] - 400) < 100
    assert abs(counts["validation"] - 300) < 100
    assert sum(counts[split] for split in SPLITS) == 10_000


def test_held_out_copies_of_training_files_are_left_out() -> None:
    """Broken: what a model remembers of a sibling counts as what it knows of new text."""
    shared = "    shared_value = compute_it()\n" * 3
    own = [f"own_value_{i} = compute_other_things()\n" for i in range(4)]
    texts = {
        "ast.py": shared,
        "argparse.py": shared.replace("    ", "\t") + "else:\n" * 9 + "".join(own[:2]),
        "dis.py": shared + "".join(own[:3]),
    }
    assert [split_of(path) for path in texts] == ["train", "test", "validation"]
    documents = [Document(path=path, text=text) for path, text in texts.items()]
    found = {split: [d.path for d in docs] for split, docs in by_split(documents).items()}
    assert found == {"train": ["ast.py"], "validation": ["dis.py"], "test": []}


def test_no_code_page_of_the_running_library_is_held_out() -> None:
    """Broken: a quarter of the text that figures are of is near copies of training files."""
    found = by_split(collect())
    held_out = [d.path for split in ("validation", "test") for d in found[split]]
    assert len(held_out) > 15 and not [path for path in held_out if path.startswith("encodings/")]
    assert {d.path for d in found["train"]} == {
        d.path for d in collect() if split_of(d.path) == "train"
    }


@pytest.mark.parametrize(
    ("path", "split"),
    [("ast.py", "train"), ("dis.py", "validation"), ("argparse.py", "test")],
)
def test_a_path_keeps_its_split(path: str, split: str) -> None:
    """Broken: a held-out file of an old run would be trained on by a new one."""
    assert split_of(path) == split


def test_a_missing_folder_is_one_line() -> None:
    """Broken: a wrong root would give an empty corpus instead of an error."""
    with pytest.raises(
        FileNotFoundError, match=r"^standard library folder .*nowhere: not a folder$"
    ):
        collect(Path("nowhere"))
