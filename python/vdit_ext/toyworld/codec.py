"""A fixed invertible codec in the place of a VAE.

Every block of 2 frames by 3 by 3 pixels becomes one latent position with 54 channels: an
orthonormal cosine transform in time, rows and columns, and an orthonormal grey/opponent transform
of the colours. Nothing is lost, so any difference between two decoded clips comes from the model.
"""

import math

import torch

FRAMES, ROWS, COLUMNS = 2, 3, 3  # the size of a block
CHANNELS = 3 * FRAMES * ROWS * COLUMNS
# Pixels lie in -1..1 before the transform. This keeps the strongest channel (a block's mean grey)
# near unit variance, so that the usual flow-matching noise levels fit.
SCALE = 0.5


def encode(frames: torch.Tensor) -> torch.Tensor:
    """uint8 or float [b, f, h, w, 3] with values 0..255 to float32 latents [b, 54, f/2, h/3, w/3].

    Raises ValueError when f is not a multiple of 2, or h or w not of 3.
    """
    if frames.ndim != 5 or frames.shape[-1] != 3:
        came = tuple(frames.shape)
        raise ValueError(f"expected frames [b, f, h, w, 3], got shape {came}; add the batch axis or colours")
    b, f, h, w, _ = frames.shape
    if f % FRAMES or h % ROWS or w % COLUMNS:
        wanted = f"frames in multiples of {FRAMES} and pixels in multiples of {ROWS}"
        raise ValueError(f"expected {wanted}, got {f}, {h} and {w}; crop or pad the clip")
    x = frames.to(torch.float32) / 127.5 - 1
    x = x.view(b, f // FRAMES, FRAMES, h // ROWS, ROWS, w // COLUMNS, COLUMNS, 3)
    x = x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)  # [b, f/2, h/3, w/3, 54]
    return (x @ _basis(x.device).T * SCALE).permute(0, 4, 1, 2, 3).contiguous()


def decode(latents: torch.Tensor) -> torch.Tensor:
    """Latents [b, 54, f, h, w] to uint8 frames [b, 2f, 3h, 3w, 3]; values outside 0..255 are clipped."""
    return decode_float(latents).round_().clamp_(0, 255).to(torch.uint8)


def decode_float(latents: torch.Tensor) -> torch.Tensor:
    """The exact inverse of `encode`, float32 and without rounding or clipping.

    Raises ValueError when the latents do not have 54 channels.
    """
    if latents.ndim != 5 or latents.shape[1] != CHANNELS:
        came = tuple(latents.shape)
        raise ValueError(
            f"expected latents [b, {CHANNELS}, f, h, w], got shape {came}; pass what encode returned"
        )
    b, _, f, h, w = latents.shape
    x = latents.to(torch.float32).permute(0, 2, 3, 4, 1) @ _basis(latents.device) / SCALE
    x = x.view(b, f, h, w, FRAMES, ROWS, COLUMNS, 3).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return (x.reshape(b, f * FRAMES, h * ROWS, w * COLUMNS, 3) + 1) * 127.5


def _cosines(n: int) -> torch.Tensor:
    k, x = torch.arange(n)[:, None], torch.arange(n)[None]
    basis = torch.cos(math.pi * (2 * x + 1) * k / (2 * n)) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def _colours() -> torch.Tensor:
    rows = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    return rows / rows.norm(dim=1, keepdim=True)


def _basis(device) -> torch.Tensor:
    """[54, 54], rows orthonormal; columns in the order frame, row, column, colour."""
    matrix = torch.ones(1, 1)
    for part in (_cosines(FRAMES), _cosines(ROWS), _cosines(COLUMNS), _colours()):
        matrix = torch.kron(matrix, part)
    return matrix.to(device)
