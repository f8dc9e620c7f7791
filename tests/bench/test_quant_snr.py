"""The table of synthetic SNR: what is committed is what the bench computes, and no floor is missed in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import quant_snr

RESULT = Path(quant_snr.ROOT) / "bench" / "results" / "2026-11-21_synthetic_snr.md"


def test_the_committed_result_holds_every_floor():
    text = RESULT.read_text()
    systems = re.findall(r"^\| (ViDiT-Q|LRQ-DiT|VQ4DiT) \|.*\| (ok|MISSED) \|$", text, re.MULTILINE)
    assert {system for system, _ in systems} == {"ViDiT-Q", "LRQ-DiT", "VQ4DiT"}
    assert len(systems) == 21 and all(verdict == "ok" for _, verdict in systems)


@pytest.mark.parametrize(
    "name", ["uniform, min-max", "twin-log, paper", "twin-log, released (more bits)", "twin-log, corrected"]
)
def test_the_committed_figures_are_made_again(name):
    """Of the quantizers that take a moment; the others come from the same loop."""
    (method,) = (m for m in quant_snr.METHODS if m.name == name)
    for bits in method.bits:
        found = re.search(rf"^\| {re.escape(name)} \| {bits} \| (.*) \|$", RESULT.read_text(), re.MULTILINE)
        for kind, cell in zip(quant_snr.KINDS, found[1].split(" | "), strict=True):
            weight = quant_snr.weight_rows(kind)
            assert quant_snr.snr(weight, method.quantize(weight, bits)) == pytest.approx(float(cell), abs=0.11)


def test_a_missed_floor_ends_with_1(monkeypatch, capsys):
    cheap = [m for m in quant_snr.METHODS if "VQ" not in m.name and "Lloyd" not in m.name]
    monkeypatch.setattr(quant_snr, "METHODS", cheap)
    monkeypatch.setattr(quant_snr, "vq4dit_floors", lambda weights: [])
    monkeypatch.setattr(quant_snr, "layer_figures", lambda: dict.fromkeys(quant_snr.TREATMENTS, 20.0))
    monkeypatch.setattr("sys.argv", ["quant_snr.py", "--rows", "8"])
    assert quant_snr.main() == 1
    assert (
        "| ViDiT-Q | W4A8, mask and rotation over the better one | 0.00 | 6.0 | MISSED |"
        in capsys.readouterr().out
    )
