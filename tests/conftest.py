"""What every test runs under: checked shapes, written broadcasting, float32 products, the CPU unless told otherwise."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

# Before jax is imported; a machine with an accelerator runs the tests on it with JAX_PLATFORMS=cuda or tpu.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jaxtyping import install_import_hook

if any(name.split(".")[0] == "gemma_qat" for name in sys.modules):
    raise RuntimeError("gemma_qat was imported before tests/conftest.py: its shapes go unchecked")

# Left installed: modules that a test imports late are checked too.
install_import_hook("gemma_qat", "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module")
def known_sizes() -> Iterator[None]:
    """Forgets, at the end of a module, the sizes that its configs made known: other modules look at all there are."""
    from gemma_qat.models import SIZES

    before = dict(SIZES)
    yield
    SIZES.clear()
    SIZES.update(before)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Frees the module's compiled programs: a process may map 65530 pieces of memory, and LLVM dies at the limit."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module")
def quick_to_compile() -> Iterator[None]:
    """Lets XLA optimize little, for modules whose time is the compiler's and that are not about what it makes of sums."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
