"""Prints one digest of all in the linear family that is the same everywhere: sums, outputs, expanded weights, codes."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cases import linear as cases

import vdit_ext  # noqa: F401  loads the op libraries


def digest() -> str:
    found = hashlib.sha256()

    def add(t: torch.Tensor) -> None:
        found.update(t.contiguous().numpy().tobytes())

    for case in cases.corner + cases.blocks + cases.odd_k + cases.extreme[:1]:
        for format in cases.FORMATS:
            inputs = cases.make_linear(case, format).raw()
            add(getattr(torch.ops.vdit, inputs.op)(*inputs.args, **inputs.kwargs))
            if format != "int8":
                add(getattr(torch.ops.vdit, inputs.op)(*inputs.args, **inputs.kwargs, path="expand"))
    for case in cases.epilogues:
        for format in ("int8", "int4"):
            inputs = cases.make_linear(case, format, torch.float32)
            add(getattr(torch.ops.vdit, inputs.op)(*inputs.args, **inputs.kwargs))
    for case in cases.plain_rows:
        inputs = cases.make_rows(case, torch.bfloat16)
        for t in torch.ops.vdit.quantize_rows(inputs.x, **inputs.kwargs):
            add(t)
    return found.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(digest())
