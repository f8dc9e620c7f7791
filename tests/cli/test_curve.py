"""``vdit curve``: points, targets, plot."""

from __future__ import annotations

import json
import math
import sys

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


def point(density, psnr, method="svg2", sparse_layers=None):
    sparse_layers = density if sparse_layers is None else sparse_layers
    return Point(method, "top_p", 0.5, density, sparse_layers, density, psnr, psnr, 0.9, 1.0, 1)


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
    assert all("toy model" in line and line.endswith("met.") for line in result.stdout.splitlines())


def test_table_and_lines_say_which_model_and_which_density(vdit):
    result = vdit(*SWEEP, "--methods", "draft", "--max-density", "1")
    assert "toy model" in result.stdout.splitlines()[0] and "density, sparse steps" in result.stdout
    assert "draft on the toy model: " in result.stdout and "in sparse steps" in result.stdout


def test_density_of_a_point_counts_the_dense_layers_of_its_steps(vdit):
    # One of two layers is dense, which alone keeps half.
    found = json.loads(vdit(*SWEEP, "--methods", "draft", "--set", "dense_layers=1", "--json").stdout)
    (only,) = found["points"]
    assert only["density"] == pytest.approx((1 + only["density_sparse_layers"]) / 2)
    assert found["targets"][0]["best"] is None


def test_target_is_judged_by_the_density_of_the_steps():
    found = target([point(0.45, 30.0, sparse_layers=0.34)], "svg2", 0.35, 26.0)
    assert not found["met"] and found["best"] is None


def test_target_takes_the_best_point_that_is_sparse_enough():
    points = [point(0.2, 25.0), point(0.34, 27.0), point(0.36, 30.0), point(0.1, 99.0, "draft")]
    found = target(points, "svg2", 0.35, 26.0)
    assert found["met"] and found["best"]["psnr"] == 27.0 and sentence(found, "toy").endswith("met.")
    missed = target(points[:1], "svg2", 0.35, 26.0)
    assert not missed["met"] and sentence(missed, "toy").endswith("not met.")
    nothing = target(points[2:3], "svg2", 0.35, 26.0)
    assert not nothing["met"] and nothing["best"] is None and "no point" in sentence(nothing, "toy")


def test_identical_clips_meet_any_target_and_stay_valid_json():
    found = target([point(0.3, math.inf)], "svg2", 0.35, 26.0)
    assert found["met"] and found["best"]["psnr"] is None and "identical" in sentence(found, "toy")
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--methods", "dense"), ("dense",)),
        (("--top-ps", "0.5,high"), ("--top-ps", "high")),
        (("--keep-ratios", "0"), ("above 0",)),
        (("--seeds", "one"), ("--seeds",)),
        (("--set", "svg2.top_p=0.5"), ("--set svg2.top_p", "--top-ps")),
        (("--set", "draft.sparsity=0.5"), ("--set draft.sparsity", "--keep-ratios")),
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
        raise compare.Unsupported("vdit_ext: no mask was expected, got one")

    monkeypatch.setattr(compare, "run_sparse", choke)
    refused(vdit(*SWEEP, "--quiet"), "mask")


def test_a_missing_matplotlib_is_said_before_sampling_where_there_is_a_plot(
    vdit, tiny, refused, monkeypatch, tmp_path
):
    for name in [n for n in sys.modules if n.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(vdit(*SWEEP, "--out", tmp_path / "curve"), " matplotlib;", "vdit-ext[video]")
    assert tiny.calls == 0 and not list(tmp_path.iterdir())
    assert vdit(*SWEEP, "--methods", "draft", "--quiet").exit_code == 0


def test_settings_without_a_taker_are_refused(vdit, tiny, refused):
    refused(vdit(*SWEEP, "--set", "svg1.seed=1"), "chosen method", "svg2, draft")
    assert tiny.calls == 0
