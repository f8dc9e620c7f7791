"""Quantized linears: calibration, the methods that make them, and the one module that runs them.

    layers = linear_layers(model)                        which linears, and which belong together
    calibration = calibrate(model, run, layers=layers)   what goes into them, over prompts and steps
    quantized = METHODS[name](model, calibration, bits="w4a8")
    with apply(model, quantized): ...                    in place, and undoably

weights    how a weight is stored          transform    mask and rotation of inputs
linear     QuantLinear and its data        apply        into a model and out again
"""

from .apply import Applied, QuantizedModel, apply
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
    "DualRotation",
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
    "linear_layers",
]
