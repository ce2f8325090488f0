"""Runs as data: the experiment, the quickstart, config files and typed overlays."""

from gemma_qat.config.defaults import experiment
from gemma_qat.config.experiment import BlendConfig, DataConfig, ExperimentConfig, SourceConfig
from gemma_qat.config.files import check_variant, from_json, load_config, load_sweep, to_json
from gemma_qat.config.overlay import apply, flatten, provenance
from gemma_qat.config.quickstart import QuickstartConfig, RecipeConfig
from gemma_qat.config.sweep import (
    Cell,
    MeasureConfig,
    PtqCell,
    SweepConfig,
    TrainCell,
    grid,
    overlaid,
)

__all__ = [
    "BlendConfig",
    "Cell",
    "DataConfig",
    "ExperimentConfig",
    "MeasureConfig",
    "PtqCell",
    "QuickstartConfig",
    "RecipeConfig",
    "SourceConfig",
    "SweepConfig",
    "TrainCell",
    "apply",
    "check_variant",
    "experiment",
    "flatten",
    "from_json",
    "grid",
    "load_config",
    "load_sweep",
    "overlaid",
    "provenance",
    "to_json",
]
