"""Small documents and a small tokenizer that the data tests share."""

from __future__ import annotations

import pytest

from gemma_qat.data import Document, Rows, Tokenizer, pack, train_tokenizer

TEXTS = (
    "def add(left, right):\n    return left + right\n",
    "class Point:\n\n    def __init__(self, x=0, y=10):\n        self.x, self.y = x, y\n",
    "import os\n\n\nfor name in os.listdir('.'):\n    if len(name) > 3:\n        print(name)\n",
    "# the left and the right of a point\nvalue = [add(n, 100) for n in range(12345)]\n",
)


@pytest.fixture(scope="session")
def documents_by_split() -> dict[str, list[Document]]:
    """Seven documents, out of the order of their paths, in two splits."""
    names = ("z", "b", "y", "c", "x", "d", "w")
    documents = [
        Document(path=f"{name}.py", text=TEXTS[i % 4] + f"# \u00e9\r\n{i}\n")
        for i, name in enumerate(names)
    ]
    return {"train": documents[:5], "test": documents[5:]}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer with few learned pieces."""
    return train_tokenizer(TEXTS, 330, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="session")
def rows() -> Rows:
    """23 rows of 7 tokens, each token of the corpus different from every other."""
    return pack([list(range(7 * i + 1, 7 * i + 8)) for i in range(23)], 7)
