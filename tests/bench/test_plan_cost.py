"""The calculated cost of planning, against sums by hand."""

from __future__ import annotations

import plan_cost
import pytest

from vdit_ext.ops import attention as defs
from vdit_ext.sparse import SVG2, DraftAttention

MODEL = "wan2.1-14b-t2v-720p"
TOKENS, HEADS, DIM = 75_600, 40, 128
ROWS = TOKENS * HEADS


def test_a_plan_of_svg2_by_hand():
    plan, around = plan_cost.costs(SVG2(num_q_clusters=300, num_k_clusters=1000, iter_step=2), MODEL, 0.25)
    assign = plan["kmeans_assign"]
    assert assign.calls == 4 and assign.launches == 8
    assert assign.flops == 2 * 2 * ROWS * (300 + 1000) * DIM
    assert assign.seconds == pytest.approx(assign.flops / 790e12)
    mean = plan["segment_mean"]
    reads = 2 * ROWS * DIM + 4 * ROWS  # x and its order, besides the clusters
    clusters = HEADS * (300 + 1000) * (2 * 2 * DIM + 4) + 2 * HEADS * 4
    assert mean.flops == 0 and mean.nbytes == 2 * (2 * reads + clusters)
    assert mean.seconds == pytest.approx(mean.nbytes / 4.3e12)
    moved = around["permute_rows"]
    assert moved.calls == 2 and moved.nbytes == 2 * (2 * 2 * ROWS * DIM + 4 * ROWS)
    assert "unpermute_rows" not in around, "attention takes queries and leaves results where they are"
    attention = around["block_sparse_attention"]
    assert attention.flops == pytest.approx(4 * 0.25 * TOKENS**2 * HEADS * DIM)
    assert attention.seconds == pytest.approx(attention.flops / 790e12)


def test_head_size_64_is_no_faster_than_its_exponentials_and_products():
    _, around = plan_cost.costs(SVG2(), "cogvideox-1.5-5b", 0.25)
    pairs = 0.25 * 45_106**2 * 48
    assert around["block_sparse_attention"].seconds == pytest.approx(
        max(4 * 64 * pairs / 790e12, pairs / 3.87e12)
    )


def test_every_op_of_ours_has_its_launches():
    known = {name.removeprefix("vdit::") for name in plan_cost.LAUNCHES}
    assert known <= set(defs.OPS)
    for method in (SVG2(), DraftAttention()):
        for part in plan_cost.costs(method, MODEL, 0.25):
            assert set(part) - {"torch's ops"} <= known


def test_the_report_says_that_it_is_calculated(capsys):
    plan_cost.main(["--model", MODEL, "--method", "svg2", "--iters", "1"])
    text = capsys.readouterr().out
    assert "calculated, not measured" in text
    assert "| kmeans_assign | 2 | 4 |" in text and "**plan and permutation**" in text
