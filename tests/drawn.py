"""Fresh parameters for tests, drawn on the host: programs that draw are slow to compile."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma_qat.models import ModelConfig, declare


def drawn_parameters(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Returns float32 parameters by checkpoint path: ones for norms and scalars, normal numbers for the rest."""
    rng = np.random.default_rng(seed)
    return {
        path: jnp.asarray(
            np.ones(leaf.shape)
            if leaf.role in ("norm", "scalar")
            else leaf.init_scale * rng.standard_normal(leaf.shape),
            jnp.float32,
        )
        for path, leaf in declare(config).items()
    }
