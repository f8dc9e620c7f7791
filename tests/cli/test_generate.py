"""``vdit generate``: what it writes, prints and refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from vdit_cli_tiny import FPS, FRAMES, PROMPT, SIZE

import vdit_ext.video
from vdit_ext import compare, toyworld
from vdit_ext.cli.console import Reporter
from vdit_ext.integrations import processors
from vdit_ext.sparse import SVG2
from vdit_ext.video import read_video, viewing_scale

TINY = Path(__file__).with_name("vdit_cli_tiny.py")
KEYS = {
    "method", "density", "density_sparse_layers", "density_overall", "psnr", "ssim", "identical", "seconds", "seconds_dense", "speedup",
    "settings", "frames_sha256", "prompt", "seed", "steps", "guidance", "model", "frames", "height", "width", "fps",
    "machine", "versions", "out", "sheet", "quant",
}  # fmt: skip


def arguments(out, *more):
    return ("generate", "--prompt", PROMPT, "--steps", "3", "--out", out, *more)


@pytest.mark.parametrize("method", ["svg2", "svg1", "draft", "dense"])
def test_writes_clip_and_sheet_and_ends_with_one_line(vdit, tmp_path, method):
    out = tmp_path / "clip.mp4"
    result = vdit(*arguments(out, "--method", method))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1 and result.stdout.startswith(f"{method} on the toy model: ")
    clip, fps = read_video(out)
    scale = viewing_scale(SIZE, SIZE)
    assert clip.shape == (FRAMES, SIZE * scale, SIZE * scale, 3) and fps == FPS
    rows = 1 if method == "dense" else 3
    with Image.open(tmp_path / "clip.png") as sheet:
        sheet.load()
        assert sheet.height > rows * 176 and sheet.width > FRAMES * 176
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "clip.png"]


def test_line_has_density_quality_and_both_times(vdit, tmp_path):
    line = vdit(*arguments(tmp_path / "clip.mp4", "--method", "draft", "--density", "0.4")).stdout
    assert re.fullmatch(
        r"draft on the toy model: density 0\.\d{3} in sparse steps, 0\.\d{3} overall; "
        r"PSNR \d+\.\d\d dB, SSIM 0\.\d{4} against dense; \d+\.\d\d? s, dense \d+\.\d\d? s\n",
        line,
    ), line


def test_json_is_one_object_with_the_documented_keys(vdit, tmp_path):
    result = vdit(*arguments(tmp_path / "clip.mp4", "--method", "svg2", "--json"))
    record = json.loads(result.stdout)
    assert set(record) == KEYS
    assert 0 < record["density"] <= 1 and record["density"] <= record["density_overall"] <= 1
    assert record["psnr"] > 10 and 0 < record["ssim"] <= 1 and record["identical"] is False
    assert record["settings"]["num_q_clusters"] == SVG2.preset("toy").num_q_clusters
    assert (record["frames"], record["height"], record["width"]) == (FRAMES, SIZE, SIZE)


def test_everything_kept_is_close_to_dense_and_less_kept_is_farther(vdit, tmp_path):
    def psnr(top_p):
        result = vdit(*arguments(tmp_path / "clip.mp4", "--top-p", top_p, "--set", "min_kc_ratio=0", "--json"))
        record = json.loads(result.stdout)
        return float("inf") if record["identical"] else record["psnr"], record["density"]

    full, half = psnr(1), psnr(0.3)
    assert full[1] == 1 and half[1] < 0.7
    assert full[0] > half[0] + 10


def test_identical_clips_have_no_psnr_in_json_and_inf_in_words(vdit, tmp_path):
    always_dense = ("--method", "svg2", "--set", "dense_step_fraction=1")
    record = json.loads(vdit(*arguments(tmp_path / "clip.mp4", *always_dense, "--json")).stdout)
    assert record["identical"] is True and record["psnr"] is None and record["ssim"] == 1
    assert record["density"] is None and record["density_overall"] == 1
    line = vdit(*arguments(tmp_path / "clip.mp4", *always_dense)).stdout
    assert "PSNR inf dB" in line and "no step was sparse" in line


def test_without_comparison_there_is_one_run(vdit, tiny, tmp_path):
    record = json.loads(vdit(*arguments(tmp_path / "clip.mp4", "--no-compare", "--json")).stdout)
    assert tiny.calls == 2  # the warm-up and the clip
    assert record["psnr"] is None and record["identical"] is None and record["seconds_dense"] is None


def test_same_command_twice_gives_the_same_frames(vdit, tmp_path):
    records = [json.loads(vdit(*arguments(tmp_path / f"{i}.mp4", "--json")).stdout) for i in range(2)]
    assert records[0]["frames_sha256"] == records[1]["frames_sha256"]
    # The files may differ: x264 does not always code the same pixels into the same bytes.
    other = json.loads(vdit(*arguments(tmp_path / "2.mp4", "--seed", "1", "--json")).stdout)
    assert other["frames_sha256"] != records[0]["frames_sha256"]


def test_quiet_prints_the_line_and_nothing_else(vdit, tmp_path):
    quiet = vdit(*arguments(tmp_path / "clip.mp4", "--quiet"))
    assert quiet.stderr == "" and quiet.stdout.count("\n") == 1
    loud = vdit(*arguments(tmp_path / "clip.mp4"))
    assert loud.stderr.splitlines()[0].startswith("dense: 3 of 3 in ") and "svg2: 3 of 3" in loud.stderr


def test_progress_has_the_time_left(vdit, tmp_path, monkeypatch):
    monkeypatch.setattr(Reporter, "SECONDS_BETWEEN_LINES", 0.0)
    result = vdit(*arguments(tmp_path / "clip.mp4"))
    assert re.search(r"^svg2: 2 of 3, \d+ s left$", result.stderr, re.M), result.stderr


def test_progress_is_bars_on_a_terminal(vdit, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = vdit(*arguments(tmp_path / "clip.mp4"))
    assert result.exit_code == 0 and "━" in result.stderr and "left" in result.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--prompt", "a mauve disc bounces over blue stripes"), ("mauve",)),
        (("--method", "fast"), ("svg2", "'fast'")),
        (("--top-p", "3"), ("top_p", "3")),
        (("--set", "top_q=1"), ("top_q", "top_p")),
        (("--set", "top_p"), ("name=value",)),
        (("--set", "top_p=high"), ("a number", "high")),
        (("--set", "svg9.top_p=1"), ("svg9",)),
        (("--density", "0.3"), ("--density", "svg1, draft", "svg2")),
        (("--method", "svg1", "--top-p", "0.5"), ("--top-p", "svg2", "svg1")),
        (("--method", "draft", "--top-p", "0.5"), ("--top-p", "svg2", "draft")),
        (("--method", "dense", "--top-p", "0.5"), ("--top-p", "dense")),
        (("--method", "dense", "--keep-ratio", "0.5"), ("--keep-ratio", "dense")),
        (("--method", "dense", "--set", "seed=1"), ("dense has none", "seed=1")),
        (("--method", "dense", "--set", "dense.seed=1"), ("dense has none", "seed=1")),
        (("--method", "dense", "--set", "svg2.seed=1"), ("chosen method", "svg2.seed=1")),
        (("--set", "svg1.density=0.3"), ("chosen method", "(svg2)", "svg1.density=0.3")),
        (("--set", "dense.seed=1"), ("dense has none",)),
        (("--set", "seed=none"), ("seed", "a whole number", "none")),
        (("--set", "top_p=true"), ("top_p", "a number", "true")),
        (("--set", "zero_step_kmeans_init=2"), ("true or false", "2")),
        (("--set", "num_q_clusters=1.5"), ("a whole number", "1.5")),
        (("--size", "64x64"), ("96 by 96",)),
        (("--size", "big"), ("832x480", "big")),
        (("--device", "cpu"), ("--model",)),
        (("--model", "/nowhere/at/all"), ("/nowhere/at/all",)),
    ],
)
def test_bad_input_is_one_sentence(vdit, tiny, refused, tmp_path, change, words):
    refused(vdit(*arguments(tmp_path / "clip.mp4", *change)), *words)
    assert tiny.calls == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("clip.gif", ("ending in .mp4",)),
        ("missing/clip.mp4", ("mkdir",)),
        ("folder.mp4", ("is a folder",)),
        ("taken.mp4", ("taken.png", "is a folder")),
        ("/proc/clip.mp4", ("writable",)),
    ],
)
def test_unwritable_path_is_refused_before_sampling(vdit, tiny, refused, tmp_path, out, words):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "taken.png").mkdir()
    refused(vdit(*arguments(tmp_path / out)), *words)
    assert tiny.calls == 0 and sorted(p.name for p in tmp_path.iterdir()) == ["folder.mp4", "taken.png"]


def test_a_folder_without_a_pipeline_is_refused(vdit, refused, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    refused(vdit(*arguments(tmp_path / "clip.mp4", "--model", model)), "model_index.json")
    (model / "model_index.json").write_text(
        '{"_class_name": "FluxPipeline", "transformer": ["diffusers", "Flux"]}'
    )
    refused(vdit(*arguments(tmp_path / "clip.mp4", "--model", model)), "WanTransformer3DModel", "Flux")


def test_a_failure_leaves_what_was_there(vdit, tmp_path, monkeypatch):
    out = tmp_path / "clip.mp4"
    out.write_bytes(b"an earlier clip")

    def fail(path, *_args, **_kwargs):
        Path(path).write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(vdit_ext.video, "write_video", fail)
    result = vdit(*arguments(out))
    assert (
        result.exit_code == 1
        and "disk full" in result.stderr
        and result.stderr.splitlines()[-1].startswith("vdit: ")
    )
    assert out.read_bytes() == b"an earlier clip" and [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_defect_of_a_method_is_a_failure_and_has_a_traceback(vdit, tmp_path, monkeypatch):
    def plan(*_args, **_kwargs):
        raise ValueError("a defect")

    monkeypatch.setattr(SVG2, "plan", plan)
    monkeypatch.setenv("VDIT_DEBUG", "1")
    result = vdit(*arguments(tmp_path / "clip.mp4"))
    assert result.exit_code == 1 and "internal failure, ValueError: a defect" in result.stderr
    assert "Traceback" in result.stderr and "in plan" in result.stderr and not list(tmp_path.iterdir())


def test_what_the_kernels_cannot_serve_and_only_the_call_shows_is_refused(vdit, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(processors, "kernel_gap", lambda *_: "head_dim must be 64, got 72")
    refused(vdit(*arguments(tmp_path / "clip.mp4", "--quiet")), "head_dim must be 64")


def test_a_defect_while_loading_is_a_failure(vdit, tmp_path, monkeypatch):
    def fail():
        raise ImportError("a defect")

    monkeypatch.setattr(compare.ToySampler, "load", fail)
    assert vdit(*arguments(tmp_path / "clip.mp4")).exit_code == 1


def test_a_refusal_shows_where_it_comes_from_under_debug(vdit, tmp_path, monkeypatch):
    monkeypatch.setenv("VDIT_DEBUG", "1")
    result = vdit(*arguments(tmp_path / "clip.mp4", "--top-p", "3"))
    assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith("vdit: ")
    # The refusal and the ValueError behind it.
    assert result.stderr.count("Traceback") == 2 and "__post_init__" in result.stderr


def test_a_missing_package_is_named_before_sampling(vdit, tiny, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    refused(vdit(*arguments(tmp_path / "clip.mp4")), " av;", "pip install 'vdit-ext[video]'")
    assert tiny.calls == 0 and not list(tmp_path.iterdir())


def test_a_toy_pipeline_without_diffusers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "vdit_ext.toyworld.pipeline", raising=False)
    monkeypatch.delattr(toyworld, "pipeline", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'vdit-ext\[video\]'"):
        toyworld.load_pipeline  # noqa: B018


def test_fps_is_that_of_the_clip(vdit, tmp_path):
    record = json.loads(vdit(*arguments(tmp_path / "clip.mp4", "--fps", "12.5", "--json")).stdout)
    assert record["fps"] == 12.5 and read_video(tmp_path / "clip.mp4")[1] == 12.5


def test_interruption_in_the_middle_leaves_nothing(vdit, tiny, tmp_path, monkeypatch):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "sample", interrupt)
    result = vdit(*arguments(tmp_path / "clip.mp4"))
    assert result.exit_code == 130 and "interrupted" in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_with_130_and_leaves_nothing(tmp_path, kind):
    out, marker = tmp_path / "out", tmp_path / "marker"
    out.mkdir()
    environment = os.environ | {"VDIT_TINY_WAIT": "0.3", "VDIT_TINY_MARKER": str(marker)}
    command = [sys.executable, str(TINY), *map(str, arguments(out / "clip.mp4", "--steps", "500", "--json"))]
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job, as this test may be one, ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        for _ in range(600):
            if marker.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(kind)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == "" and "interrupted" in stderr and "Traceback" not in stderr
    assert not list(out.iterdir())
