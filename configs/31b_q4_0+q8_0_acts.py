"""31B by recipe `q4_0+q8_0_acts`: set `start` (the float checkpoint), `data.path` and `data.tokenizer`."""

from gemma_qat.config import ExperimentConfig, experiment


def get_config(variant: str = "default") -> ExperimentConfig:
    return experiment("31b", "q4_0+q8_0_acts", variant)
