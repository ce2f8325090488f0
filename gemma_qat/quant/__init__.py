"""Who gets which numbers: plans, rules, recipes, fake quantization, coverage."""

# What was covered.
from gemma_qat.quant.coverage import Row, by_role, coverage, total_bytes

# The forward pass of training.
from gemma_qat.quant.fake import fake_quantize, fake_quantize_learned
from gemma_qat.quant.plan import Activation, Backward, Plan, Plans, ScaleMode, weights_only

# Who gets which numbers.
from gemma_qat.quant.recipe_json import (
    read_recipe,
    recipe_from_json,
    recipe_text,
    table,
    to_json,
    write_recipe,
)
from gemma_qat.quant.recipes import RECIPE_NAMES, families_of, name_of, recipe_named
from gemma_qat.quant.rules import Recipe, Rule, resolve
from gemma_qat.quant.sites import Parameter, scale_path

__all__ = [
    "RECIPE_NAMES",
    "Activation",
    "Backward",
    "Parameter",
    "Plan",
    "Plans",
    "Recipe",
    "Row",
    "Rule",
    "ScaleMode",
    "by_role",
    "coverage",
    "fake_quantize",
    "fake_quantize_learned",
    "families_of",
    "name_of",
    "read_recipe",
    "recipe_from_json",
    "recipe_named",
    "recipe_text",
    "resolve",
    "scale_path",
    "table",
    "to_json",
    "total_bytes",
    "weights_only",
    "write_recipe",
]
