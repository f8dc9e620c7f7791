"""The benches are modules beside the package: here they are found, and made quick."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
if str(BENCH) not in sys.path:
    sys.path.insert(0, str(BENCH))


@pytest.fixture
def quick(monkeypatch):
    """Ceilings in no time, and the memory poison of the other tests off: the harness brings its own."""
    import machine

    monkeypatch.setattr(machine.Ceilings, "_matmul_rate", lambda self, dtype, seconds: 1e12)
    monkeypatch.setattr(machine.Ceilings, "_copy_rate", lambda self, seconds: 1e10)
    torch.use_deterministic_algorithms(False)
