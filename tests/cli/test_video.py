"""Clips as files and pictures, and their distances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vdit_ext import video


def moving_square(height=48, width=64, frames=5):
    clip = np.zeros((frames, height, width, 3), np.uint8)
    clip[..., 2] = 180
    for i in range(frames):
        clip[i, 10:30, 4 + 6 * i : 24 + 6 * i] = (220, 40, 30)
    return clip


def test_round_trip_keeps_frames_rate_and_colours(tmp_path):
    clip = moving_square()
    video.write_video(tmp_path / "a.mp4", clip, 12.5, scale=4)
    back, fps = video.read_video(tmp_path / "a.mp4")
    assert back.shape == (5, 192, 256, 3) and fps == 12.5
    assert np.abs(back[2, 80, 100].astype(int) - (220, 40, 30)).max() <= 6
    assert np.abs(back[2, 170, 200].astype(int) - (0, 0, 180)).max() <= 6


def test_pixels_are_yuv420p_in_bt709(tmp_path):
    import av

    video.write_video(tmp_path / "a.mp4", moving_square(), 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert context.name == "h264" and context.pix_fmt == "yuv420p" and context.colorspace == 1


def test_odd_sizes_get_one_more_row_or_column(tmp_path):
    video.write_video(tmp_path / "a.mp4", moving_square(47, 63), 8, scale=1)
    assert video.read_video(tmp_path / "a.mp4")[0].shape[1:3] == (48, 64)


@pytest.mark.parametrize(("size", "scale"), [((96, 96), 4), ((36, 36), 8), ((384, 500), 1), ((480, 832), 1)])
def test_small_clips_are_enlarged_for_viewing(size, scale):
    assert video.viewing_scale(*size) == scale


def test_what_is_no_clip_is_refused(tmp_path):
    for wrong in (
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match="expected a clip uint8"):
            video.write_video(tmp_path / "a.mp4", wrong, 8)
    with pytest.raises(ValueError, match="fps"):
        video.write_video(tmp_path / "a.mp4", moving_square(), 0)
    (tmp_path / "b.mp4").write_text("no video")
    with pytest.raises(ValueError, match="could not be decoded"):
        video.read_video(tmp_path / "b.mp4")


def test_psnr_agrees_with_its_formula():
    clip = moving_square()
    noisy = np.clip(clip.astype(int) + np.random.default_rng(0).integers(-9, 10, clip.shape), 0, 255).astype(
        np.uint8
    )
    error = np.mean((noisy.astype(float) - clip) ** 2)
    found = video.quality(noisy, clip)
    assert math.isclose(found.psnr, 10 * math.log10(255**2 / error), abs_tol=1e-3)
    assert 0 < found.ssim < 1 and not found.identical


@pytest.mark.parametrize("frames_at_once", [1, 2, 5])
def test_quality_does_not_depend_on_how_many_frames_are_compared_at_once(monkeypatch, frames_at_once):
    image = pytest.importorskip("torchmetrics.functional.image")
    clip = moving_square()
    noisy = clip ^ np.random.default_rng(0).integers(0, 32, clip.shape, np.uint8)
    ours, theirs = (torch.from_numpy(c).permute(0, 3, 1, 2).float() for c in (noisy, clip))
    monkeypatch.setattr(video, "_CHUNK", frames_at_once * clip.shape[1] * clip.shape[2])
    seen = []
    whole = image.structural_similarity_index_measure

    def one_chunk(*arguments, **settings):
        seen.append(len(arguments[0]))
        return whole(*arguments, **settings)

    monkeypatch.setattr(image, "structural_similarity_index_measure", one_chunk)
    found = video.quality(noisy, clip)
    assert max(seen) == frames_at_once and sum(seen) == len(clip)
    assert math.isclose(found.ssim, float(whole(ours, theirs, data_range=255.0)), abs_tol=1e-6)
    expected = float(image.peak_signal_noise_ratio(ours, theirs, data_range=255.0))
    assert math.isclose(found.psnr, expected, abs_tol=1e-4)


def test_identical_clips():
    assert video.quality(moving_square(), moving_square()) == video.Quality(math.inf, 1.0, True)


def test_clips_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        video.quality(moving_square(), moving_square(frames=4))


@pytest.mark.parametrize(("step", "gain"), [(0, 1), (1, 64), (3, 64), (10, 16), (200, 1)])
def test_difference_is_amplified_as_far_as_it_fits(step, gain):
    clip = np.zeros((2, 16, 16, 3), np.uint8)
    gap, found = video.difference(clip + np.uint8(step), clip)
    assert found == gain and (gap == step * gain).all()


def test_sheet_grows_with_rows_and_columns():
    clip = moving_square()
    one = video.contact_sheet([("a", clip)], tile=64)
    two = video.contact_sheet([("a", clip), ("b\nx", clip[:3])], tile=64, title="t" * 500, subtitle="s", fps=8)
    assert two.height > one.height + 48 and two.width < one.width  # the shorter clip has three frames
    picture = np.asarray(one)
    assert (picture == (220, 40, 30)).all(-1).any()
