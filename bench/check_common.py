"""What the check_<family>.py share: where the ops under test run, and comparison to the bit."""

from __future__ import annotations

import torch
from cases import attention as cases
from torch import Tensor

import vdit_ext


class Backend:
    """Where the ops under test run, and what they are compared with.

    Attributes:
        definitions: the family's module in vdit_ext.ops, which holds the ``<op>_naive``.
    """

    definitions = None

    def __init__(self, name: str) -> None:
        self.name, self.device = name, "cuda" if name == "cuda" else "cpu"
        if name == "cuda":
            if not torch.cuda.is_available():
                raise SystemExit("torch sees no GPU")
            if vdit_ext.ops.LIBRARIES["cuda"] != "loaded":
                raise SystemExit(f"CUDA library {vdit_ext.ops.LIBRARIES['cuda']}")
        if name == "emu":
            from build_emu import build_emulator

            torch.ops.load_library(str(build_emulator()))
        self.ops = torch.ops.vdit_emu if name == "emu" else torch.ops.vdit
        # The CPU kernels are the yardstick of CUDA code; they themselves are held to the definitions.
        self.is_cuda_code = name != "cpu"

    def dtypes(self, *, attention: bool = False) -> tuple[torch.dtype, ...]:
        halves = (torch.bfloat16, torch.float16)
        return halves if attention and self.is_cuda_code else (torch.float32, *halves)

    def expected(self, op: str, *args, **kwargs):
        if self.is_cuda_code:
            return getattr(torch.ops.vdit, op)(*args, **kwargs)
        return getattr(self.definitions, f"{op}_naive")(*args, **kwargs)

    def run(self, op: str, *args, **kwargs):
        moved = [cases.as_it_lies(a, self.device) if isinstance(a, Tensor) else a for a in args]
        named = {n: cases.as_it_lies(a, self.device) if isinstance(a, Tensor) else a for n, a in kwargs.items()}
        return getattr(self.ops, op)(*moved, **named)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def alive(self) -> bool:
        """Whether the device still works after an error."""
        try:
            self.synchronize()
            return self.device == "cpu" or float(torch.ones(1, device="cuda")) == 1.0
        except Exception:
            return False


def short_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, str(dtype))


def same(got, expected, what: str) -> None:
    assert torch.equal(got.cpu(), expected.cpu()), (
        f"{what}: {int((got.cpu() != expected.cpu()).sum())} entries differ"
    )
