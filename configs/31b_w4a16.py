"""31B by recipe `w4a16`: set `start` (the float checkpoint), `data.path` and `data.tokenizer`."""

from gemma_qat.config import ExperimentConfig, experiment


def get_config(variant: str = "default") -> ExperimentConfig:
    return experiment("31b", "w4a16", variant)
