"""bench/run_cost.py counts what it says it counts."""

from __future__ import annotations

import numpy as np
import pytest
import run_cost


def test_runs_are_cut_where_windows_end():
    runs, windows = run_cost.runs_of(np.array([100, 60, 5]), 128)
    assert runs.tolist() == [100, 28, 32, 5] and windows == 2


def test_counts_by_hand():
    # Runs of 100 and 28, then 32 and 5, in two windows of 128; D = 64 is one slab.
    found = run_cost.count(np.array([100, 60, 5]), 128, 128)
    assert found["binary"] == (pytest.approx((3 + 3 + 1 + 2) / 2), pytest.approx(256 / 165))
    # 100 = 96 + 4 and 28 = 24 + 4 gain nothing; no rest of two bits follows more than 8 rows.
    assert found["overlap"][0] == found["binary"][0]
    assert run_cost.count(np.array([103]), 128, 128)["overlap"][0] == 3  # 64, 32 and the last 8
    # 104, 64 and 8 rows: 104 and 24, then 40 and 8.
    assert found["atoms"] == (pytest.approx((3 + 2 + 2 + 1) / 2), pytest.approx(256 / 165))
    assert found["gather"][0] == 165 * 8 / 2


def test_paired_rests_take_half_the_tiles():
    sizes = np.array([128 + 40, 20, 100, 256])  # rests of 40, 20 and 100 rows
    assert run_cost.busy_rows(sizes, 128, paired=False) == pytest.approx(6 * 128 / sizes.sum())
    assert run_cost.busy_rows(sizes, 128, paired=True) == pytest.approx(5 * 128 / sizes.sum())


def test_sizes_add_up():
    sizes = run_cost.cluster_sizes(1000, 7, np.random.default_rng(1))
    assert sizes.sum() == 1000 and len(sizes) == 7 and (sizes >= 0).all()
