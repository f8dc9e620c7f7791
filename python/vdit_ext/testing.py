"""What tests and benches share: comparison with a useful report, devices, seeds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Largest absolute error, as a share of the reference's largest magnitude, that rounding explains: inputs and
# probabilities are rounded once to the dtype, sums are fp32.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Difference:
    """How far ``actual`` is from ``expected``.

    Attributes:
        absolute: largest absolute difference over finite entries.
        relative: that, over the largest magnitude expected.
        cosine: 1 - cosine of the two as vectors.
        worst: index of the largest difference.
    """

    absolute: float
    relative: float
    cosine: float
    worst: tuple[int, ...]


def difference(actual: Tensor, expected: Tensor) -> Difference:
    """Compare two tensors of one shape in fp64; entries that are not finite in ``expected`` are left out."""
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    finite = e.isfinite()
    gap = torch.where(finite, (a - e).abs().nan_to_num(nan=torch.inf), 0.0)
    if gap.numel() == 0:
        return Difference(0.0, 0.0, 0.0, ())
    a, e = torch.where(finite, a, 0.0), torch.where(finite, e, 0.0)
    norm = a.norm() * e.norm()
    cosine = 1 - float((a * e).sum() / norm) if norm > 0 else float((a - e).norm() > 0)
    worst = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
    absolute = float(gap.max())
    return Difference(absolute, absolute / max(float(e.abs().max()), 1e-30), cosine, worst)


def assert_close(
    actual: Tensor, expected: Tensor, *, tolerance: float | None = None, what: str = "result"
) -> None:
    """Fail with absolute, relative and cosine error and the worst index unless the two agree.

    Args:
        tolerance: bound on the absolute error as a share of the largest magnitude expected (at least 1 is
            assumed for it, so that a result near 0 is not held to its own noise); by default by the dtype of
            ``actual``. Non-finite entries must agree exactly in kind and place.
    """
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    tolerance = TOLERANCE.get(actual.dtype, 0.0) if tolerance is None else tolerance
    a, e = actual.detach().cpu(), expected.detach().cpu()
    for name, kind in (("NaN", torch.isnan), ("+Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        wrong = kind(a.double()) != kind(e.double())
        assert not wrong.any(), (
            f"{what}: {name} disagrees at {wrong.nonzero()[0].tolist()} ({int(wrong.sum())} entries)"
        )
    gap = difference(a, e)
    finite = e.double()[e.double().isfinite()]
    bound = tolerance * max(1.0, float(finite.abs().max()) if finite.numel() else 1.0)
    assert gap.absolute <= bound, (
        f"{what}: absolute error {gap.absolute:.3e} over {bound:.3e} at {gap.worst} "
        f"(relative {gap.relative:.3e}, 1 - cosine {gap.cosine:.3e})"
    )


def generator(seed: int) -> torch.Generator:
    """A CPU generator, so that draws are the same on every device."""
    return torch.Generator().manual_seed(seed)
