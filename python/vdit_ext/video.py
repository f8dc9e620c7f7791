"""Clips as files and pictures: H.264 in and out, contact sheets, and how far one clip is from another.

A clip is a NumPy array, uint8 ``[frames, height, width, 3]``, red first. PyAV, Pillow and torchmetrics come
with the ``video`` extra and are imported where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np

from ._extras import needing

_CHUNK = 2**22  # pixels of a clip that are compared at once: SSIM takes about 150 bytes for each
PLEASANT = 384  # pixels along the short side below which a clip is enlarged for viewing
_GAINS = (64, 32, 16, 8, 4, 2, 1)
_BACKGROUND, _INK, _FAINT = (255, 255, 255), (28, 32, 38), (108, 116, 128)


@dataclass(frozen=True)
class Quality:
    """How close a clip is to a reference.

    Attributes:
        psnr: peak signal-to-noise ratio in dB over all values of the clip at once; ``inf`` when identical.
        ssim: structural similarity, the mean over the frames, 1 when identical.
        identical: whether every value is the same.
    """

    psnr: float
    ssim: float
    identical: bool


def quality(clip: np.ndarray, reference: np.ndarray) -> Quality:
    """PSNR and SSIM of a clip against a reference of the same shape; SSIM is torchmetrics'.

    SSIM's window is 11 pixels wide, so frames must have at least 11 rows and columns. Frames are compared a few
    at a time, so that memory does not grow with the clip; how many changes nothing in the result.

    Raises:
        ValueError: one sentence, when the shapes differ or are not clips.
    """
    check_clip(clip)
    check_clip(reference)
    if clip.shape != reference.shape:
        raise ValueError(f"expected two clips of one shape, got {list(clip.shape)} and {list(reference.shape)}")
    if np.array_equal(clip, reference):
        return Quality(math.inf, 1.0, True)
    import torch

    image = _need("torchmetrics.functional.image")
    error = ssim = 0.0
    count = max(1, _CHUNK // (clip.shape[1] * clip.shape[2]))
    for start in range(0, len(clip), count):
        ours, theirs = (
            torch.from_numpy(np.ascontiguousarray(c[start : start + count])).permute(0, 3, 1, 2).float()
            for c in (clip, reference)
        )
        error += float((ours - theirs).square().sum(dtype=torch.float64))
        each = image.structural_similarity_index_measure(ours, theirs, data_range=255.0, reduction="none")
        ssim += float(each.sum(dtype=torch.float64))
    return Quality(10 * math.log10(255**2 * clip.size / error), ssim / len(clip), False)


def check_clip(clip: np.ndarray) -> None:
    """Raise ValueError, in one sentence, unless this is uint8 ``[f, h, w, 3]`` with at least one frame."""
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != np.uint8 or 0 in clip.shape:
        raise ValueError(
            f"expected a clip uint8 [frames, height, width, 3], got {clip.dtype} {list(clip.shape)}"
        )


def viewing_scale(height: int, width: int) -> int:
    """Whole factor that brings a small clip to a pleasant size: 4 for 96 by 96, 1 from 384 on."""
    return max(1, min(8, math.ceil(PLEASANT / min(height, width))))


def enlarge(clip: np.ndarray, scale: int) -> np.ndarray:
    """Bicubic enlargement by a whole factor, ``[f, h, w, 3]`` to ``[f, h * scale, w * scale, 3]``."""
    check_clip(clip)
    if scale == 1:
        return clip
    image = _need("PIL.Image")
    size = (clip.shape[2] * scale, clip.shape[1] * scale)
    return np.stack(
        [np.asarray(image.fromarray(frame).resize(size, image.Resampling.BICUBIC)) for frame in clip]
    )


def write_video(
    path: Path | str, clip: np.ndarray, fps: float, *, scale: int | None = None, crf: int = 14
) -> None:
    """Write a clip as H.264 with yuv420p pixels (BT.709), which every player and browser shows.

    Args:
        path: a name ending in .mp4; the file is replaced.
        clip: uint8 ``[f, h, w, 3]``.
        fps: frames a second, above 0.
        scale: whole enlargement factor; None takes :func:`viewing_scale`. An odd height or width, which
            yuv420p cannot hold, then gets its last row or column twice.
        crf: x264's quality, lower is better; 14 shows no blocks on flat colours.

    Raises:
        ValueError: one sentence, for something that is not a clip or a frame rate that is not positive.
    """
    check_clip(clip)
    if not fps > 0:
        raise ValueError(f"write_video: fps must be above 0, got {fps}")
    av = _need("av")
    frames = enlarge(clip, viewing_scale(*clip.shape[1:3]) if scale is None else scale)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.options = {"crf": str(crf), "preset": "slow"}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709 in all three numberings
        context.color_range = 1  # 16 to 235
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def read_video(path: Path | str) -> tuple[np.ndarray, float]:
    """Decode the first video stream of a file.

    Returns:
        The clip, uint8 ``[f, h, w, 3]``, and its frames a second.

    Raises:
        ValueError: one sentence, when the file holds no video that can be decoded.
    """
    av = _need("av")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            rate = float(stream.average_rate or 0)
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"expected a video at {str(path)!r}, it could not be decoded ({error})") from None
    if not frames:
        raise ValueError(f"expected a video at {str(path)!r}, it has no frames")
    return np.stack(frames), rate


def difference(clip: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, int]:
    """Absolute difference of two clips, amplified so that it can be seen.

    Returns:
        The difference times a gain, uint8 ``[f, h, w, 3]``, and that gain: the largest power of two up to 64
        at which at most one value in fifty is cut off (1 for identical clips).
    """
    gap = np.abs(clip.astype(np.int16) - reference.astype(np.int16))
    if not gap.any():
        return gap.astype(np.uint8), 1
    bulk = float(np.quantile(gap, 0.98))
    gain = next((g for g in _GAINS if bulk * g <= 255), 1)
    return np.minimum(gap.astype(np.int32) * gain, 255).astype(np.uint8), gain


def contact_sheet(
    rows: Sequence[tuple[str, np.ndarray]],
    *,
    title: str = "",
    subtitle: str = "",
    columns: int = 6,
    tile: int = 176,
    fps: float | None = None,
):
    """Clips one under the other, each a row of frames spread evenly over its length.

    Args:
        rows: label and clip of each row; a label may have several lines. Clips may differ in size.
        title, subtitle: printed above, cut with an ellipsis where they do not fit.
        columns: frames a row; fewer when the shortest clip has fewer.
        tile: width of a frame in pixels.
        fps: when given, the time of each frame stands above its column.

    Returns:
        A Pillow image; ``.save(path)`` writes it.
    """
    image, draw_module = _need("PIL.Image"), _need("PIL.ImageDraw")
    for _, clip in rows:
        check_clip(clip)
    columns = min(columns, *(len(clip) for _, clip in rows))
    gap, margin = 6, 24
    label_width = max(_text_width(line, _font(15)) for label, _ in rows for line in label.split("\n")) + 18
    heights = [round(tile * clip.shape[1] / clip.shape[2]) for _, clip in rows]
    head = (38 if title else 0) + (26 if subtitle else 0) + (22 if fps else 6)
    width = margin * 2 + label_width + columns * (tile + gap) - gap
    height = margin * 2 + head + sum(heights) + gap * (len(rows) - 1)
    sheet = image.new("RGB", (width, height), _BACKGROUND)
    draw = draw_module.Draw(sheet)
    top = margin
    if title:
        draw.text((margin, top - 4), _cut(title, _font(24), width - 2 * margin), _INK, _font(24))
        top += 38
    if subtitle:
        draw.text((margin, top - 4), _cut(subtitle, _font(15), width - 2 * margin), _FAINT, _font(15))
        top += 26
    left = margin + label_width
    if fps:
        for column, index in enumerate(_spread(len(rows[0][1]), columns)):
            place = (left + column * (tile + gap) + tile / 2, top)
            draw.text(place, f"{index / fps:.2f} s", _FAINT, _font(13), anchor="ma")
        top += 22
    else:
        top += 6
    for (label, clip), row_height in zip(rows, heights, strict=True):
        _draw_label(draw, label, margin, top + row_height / 2)
        for column, index in enumerate(_spread(len(clip), columns)):
            frame = image.fromarray(clip[index]).resize((tile, row_height), image.Resampling.BICUBIC)
            sheet.paste(frame, (left + column * (tile + gap), top))
        top += row_height + gap
    return sheet


def _spread(length: int, count: int) -> list[int]:
    return np.linspace(0, length - 1, count).round().astype(int).tolist()


def _draw_label(draw, label: str, left: float, middle: float) -> None:
    lines = label.split("\n")
    for i, line in enumerate(lines):
        place = (left, middle + (i - (len(lines) - 1) / 2) * 21)
        draw.text(place, line, _INK if i == 0 else _FAINT, _font(15), anchor="lm")


def _font(size: int):
    return _need("PIL.ImageFont").load_default(size)


def _text_width(text: str, font) -> int:
    return math.ceil(font.getlength(text))


def _cut(text: str, font, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _need(name: str) -> ModuleType:
    """Import a module of the ``video`` extra; a missing one is an ImportError that says what to install."""
    root = name.partition(".")[0]
    with needing(root, __name__):
        import_module(root)
    return import_module(name)
