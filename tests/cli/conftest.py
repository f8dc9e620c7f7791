"""Running the command in this process, with the tiny model in place of the toy model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.append(str(HERE))  # behind tests/, whose helpers it must not shadow


@pytest.fixture
def tiny(monkeypatch):
    """The sampler that commands get instead of the toy model; loaded once."""
    import torch
    from vdit_cli_tiny import TinySampler

    from vdit_ext import compare

    sampler = TinySampler()
    monkeypatch.setattr(compare.ToySampler, "load", lambda: sampler)
    # Its ops take microseconds; on busy cores, threads that wait for each other would take milliseconds.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield sampler
    torch.set_num_threads(threads)


@pytest.fixture
def vdit(tiny, tmp_path_factory, monkeypatch):
    """Call the command with arguments, in an empty folder; the result has exit_code, stdout and stderr."""
    from typer.testing import CliRunner

    from vdit_ext.cli import app

    monkeypatch.chdir(tmp_path_factory.mktemp("here"))  # where `vdit compare` writes without --out

    def call(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call


@pytest.fixture
def refused():
    """Check that a call was refused: exit code 2, one sentence on stderr, nothing on stdout."""

    def check(result, *words):
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        lines = result.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("vdit: ") and lines[0].endswith((".", "!", "?")), lines
        for word in words:
            assert word in lines[0], lines[0]

    return check
