"""12B by recipe `int8_training`: set `start` (the float checkpoint), `data.path` and `data.tokenizer`."""

from gemma_qat.config import ExperimentConfig, experiment


def get_config(variant: str = "default") -> ExperimentConfig:
    return experiment("12b", "int8_training", variant)
