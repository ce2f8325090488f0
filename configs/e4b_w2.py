"""E4B by recipe `w2`: set `start` (the float checkpoint), `data.path` and `data.tokenizer`."""

from gemma_qat.config import ExperimentConfig, experiment


def get_config(variant: str = "default") -> ExperimentConfig:
    return experiment("e4b", "w2", variant)
