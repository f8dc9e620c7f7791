"""``vdit curve``: points, targets, plot."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image
from vdit_cli_tiny import PROMPT

from vdit_ext import compare
from vdit_ext.cli.curve import Point, sentence, target

SWEEP = (
    "curve",
    "--prompt",
    PROMPT,
    "--steps",
    "3",
    "--top-ps",
    "0.3,1",
    "--keep-ratios",
    "0.5",
    "--seeds",
    "0,1",
)


def point(density, psnr, method="svg2"):
    return Point(method, "top_p", 0.5, density, density, psnr, psnr, 0.9, 1.0, 1)


def test_json_has_every_point_and_a_target_for_each_method(vdit, tmp_path):
    out = tmp_path / "curve"
    result = json.loads(vdit(*SWEEP, "--json", "--out", out).stdout)
    assert [(p["method"], p["value"]) for p in result["points"]] == [
        ("svg2", 0.3),
        ("svg2", 1.0),
        ("draft", 0.5),
    ]
    assert all(p["runs"] == 2 and 0 < p["density"] <= 1 for p in result["points"])
    assert result["points"][0]["density"] < result["points"][1]["density"] == 1
    assert [t["method"] for t in result["targets"]] == ["svg2", "draft"]
    assert [(c["prompt"], c["seed"]) for c in result["clips"]] == [(PROMPT, 0), (PROMPT, 1)]
    assert json.loads((out / "curve.json").read_text()) == result
    Image.open(out / "curve.png").load()
    assert sorted(p.name for p in out.iterdir()) == ["curve.json", "curve.png"]


def test_quiet_prints_one_line_for_each_method(vdit):
    result = vdit(*SWEEP, "--quiet", "--max-density", "1", "--min-psnr", "1")
    assert result.stderr == "" and result.stdout.count("\n") == 2
    assert all(line.endswith("met.") for line in result.stdout.splitlines())


def test_target_takes_the_best_point_that_is_sparse_enough():
    points = [point(0.2, 25.0), point(0.34, 27.0), point(0.36, 30.0), point(0.1, 99.0, "draft")]
    found = target(points, "svg2", 0.35, 26.0)
    assert found["met"] and found["best"]["psnr"] == 27.0 and sentence(found).endswith("met.")
    missed = target(points[:1], "svg2", 0.35, 26.0)
    assert not missed["met"] and sentence(missed).endswith("not met.")
    nothing = target(points[2:3], "svg2", 0.35, 26.0)
    assert not nothing["met"] and nothing["best"] is None and "no point" in sentence(nothing)


def test_identical_clips_meet_any_target_and_stay_valid_json():
    found = target([point(0.3, math.inf)], "svg2", 0.35, 26.0)
    assert found["met"] and found["best"]["psnr"] is None and "identical" in sentence(found)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--methods", "dense"), ("dense",)),
        (("--top-ps", "0.5,high"), ("--top-ps", "high")),
        (("--keep-ratios", "0"), ("above 0",)),
        (("--seeds", "one"), ("--seeds",)),
    ],
)
def test_bad_input_is_one_sentence(vdit, tiny, refused, change, words):
    refused(vdit(*SWEEP, *change), *words)
    assert tiny.calls == 0


@pytest.mark.parametrize(
    "setting", ["dense_step_fraction=1", "svg2.dense_layer_fraction=1", "draft.dense_layers=2"]
)
def test_all_dense_is_refused_before_sampling(vdit, tiny, refused, setting):
    refused(vdit(*SWEEP, "--set", setting), "sparse step")
    assert tiny.calls == 0


def test_all_dense_by_the_timesteps_is_refused_after_sampling(vdit, tiny, refused):
    # Below the last timestep that the schedule has, which only the sampling shows.
    result = vdit(*SWEEP, "--methods", "draft", "--set", "dense_above=1", "--quiet")
    refused(result, "sparse step")
    assert tiny.calls > 0


def test_what_shows_only_in_the_call_is_refused(vdit, refused, monkeypatch):
    def choke(*_args):
        raise ValueError("vdit_ext: no mask was expected, got one")

    monkeypatch.setattr(compare, "run_sparse", choke)
    refused(vdit(*SWEEP, "--quiet"), "mask")


def test_settings_without_a_taker_are_refused(vdit, tiny, refused):
    refused(vdit(*SWEEP, "--set", "svg1.seed=1"), "chosen method", "svg2, draft")
    assert tiny.calls == 0
