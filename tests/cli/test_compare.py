"""``vdit compare``: table, list, report."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from vdit_cli_tiny import FRAMES, PROMPT

from vdit_ext.compare import build_method
from vdit_ext.video import read_video


def arguments(*more):
    return ("compare", "--prompt", PROMPT, "--steps", "3", *more)


def test_json_is_a_list_with_dense_first(vdit):
    records = json.loads(vdit(*arguments("--methods", "draft,dense,svg2", "--json")).stdout)
    assert [r["method"] for r in records] == ["dense", "draft", "svg2"]
    keys = {"method", "model", "density", "density_sparse_layers", "density_overall", "psnr", "ssim", "seconds"}
    for record in records:
        assert keys | {"speedup", "identical", "settings"} <= set(record) and record["model"] == "toy"
    assert records[0]["identical"] is True and records[0]["psnr"] is None and records[0]["density"] == 1
    assert records[1]["psnr"] > 10 and 0 < records[1]["density"] < 1


def test_table_has_a_row_for_each_method(vdit):
    result = vdit(*arguments("--quiet"))
    assert result.exit_code == 0 and result.stderr == ""
    for word in ("toy model", "density", "dense", "draft", "svg1", "svg2", "inf", "PSNR", "speedup"):
        assert word in result.stdout


def test_density_is_that_of_the_steps_with_their_dense_layers(vdit):
    # One of two layers is dense: half of attention is kept by it alone.
    found = json.loads(vdit(*arguments("--methods", "draft", "--set", "dense_layers=1", "--json")).stdout)[1]
    assert found["density"] == pytest.approx((1 + found["density_sparse_layers"]) / 2)
    assert found["density_sparse_layers"] < found["density"] <= found["density_overall"] < 1


FILES = ["dense.mp4", "draft.mp4", "report.html", "results.json", "sheet.png"]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_without_out_a_folder_here_gets_the_files_and_is_named(vdit):
    for _ in range(2):  # the second run replaces the files of the first
        result = vdit(*arguments("--methods", "draft"))
        assert result.exit_code == 0, result.stderr
        assert "vdit-compare/report.html" in result.stderr and "vdit-compare/sheet.png" in result.stderr
        assert names(Path.cwd()) == ["vdit-compare"] and names(Path("vdit-compare")) == FILES


def test_without_out_json_writes_nothing(vdit):
    assert vdit(*arguments("--methods", "draft", "--json")).exit_code == 0
    assert names(Path.cwd()) == []


def test_without_out_a_folder_of_others_is_left_alone(vdit, tiny, refused):
    Path("vdit-compare").mkdir()
    assert vdit(*arguments("--methods", "draft")).exit_code == 0  # it was empty
    Path("vdit-compare/results.json").unlink()  # now it no longer looks like ours
    before, calls = names(Path("vdit-compare")), tiny.calls
    refused(vdit(*arguments("--methods", "draft")), "vdit-compare", "--out")
    assert names(Path("vdit-compare")) == before and tiny.calls == calls


def test_without_out_a_file_in_the_way_is_refused(vdit, tiny, refused):
    Path("vdit-compare").write_text("mine")
    refused(vdit(*arguments("--methods", "draft")), "is a file")
    assert tiny.calls == 0 and Path("vdit-compare").read_text() == "mine"


def test_fps_is_that_of_the_written_clips(vdit, tmp_path):
    assert vdit(*arguments("--methods", "draft", "--out", tmp_path, "--fps", "24")).exit_code == 0
    assert read_video(tmp_path / "dense.mp4")[1] == read_video(tmp_path / "draft.mp4")[1] == 24


@pytest.mark.parametrize("fps", ["0", "-8", "nan", "fast"])
def test_frame_rates_that_make_no_clip_are_refused(vdit, tiny, fps):
    result = vdit(*arguments("--fps", fps))
    assert result.exit_code == 2 and tiny.calls == 0


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("av", "av"),
        ("PIL", "pillow"),
        ("diffusers", "diffusers"),
        ("transformers", "transformers"),
        ("torchmetrics", "torchmetrics"),
    ],
)
def test_a_missing_package_is_named_before_sampling(vdit, tiny, refused, monkeypatch, module, package):
    hide(monkeypatch, module)
    refused(vdit(*arguments("--methods", "draft")), f" {package};", "pip install 'vdit-ext[video]'")
    assert tiny.calls == 0 and names(Path.cwd()) == []


def hide(monkeypatch, module):
    """Make a package look as if it were not installed."""
    for name in [n for n in sys.modules if n == module or n.startswith(module + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)


def test_what_is_not_needed_may_be_missing(vdit, monkeypatch):
    hide(monkeypatch, "av")
    assert vdit(*arguments("--methods", "draft", "--json")).exit_code == 0


def test_settings_reach_their_method_only(vdit):
    settings = ("--set", "svg2.top_p=0.5", "--set", "dense_step_fraction=0", "--keep-ratio", "0.5")
    _, draft, svg2 = json.loads(vdit(*arguments("--methods", "draft,svg2", *settings, "--json")).stdout)
    assert svg2["settings"]["top_p"] == 0.5 and svg2["settings"]["dense_step_fraction"] == 0
    assert draft["settings"]["sparsity"] == 0.5 and draft["settings"]["dense_step_fraction"] == 0


def test_folder_holds_report_sheet_results_and_clips(vdit, tmp_path):
    out = tmp_path / "report"
    result = vdit(*arguments("--methods", "svg2,draft", "--out", out))
    assert result.exit_code == 0, result.stderr
    assert names(out) == [*FILES, "svg2.mp4"] and names(tmp_path) == ["report"]
    assert len(read_video(out / "svg2.mp4")[0]) == FRAMES
    Image.open(out / "sheet.png").load()
    results = json.loads((out / "results.json").read_text())
    assert [r["method"] for r in results["results"]] == ["dense", "svg2", "draft"] and results["machine"]
    page = (out / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 3 and page.count("data:image/png;base64,") == 1
    assert PROMPT in page and results["versions"]["torch"] in page
    # Self-contained: every address in it is a data address.
    assert all(address.startswith("data:") for address in re.findall(r'(?:src|href)="([^"]{0,40})', page))


def test_an_existing_folder_keeps_its_other_files(vdit, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert vdit(*arguments("--methods", "draft", "--out", tmp_path)).exit_code == 0
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "report.html").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--methods", "svg2,fast"), ("'fast'",)),
        (("--methods", "svg2,svg2"), ("svg2", "once")),
        (("--prompt", "a red cube"), ("cube",)),
        (("--out", "/proc/nothing"), ("writable",)),
        (("--methods", "draft,svg1", "--top-p", "0.5"), ("--top-p", "svg2", "dense, draft, svg1")),
        (("--methods", "svg2", "--density", "0.5"), ("--density", "svg1, draft")),
        (("--methods", "dense", "--set", "seed=1"), ("dense has none",)),
        (("--methods", "draft", "--set", "svg2.top_p=0.5"), ("chosen method", "svg2.top_p=0.5")),
        (("--set", "dense.seed=1"), ("dense has none",)),
    ],
)
def test_bad_input_is_one_sentence(vdit, tiny, refused, change, words):
    refused(vdit(*arguments(*change)), *words)
    assert tiny.calls == 0


SVG2, SVG1, DRAFT = "svg2", "svg1", "draft"


@pytest.mark.parametrize(
    ("method", "key", "text", "value"),
    [
        (SVG2, "zero_step_kmeans_init", "0", False),
        (SVG2, "zero_step_kmeans_init", "no", False),
        (SVG2, "zero_step_kmeans_init", "Yes", True),
        (SVG2, "zero_step_kmeans_init", "1", True),
        (SVG2, "tolerance", "none", None),
        (SVG2, "tolerance", "1", 1.0),
        (SVG2, "seed", "1", 1),
        (SVG2, "top_p", "1", 1.0),
        (SVG2, "init", "random", "random"),
        (SVG1, "sample_limit", "None", None),
        (SVG1, "sample_limit", "5000", 5000),
        (DRAFT, "tile", "4x8", (4, 8)),
        (DRAFT, "swap_portrait", "false", False),
    ],
)
def test_a_setting_gets_the_type_of_its_annotation(method, key, text, value):
    found = getattr(build_method(method, ["toy"], {key: text}), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("method", "key", "text"),
    [
        (SVG2, "seed", "none"),
        (SVG2, "seed", "-1"),
        (SVG2, "seed", "true"),
        (SVG2, "top_p", "none"),
        (SVG2, "top_p", "true"),
        (SVG2, "top_p", "nan"),
        (SVG2, "flow_shift", "inf"),
        (SVG2, "num_q_clusters", "true"),
        (SVG2, "num_q_clusters", "1.5"),
        (SVG2, "zero_step_kmeans_init", "none"),
        (SVG2, "zero_step_kmeans_init", "0.0"),
        (SVG2, "tolerance", "false"),
        (SVG2, "init", "none"),
        (SVG1, "sample_limit", "-5"),
        (DRAFT, "tile", "none"),
        (DRAFT, "tile", "8"),
        (DRAFT, "tile", "8,wide"),
    ],
)
def test_a_setting_of_another_type_is_one_sentence(method, key, text):
    with pytest.raises(ValueError, match=f"{key} must be ") as caught:
        build_method(method, ["toy"], {key: text})
    assert "\n" not in str(caught.value) and str(caught.value).lower().startswith(("svg", "draft"))


def test_a_setting_that_a_method_chokes_on_is_refused(vdit, tiny, refused, monkeypatch):
    def choke(*_args):
        raise TypeError("svg2: top_p must be a number, got a list")

    monkeypatch.setattr(tiny, "method", choke)
    refused(vdit(*arguments("--methods", "svg2")), "top_p")
    assert tiny.calls == 0


def test_interruption_leaves_no_folder(vdit, tiny, tmp_path, monkeypatch):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "sample", interrupt)
    assert vdit(*arguments("--out", tmp_path / "report")).exit_code == 130
    assert not list(tmp_path.iterdir())
