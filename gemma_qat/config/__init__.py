"""Runs as data: the experiment, the quickstart, config files and typed overlays."""

from gemma_qat.config.defaults import experiment
from gemma_qat.config.experiment import BlendConfig, DataConfig, ExperimentConfig, SourceConfig
from gemma_qat.config.files import check_variant, from_json, load_config, to_json
from gemma_qat.config.overlay import apply, flatten, provenance
from gemma_qat.config.quickstart import QuickstartConfig, RecipeConfig

__all__ = [
    "BlendConfig",
    "DataConfig",
    "ExperimentConfig",
    "QuickstartConfig",
    "RecipeConfig",
    "SourceConfig",
    "apply",
    "check_variant",
    "experiment",
    "flatten",
    "from_json",
    "load_config",
    "provenance",
    "to_json",
]
