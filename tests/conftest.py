"""Devices that the ops are tested on, and the build of the emulator that stands in for a GPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))  # cases/ and the helpers are shared between folders and with bench/

from build_emu import EmulatorUnavailable, build_emulator, skip_or_fail  # noqa: E402

import vdit_ext  # noqa: E402  loads the op libraries


@dataclass(frozen=True)
class Backend:
    """Where an op runs: the namespace that holds it and the device that its tensors live on."""

    name: str
    device: str
    namespace: str

    @property
    def ops(self):
        return getattr(torch.ops, self.namespace)

    @property
    def is_cuda_code(self) -> bool:
        """Whether these are the CUDA kernels, on a GPU or emulated, with their narrower dtypes and sizes."""
        return self.name != "cpu"

    def __str__(self) -> str:
        return self.name


@pytest.fixture(scope="session")
def emulator() -> Backend:
    """The CUDA kernels run on the CPU, built from source once a session."""
    try:
        library = build_emulator()
    except EmulatorUnavailable as reason:
        skip_or_fail(reason)
    torch.ops.load_library(str(library))
    return Backend("emu", "cpu", "vdit_emu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        # A test module that has kernels for compute capability 9.0 of its own says so with BACKENDS.
        names = getattr(metafunc.module, "BACKENDS", ("cpu", "emu", "cuda"))
        metafunc.parametrize("backend", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def backend(request) -> Backend:
    """Each place where an op can run here."""
    if request.param == "cpu":
        return Backend("cpu", "cpu", "vdit")
    if request.param == "emu":
        return request.getfixturevalue("emulator")
    if request.param == "emu_sm90":  # the same library: its ops as on a GPU of compute capability 9.0
        request.getfixturevalue("emulator")
        return Backend("emu_sm90", "cpu", "vdit_emu_sm90")
    if not torch.cuda.is_available():
        pytest.skip("cuda: no GPU on this machine")
    if vdit_ext.ops.LIBRARIES["cuda"] != "loaded":
        pytest.skip(f"cuda: {vdit_ext.ops.LIBRARIES['cuda']}")
    return Backend("cuda", "cuda", "vdit")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors are filled with NaN, so that an element no kernel wrote is seen."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
