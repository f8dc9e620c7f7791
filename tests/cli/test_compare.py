"""``vdit compare``: table, list, report."""

from __future__ import annotations

import json
import re

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
    for record in records:
        assert {"method", "density", "psnr", "ssim", "seconds", "speedup", "identical"} <= set(record)
    assert records[0]["identical"] is True and records[0]["psnr"] is None and records[0]["density"] == 1
    assert records[1]["psnr"] > 10 and 0 < records[1]["density"] < 1


def test_table_has_a_row_for_each_method(vdit):
    result = vdit(*arguments("--quiet"))
    assert result.exit_code == 0 and result.stderr == ""
    for word in ("dense", "draft", "svg1", "svg2", "inf", "PSNR", "speedup"):
        assert word in result.stdout


def test_settings_reach_their_method_only(vdit):
    settings = ("--set", "svg2.top_p=0.5", "--set", "dense_step_fraction=0", "--keep-ratio", "0.5")
    _, draft, svg2 = json.loads(vdit(*arguments("--methods", "draft,svg2", *settings, "--json")).stdout)
    assert svg2["settings"]["top_p"] == 0.5 and svg2["settings"]["dense_step_fraction"] == 0
    assert draft["settings"]["sparsity"] == 0.5 and draft["settings"]["dense_step_fraction"] == 0


def test_folder_holds_report_sheet_results_and_clips(vdit, tmp_path):
    out = tmp_path / "report"
    result = vdit(*arguments("--methods", "svg2,draft", "--out", out))
    assert result.exit_code == 0, result.stderr
    names = ["dense.mp4", "draft.mp4", "report.html", "results.json", "sheet.png", "svg2.mp4"]
    assert sorted(p.name for p in out.iterdir()) == names and [p.name for p in tmp_path.iterdir()] == ["report"]
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
