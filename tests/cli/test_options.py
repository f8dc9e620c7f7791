"""Devices that are not there, and where the helpers of this folder stand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from vdit_ext.cli.errors import Refusal
from vdit_ext.cli.options import check_device

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize(("count", "there"), [(1, "(cuda:0)"), (2, "(cuda:0 to cuda:1)")])
def test_a_device_beyond_the_last_is_refused(monkeypatch, count, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for device in ("cpu", "cuda", "cuda:0", f"cuda:{count - 1}"):
        check_device(device)
    for device in (f"cuda:{count}", "cuda:7"):
        with pytest.raises(Refusal) as caught:
            check_device(device)
        assert there in str(caught.value) and device in str(caught.value)


def test_this_folder_stands_behind_the_tests_folder():
    assert sys.path.index(str(HERE.parent)) < sys.path.index(str(HERE))
