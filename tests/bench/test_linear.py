"""The bench of the quantized linears: complete, checked, and judged by the promised figures."""

from __future__ import annotations

import json

import bench_linear
import pytest
import run as bench_run
import torch

TINY = ["linear", "--device", "cpu", "--shapes", "20x96x40", "--seconds", "0.05", "--min-rounds", "2"]
TINY += ["--max-rounds", "3"]

pytestmark = pytest.mark.usefixtures("quick")


def result_of(tmp_path, *extra) -> tuple[int, dict, str]:
    code = bench_run.main([*TINY, *extra, "--out", str(tmp_path), "--name", "tiny"])
    return code, json.loads((tmp_path / "tiny.json").read_text()), (tmp_path / "tiny.md").read_text()


def test_every_format_is_checked_timed_and_compared(tmp_path):
    code, result, page = result_of(tmp_path, "--formats", ",".join(bench_linear.FORMATS))
    assert code == 0 and len(result["rows"]) == 1 + 2 * len(bench_linear.FORMATS)
    for row in result["rows"]:
        assert row["status"] == "timed" and row["check"] == "passed", row
    products = [row for row in result["rows"] if row["op"] != "quantize_rows"]
    assert all(
        {"bf16 linear", "_int_mm"} <= {n for n, p in row["peers"].items() if "ratio" in p} for row in products
    )
    assert all("reason" in row["peers"]["_scaled_mm"] for row in products)
    judged = [row["case"] for row in products if row["target"]]
    assert judged == ["20x96x40_int8_whole", "20x96x40_int4_whole"]
    (table,) = result["tables"]
    assert [cells[1] for cells in table["cells"]] == list(bench_linear.FORMATS)
    assert [cells[6] for cells in table["cells"]] == ["0.50", "0.25", "0.50", "0.25", "0.25"]
    assert table["head"][7] == "both speeds in processor time" and all("," in c[7] for c in table["cells"])
    assert "## Figures" in page


def test_a_wrong_product_is_not_timed(tmp_path, monkeypatch):
    right = bench_linear.ops.w8a8_linear

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        out[19, 39] += 1
        return out

    monkeypatch.setattr(bench_linear.ops, "w8a8_linear", wrong)
    code, result, _ = result_of(tmp_path, "--formats", "int8", "--select", "w8a8_linear")
    assert code == 1 and {row["status"] for row in result["rows"]} == {"check failed"}


def test_figures_are_judged_by_their_bounds():
    def row(op, format, part, us, ratios):
        sizes = {"shape": "s", "format": format, "part": part, "n": 8, "k": 8, "weight_bytes": 32}
        peers = {name: {"ratio": ratio} for name, ratio in ratios.items()}
        return {"op": op, "status": "timed", "device": "cuda", "sizes": sizes, "us": us, "peers": peers}

    rows = [
        row("quantize_rows", None, None, 5.0, {}),
        row("w8a8_linear", "int8", "whole", 100.0, {"bf16 linear": 0.5, "_int_mm": 1.02, "_scaled_mm": 1.1}),
        row("w4a8_linear", "int4", "whole", 120.0, {"bf16 linear": 0.7, "_int_mm": 0.9}),
    ]
    (table,) = bench_linear.tables_of(rows)
    assert table["cells"] == [
        ["s", "int8", "2.000 (1.7) pass", "0.909 (0.95) FAIL", "-", "0.050 (0.03) FAIL", "0.25"],
        ["s", "int4", "1.429 (1.7) FAIL", "1.111 (0.95) pass", "1.200", "0.042 (0.03) FAIL", "0.25"],
    ]


def test_an_inexact_peer_is_left_out():
    t = bench_linear.make_tensors(bench_linear.size_of("20x32x8"), "cpu")
    check = bench_linear.peer_check("_int_mm", t)
    exact = t.codes.int() @ t.weight_codes.int().T
    check(exact)
    with pytest.raises(AssertionError, match="not the exact product"):
        check(torch.where(torch.arange(20)[:, None] == 19, exact + 1, exact))


def test_selections_are_refused_in_words():
    for extra, sentence in (
        (["--shapes", "12x4"], "--shapes: expected MxKxN or names"),
        (["--formats", "int5"], "--formats: expected names among int8"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            bench_run.main([*TINY, *extra, "--no-files"])
