"""Post-training quantization: the baselines training has to beat, and the calibration both need."""

from gemma_qat.ptq.calibrate import Batch, Calibrated, CalibrationConfig, batch_of, calibrate
from gemma_qat.ptq.config import PtqConfig
from gemma_qat.ptq.quantize import quantize_model
from gemma_qat.ptq.rtn import METHODS, round_to_nearest

__all__ = [
    "METHODS",
    "Batch",
    "Calibrated",
    "CalibrationConfig",
    "PtqConfig",
    "batch_of",
    "calibrate",
    "quantize_model",
    "round_to_nearest",
]
