"""Which libraries are loaded and what their ops are called."""

from __future__ import annotations

import vdit_ext
from vdit_ext.ops import _library


def test_the_namespace_is_the_one_the_build_wrote_down(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "library_dir", lambda: tmp_path)
    (tmp_path / "namespace.txt").write_text("kernels_hub_vdit\n")
    assert _library.op_namespace() == "kernels_hub_vdit"


def test_this_build_says_its_namespace():
    assert (vdit_ext.ops.library_dir() / "namespace.txt").read_text().strip() == vdit_ext.ops.NAMESPACE
