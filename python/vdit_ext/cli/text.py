"""Figures as people read them."""

from __future__ import annotations

from ..compare import Run
from ..video import Quality


def percent(share: float | None) -> str:
    """``0.314`` as ``31.4 %``; a dash for None."""
    return "-" if share is None else f"{100 * share:.1f} %"


def psnr(q: Quality | None) -> str:
    """Two decimals, ``inf`` for identical clips, a dash for None."""
    return "-" if q is None else "inf" if q.identical else f"{q.psnr:.2f}"


def ssim(q: Quality | None) -> str:
    """Four decimals, a dash for None."""
    return "-" if q is None else f"{q.ssim:.4f}"


def seconds(value: float) -> str:
    """``0.42 s``, ``12.3 s``, ``4 min 05 s``."""
    if value >= 120:
        return f"{int(value // 60)} min {int(value % 60):02d} s"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def figures(run: Run, dense: Run | None, model: str) -> str:
    """The line that ``vdit generate`` ends with."""
    if run.density is None:
        kept = "no step was sparse"
    elif run.method.partition("+")[0] == "dense":
        kept = "density 1"
    else:
        kept = f"density {run.density:.3f} in sparse steps, {run.density_overall:.3f} overall"
    line = f"{run.method} on the {model} model: {kept}"
    if dense is None or run is dense:
        return f"{line}; {seconds(run.seconds)}"
    return (
        f"{line}; PSNR {psnr(run.quality)} dB, SSIM {ssim(run.quality)} against dense; "
        f"{seconds(run.seconds)}, dense {seconds(dense.seconds)}"
    )
