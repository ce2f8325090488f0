"""The Gemma 4 text decoder: config, sizes, declarations, the model itself, and recipes fitted to it."""

# Weights made ready before the layers run.
# A model as numbers and names, and what it costs.
from gemma_qat.models.account import (
    active_parameters,
    flops_per_token,
    forward_flops_per_token,
    parameter_bytes,
)
from gemma_qat.models.ahead import (
    as_leaves,
    made_ready,
    merge_adapters,
    narrow,
    ready,
    round_ahead,
    stacked_sites,
)
from gemma_qat.models.config import ModelConfig
from gemma_qat.models.declare import declare, parameter_count

# A recipe meets a model.
from gemma_qat.models.fit import (
    Fitted,
    check_integer_sums,
    fit,
    float_parameters,
    laid_for_kernels,
    packed_model,
    quantize_parameters,
    uncalibrated,
)

# The model.
from gemma_qat.models.gemma4 import Gemma4, RunOptions

# The model a layer at a time.
from gemma_qat.models.layerwise import Flow, Layerwise, run_block
from gemma_qat.models.layout import layer_shardings, leaf_shardings
from gemma_qat.models.leaves import (
    abstract_parameters,
    initialize,
    stack_layers,
    static_scale_paths,
    unstack_layers,
)
from gemma_qat.models.sizes import FULL_SIZES, SIZES, size_named

__all__ = [
    "FULL_SIZES",
    "SIZES",
    "Fitted",
    "Flow",
    "Gemma4",
    "Layerwise",
    "ModelConfig",
    "RunOptions",
    "abstract_parameters",
    "active_parameters",
    "as_leaves",
    "check_integer_sums",
    "declare",
    "fit",
    "float_parameters",
    "flops_per_token",
    "forward_flops_per_token",
    "initialize",
    "laid_for_kernels",
    "layer_shardings",
    "leaf_shardings",
    "made_ready",
    "merge_adapters",
    "narrow",
    "packed_model",
    "parameter_bytes",
    "parameter_count",
    "quantize_parameters",
    "ready",
    "round_ahead",
    "run_block",
    "size_named",
    "stack_layers",
    "stacked_sites",
    "static_scale_paths",
    "uncalibrated",
    "unstack_layers",
]
