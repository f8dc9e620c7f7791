"""Published shapes of the video models that the presets are made for.

Source: the model tables of the SVG2 and DraftAttention specifications (section 4 of each).
"""

from __future__ import annotations

from dataclasses import dataclass

from .plan import TokenLayout


@dataclass(frozen=True)
class VideoShape:
    """A video model at one resolution.

    Attributes:
        grid: latent frames, rows, columns after patchify.
        heads, head_dim, layers: of the self-attention.
        steps: denoising steps of the published runs; for the toy model, its pipeline's default.
        flow_shift: of the scheduler, 1 where it has none.
        text_len, text_first: text tokens inside the self-attention sequence.
    """

    grid: tuple[int, int, int]
    heads: int
    head_dim: int
    layers: int
    steps: int
    flow_shift: float
    text_len: int = 0
    text_first: bool = False

    @property
    def layout(self) -> TokenLayout:
        """Its token layout, all text valid."""
        return TokenLayout(self.grid, self.text_len, text_first=self.text_first)


SHAPES = {
    "hunyuan-t2v-720p": VideoShape((33, 45, 80), 24, 128, 60, 50, 7, 256),
    "hunyuan-480p": VideoShape((33, 30, 45), 24, 128, 60, 50, 7, 256),
    "wan2.1-14b-t2v-720p": VideoShape((21, 45, 80), 40, 128, 40, 50, 5),
    "wan-14b-i2v-720p": VideoShape((21, 45, 80), 40, 128, 40, 40, 5),
    "wan-i2v-480p": VideoShape((21, 30, 52), 40, 128, 40, 40, 5),
    "wan2.1-1.3b": VideoShape((21, 30, 52), 12, 128, 30, 50, 5),
    "cosmos1-14b": VideoShape((16, 44, 80), 40, 128, 36, 35, 1),
    "cogvideox-1.5-5b": VideoShape((11, 48, 85), 48, 64, 42, 50, 1, 226, True),
    "hunyuan-t2v-768p": VideoShape((33, 48, 80), 24, 128, 60, 50, 7, 256),
    "hunyuan-custom-768p": VideoShape((34, 48, 80), 24, 128, 60, 30, 13, 831),
    "wan2.1-14b-768p": VideoShape((21, 48, 80), 40, 128, 40, 50, 5),
    "wan2.1-14b-512p": VideoShape((21, 32, 48), 40, 128, 40, 50, 5),
    "wan2.1-14b-i2v-512p": VideoShape((21, 32, 48), 40, 128, 40, 40, 3),
    "toy": VideoShape((8, 16, 16), 3, 64, 6, 16, 12),
}


def preset_settings(who: str, presets: dict[str, dict[str, dict]], model: str, kind: str) -> dict:
    """Settings of one preset.

    Raises:
        ValueError: one sentence that lists the names there are.
    """
    if model not in presets:
        raise ValueError(f"{who}.preset: model must be one of {', '.join(sorted(presets))}, got {model!r}")
    kinds = presets[model]
    if kind not in kinds:
        raise ValueError(f"{who}.preset: kind must be one of {', '.join(kinds)} for {model}, got {kind!r}")
    return kinds[kind]
