"""Quantized linears: calibration, the methods that make them, and the one module that runs them.

    layers = linear_layers(model)                        which linears, and which belong together
    calibration = calibrate(model, run, layers=layers)   what goes into them, over prompts and steps
    quantized = vidit_q.quantize(model, calibration, bits="w4a8")
    with apply(model, quantized): ...                    in place, and undoably

weights      how a weight is stored           transform    mask and rotation of inputs
linear       QuantLinear and its data         apply        into a model and out again
layers       which linears of which class     calibration  what goes into them
vidit_q      the methods, a module each       uniform      rounding, and the loop over layers
baselines    rounding alone, SmoothQuant      sensitivity  which layers need 8 bits; budget solves
"""

from .apply import Applied, QuantizedModel, apply
from .calibration import Calibration, InputStatistics, calibrate
from .layers import LinearInfo, linear_layers
from .linear import QuantLayer, QuantLinear, SharedRows
from .transform import DualRotation, InputTransform
from .weights import (
    FORMATS,
    Int4Weight,
    Int8Weight,
    NibblePlaneWeight,
    QuantizedRows,
    TwinLogWeight,
    VQWeight,
    Weight,
)

__all__ = [
    "FORMATS",
    "Applied",
    "Calibration",
    "DualRotation",
    "InputStatistics",
    "InputTransform",
    "Int4Weight",
    "Int8Weight",
    "LinearInfo",
    "NibblePlaneWeight",
    "QuantLayer",
    "QuantLinear",
    "QuantizedModel",
    "QuantizedRows",
    "SharedRows",
    "TwinLogWeight",
    "VQWeight",
    "Weight",
    "apply",
    "calibrate",
    "linear_layers",
]
