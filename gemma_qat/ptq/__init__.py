"""Post-training quantization: the baselines training has to beat."""

from gemma_qat.ptq.rtn import METHODS, round_to_nearest

__all__ = ["METHODS", "round_to_nearest"]
