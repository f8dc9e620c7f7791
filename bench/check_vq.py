"""The vq family's cases for check_cuda.py: CUDA kernels against the CPU kernels and the definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import check_attention
import torch
from cases import vq as cases

from vdit_ext.ops import vq as defs
from vdit_ext.testing import TOLERANCE, assert_close, generator

OPS = defs.OPS
Named = tuple[str, Callable[[], None]]
SIZES = [(1, 4), (33, 64), (70, 200), (5, 131), (1536, 1536)]


class Backend(check_attention.Backend):
    """Where the ops under test run, and what they are compared with."""

    def expected(self, op: str, *args, **kwargs):
        if self.is_cuda_code:
            return getattr(torch.ops.vdit, op)(*args, **kwargs)
        return getattr(defs, f"{op}_naive")(*args, **kwargs)


def named_cases(op: str, large: bool, backend: Backend) -> Iterator[Named]:
    """Name and check of every case of an op; a check raises AssertionError with what is wrong."""
    return globals()[f"{op}_cases"](backend, large)


def short_name(dtype: torch.dtype) -> str:
    return "int8" if dtype == torch.int8 else check_attention.short_name(dtype)


def vq_assign_cases(backend: Backend, large: bool) -> Iterator[Named]:
    for dim in (1, 2, 4, 7, 16):
        for words in (1, 67, 256, 20011):
            for count in (1, 2, 8):
                if count <= words:
                    name = f"D={dim} C={words} count={count}"
                    yield name, lambda d=dim, w=words, c=count: check_assign(backend, d, w, c)


def check_assign(backend: Backend, dim: int, words: int, count: int) -> None:
    vectors = torch.randn(301, dim, generator=generator(0))
    codebook = torch.randn(words, dim, generator=generator(1))
    indices, distances = backend.run("vq_assign", vectors, codebook, count)
    true = (vectors.double()[:, None] - codebook.double()).square().sum(-1)
    chosen = true.gather(1, indices.cpu().long()).float()
    assert_close(chosen, true.sort(1).values[:, :count].float(), tolerance=1e-5, what="nearest")
    assert_close(distances.cpu(), chosen, tolerance=1e-5, what="distances")


def vq_dequantize_cases(backend: Backend, large: bool) -> Iterator[Named]:
    for dim in cases.DIMS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int8):
            for n, k in SIZES:
                name = f"{n}x{k} D={dim} {short_name(dtype)}"
                yield name, lambda n=n, k=k, d=dim, t=dtype: check_dequantize(backend, n, k, d, t)


def check_dequantize(backend: Backend, n: int, k: int, dim: int, dtype: torch.dtype) -> None:
    codes, codebook = cases.make_codes(n, k, dim), cases.make_codebook(dim, dtype)
    out = backend.run("vq_dequantize", codes, codebook, n, k)
    assert torch.equal(out.cpu(), defs.vq_dequantize_naive(codes, codebook, n, k)), "not the codebook's words"


def vq_linear_cases(backend: Backend, large: bool) -> Iterator[Named]:
    listed = [*cases.corner, *cases.epilogues]
    if backend.name == "cuda":
        listed += [cases.LinearCase(f"m{m}", (m,), n=1152, k=1536, bias=True) for m in (1, 16, 64, 300, 4096)]
    for case in listed:
        for dtype in (torch.bfloat16, torch.float16, torch.int8):
            for dim in cases.DIMS:
                for path in ("auto", "fused", "expand"):
                    name = f"{case} D={dim} {short_name(dtype)} {path}"
                    yield name, lambda c=case, d=dim, t=dtype, p=path: check_linear(backend, c, d, t, p)


def check_linear(backend: Backend, case: cases.LinearCase, dim: int, dtype: torch.dtype, path: str) -> None:
    inputs = cases.make_linear(case, dim, dtype)
    out = backend.run("vq_linear", *inputs.args, **inputs.kwargs, path=path).cpu()
    tolerance = TOLERANCE[torch.bfloat16 if dtype == torch.int8 else dtype]
    assert_close(
        out, backend.expected("vq_linear", *inputs.args, **inputs.kwargs), tolerance=tolerance, what="out"
    )
    if dtype == torch.int8:
        raw = cases.make_linear(case, dim, dtype, torch.int32)
        raw.kwargs = {"out_dtype": torch.int32}
        sums = backend.run("vq_linear", *raw.args, **raw.kwargs, path=path).cpu()
        weight = defs.vq_dequantize_naive(raw.codes, raw.codebook, raw.out_features, raw.x.shape[-1])
        assert torch.equal(sums.double(), raw.x.double() @ weight.double().T), "sums are not exact"
