"""Post-training quantization: the baselines training has to beat, and the calibration both need."""

from gemma_qat.ptq.calibrate import Batch, Calibrated, CalibrationConfig, batch_of, calibrate
from gemma_qat.ptq.config import PtqConfig
from gemma_qat.ptq.methods import DATA_FREE, METHODS, Method, method_named
from gemma_qat.ptq.quantize import quantize_model, wants_text
from gemma_qat.ptq.rtn import round_to_nearest

__all__ = [
    "DATA_FREE",
    "METHODS",
    "Batch",
    "Calibrated",
    "CalibrationConfig",
    "Method",
    "PtqConfig",
    "batch_of",
    "calibrate",
    "method_named",
    "quantize_model",
    "round_to_nearest",
    "wants_text",
]
