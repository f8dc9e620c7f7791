"""The linear and vq products for compute capability 9.0 in the emulator: sums to the last bit, in every order."""

from __future__ import annotations

from pathlib import Path

import pytest
from emu_programs import ORDERS, assert_right, built

LINEAR = ["int8", "int4", "planes", "table8", "table16", "extremes", "epilogue", "rounding", "refused", "tile"]
VQ = ["k256x4", "k64x2"]


@pytest.fixture(scope="session")
def linear() -> Path:
    return built("linear_sm90.cu")


@pytest.fixture(scope="session")
def vq() -> Path:
    return built("vq_sm90.cu")


@pytest.mark.parametrize("order", [*ORDERS, "random:7"])
@pytest.mark.parametrize("case", LINEAR)
def test_linear_is_exact(linear, case, order):
    assert_right(linear, case, order)


@pytest.mark.parametrize("case", ["linear", "expand", "quantize", "vq", "batch"])
def test_callers_without_torch_are_told(case):
    assert_right(built("refused_sm80.cu"), case, "forward")


@pytest.mark.parametrize("order", [*ORDERS, "random:7"])
@pytest.mark.parametrize("case", VQ)
def test_vq_linear_is_exact(vq, case, order):
    assert_right(vq, case, order)
