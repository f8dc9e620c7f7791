"""``vdit bench``: small sizes only; what it reports, not how fast it is."""

from __future__ import annotations

import json

import pytest
import torch

SMALL = ("bench", "--device", "cpu", "--tokens", "300", "--heads", "2", "--block", "64", "--repeats", "2")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_json_has_both_rows(vdit, dtype):
    result = vdit(*SMALL, "--dtype", dtype, "--density", "0.4", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    dense, sparse = record["results"]
    assert dense["speedup"] == 1 and dense["density"] == 1 and 0.3 < sparse["density"] < 0.5
    assert all(row["us"] > 0 and row["tflops"] > 0 for row in record["results"])
    assert record["machine"] and record["versions"]["torch"] == torch.__version__


def test_table_has_the_machine(vdit):
    result = vdit(*SMALL, "--quiet")
    assert result.exit_code == 0 and result.stderr == ""
    assert "vdit block-sparse" in result.stdout and "cores" in result.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--density", "0"), ("--density", "above 0")),
        (("--dtype", "int8"), ("bfloat16", "int8")),
        (("--device", "tpu"), ("tpu",)),
        (("--head-dim", "60"), ("60",)),
    ],
)
def test_bad_input_is_one_sentence(vdit, refused, change, words):
    refused(vdit(*SMALL, *change), *words)


def test_a_wrong_result_is_not_timed(vdit, monkeypatch):
    from vdit_ext import ops

    correct = ops.block_sparse_attention
    monkeypatch.setattr(ops, "block_sparse_attention", lambda *a, **k: (correct(*a, **k)[0] * 2, None))
    result = vdit(*SMALL, "--quiet")
    assert result.exit_code == 1 and "off by" in result.stderr and result.stdout == ""
