"""The whole command as users start it, on the packaged weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from vdit_ext.video import read_video

PROMPT = "a red disc bounces over blue stripes"


def vdit(*arguments):
    paths = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "vdit_ext.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)


def test_main_job(tmp_path):
    out = tmp_path / "clip.mp4"
    result = vdit("generate", "--prompt", PROMPT, "--method", "svg2", "--steps", "3", "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert (
        record["model"] == "toy" and 0 < record["density"] < 1 and 0 < record["ssim"] < 1 and record["psnr"] > 0
    )
    clip, fps = read_video(out)
    assert clip.shape == (16, 384, 384, 3) and fps == 8 and (tmp_path / "clip.png").is_file()


@pytest.mark.slow
def test_svg2_is_close_to_dense_at_the_promised_density():
    """The defaults of `vdit curve` are the promise: at least 26 dB at a density of at most 0.35."""
    prompts = (
        part
        for prompt in (PROMPT, "a yellow square slides right over green checks")
        for part in ("--prompt", prompt)
    )
    result = vdit("curve", *prompts, "--methods", "svg2", "--top-ps", "0.4,0.5,0.6", "--json")
    assert result.returncode == 0, result.stderr
    (target,) = json.loads(result.stdout)["targets"]
    assert (target["max_density"], target["min_psnr"]) == (0.35, 26.0) and target["met"], target


def test_unknown_word(tmp_path):
    result = vdit(
        "generate", "--prompt", "a red walrus bounces over blue stripes", "--out", tmp_path / "clip.mp4"
    )
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "walrus" in result.stderr and not list(tmp_path.iterdir())
