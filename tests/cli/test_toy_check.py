"""The files that ``python -m vdit_ext.toyworld.check`` writes."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vdit_ext.toyworld import check, pipeline


@pytest.fixture
def run(monkeypatch):
    """Call the check on a pipeline that fails; with ``clips``, on an evaluation that returns those."""

    def call(*arguments, clips=None):
        def evaluate(*_args, **_kwargs):
            assert clips is not None, "sampled before the paths were checked"
            return {"rates": dict.fromkeys(check.PARTS, 1.0)}, clips

        monkeypatch.setattr(pipeline, "load_pipeline", lambda **_: None)
        monkeypatch.setattr(check, "evaluate", evaluate)
        return CliRunner().invoke(check.app, [str(argument) for argument in arguments])

    return call


def test_picture_and_record_need_no_imageio(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio", None)
    monkeypatch.setitem(sys.modules, "imageio.v3", None)
    picture, record = tmp_path / "sheet.png", tmp_path / "record.json"
    clips = [np.full((16, 96, 96, 3), value, np.uint8) for value in (0, 200)]
    result = run("--picture", picture, "--record", record, clips=clips)
    assert result.exit_code == 0, result.output
    assert json.loads(record.read_text())["rates"]["passed"] == 1
    with Image.open(picture) as sheet:
        assert sheet.mode == "RGB" and sheet.getpixel((10, 10)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--picture", "missing/sheet.png"), ("--picture", "missing")),
        (("--picture", "folder.png"), ("--picture", "folder.png")),
        (("--picture", "sheet.webm"), ("ending in .png", "sheet.webm")),
        (("--picture", "/proc/sheet.png"), ("--picture", "/proc/sheet.png")),
        (("--record", "missing/record.json"), ("--record", "missing")),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_before_sampling(run, tmp_path, arguments, words):
    (tmp_path / "folder.png").mkdir()
    option, name = arguments
    result = run(option, tmp_path / name)
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert result.stderr.count("\n") == 1 and all(word in result.stderr for word in words)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


def test_a_missing_pillow_is_one_sentence(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    result = run("--picture", tmp_path / "sheet.png")
    assert result.exit_code == 2 and "pillow" in result.stderr and result.stderr.count("\n") == 1
