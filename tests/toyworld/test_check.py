import numpy as np
import pytest

from vdit_ext.toyworld import captions, check, render, scene


def _clip(prompt, seed=0):
    return render(captions.parse(prompt), seed)


@pytest.mark.parametrize("seed", range(12))
def test_a_rendered_clip_passes_and_its_track_is_the_true_one(seed):
    clip = render(scene.random_spec(np.random.default_rng(seed)), seed)
    result = check.measure(clip.frames, clip.spec)
    assert result["passed"], result
    middle = np.asarray(result["track"]) - clip.centres[0]
    assert np.ptp(middle, axis=0).max() < 2.5


@pytest.mark.parametrize(
    ("shown", "asked", "part"),
    [
        ("a red disc bounces over blue stripes", "a purple disc bounces over blue stripes", "colour"),
        ("a red disc rises over blue stripes", "a red disc bounces over blue stripes", "motion"),
        ("a red disc slides left over blue stripes", "a red disc slides right over blue stripes", "motion"),
        ("a red ring bounces over blue stripes", "a red disc bounces over blue stripes", "shape"),
        ("a red disc bounces over blue checks", "a red disc bounces over blue stripes", "background"),
    ],
)
def test_a_clip_of_another_caption_fails_in_the_part_that_differs(shown, asked, part):
    result = check.measure(_clip(shown).frames, captions.parse(asked))
    assert [name for name in check.PARTS if not result[name]] == [part, "passed"]


def test_noise_and_a_missing_thing_do_not_pass():
    clip = _clip("a red disc bounces over blue stripes")
    noise = np.random.default_rng(0).integers(0, 256, clip.frames.shape, dtype=np.uint8)
    assert not check.measure(noise, clip.spec)["passed"]
    empty = np.repeat(clip.background[None], 16, 0)
    result = check.measure(empty, clip.spec)
    assert result["background"]
    assert not result["colour"] and not result["motion"] and not result["shape"]


def test_slight_noise_still_passes():
    clip = _clip("a yellow triangle slides left over green checks")
    noisy = clip.frames + np.random.default_rng(0).normal(0, 10, clip.frames.shape)
    assert check.measure(noisy.clip(0, 255).astype(np.uint8), clip.spec)["passed"]


def test_frames_of_another_size_are_refused():
    with pytest.raises(ValueError, match="64"):
        check.measure(np.zeros((16, 64, 64, 3), np.uint8), captions.parse(captions.EXAMPLE))
