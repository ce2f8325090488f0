"""E4B by recipe `w4a8`: set `start` (the float checkpoint), `data.path` and `data.tokenizer`."""

from gemma_qat.config import ExperimentConfig, experiment


def get_config(variant: str = "default") -> ExperimentConfig:
    return experiment("e4b", "w4a8", variant)
