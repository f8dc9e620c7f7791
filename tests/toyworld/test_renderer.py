import numpy as np
import pytest

from vdit_ext.toyworld import captions, render, scene

PROMPTS = [
    f"a red {shape} {motion} over blue stripes"
    for shape, motion in zip(scene.SHAPES * 2, scene.MOTIONS, strict=False)
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(prompt):
    spec = captions.parse(prompt)
    first, again, other = render(spec, 3), render(spec, 3), render(spec, 4)
    assert first.frames.dtype == np.uint8
    assert first.frames.shape == (16, 96, 96, 3)
    assert first.frames.tobytes() == again.frames.tobytes()
    assert first.frames.tobytes() != other.frames.tobytes()
    assert first.caption == prompt


@pytest.mark.parametrize("prompt", PROMPTS)
def test_pixels_are_the_things_colour_inside_its_mask_and_the_plate_well_outside(prompt):
    clip = render(captions.parse(prompt), 11)
    for frame, mask in zip(clip.frames, clip.masks[0], strict=True):
        changed = (frame != clip.background).any(-1)
        assert mask.any()
        assert not (mask & ~changed).any()
        ring = changed & ~mask  # only the antialiased edge
        assert ring.sum() < 6 * np.sqrt(mask.sum())
    exact = (clip.frames == scene.THING_COLOURS["red"]).all(-1)
    assert exact[clip.masks[0]].mean() > 0.75


@pytest.mark.parametrize("shape", scene.SHAPES)
def test_the_centre_track_follows_the_mask(shape):
    clip = render(captions.parse(f"a white {shape} slides right over green dots"), 2)
    y, x = np.mgrid[:96, :96] + 0.5
    seen = np.array([[x[m].mean(), y[m].mean()] for m in clip.masks[0]])
    drift = seen - clip.centres[0]
    assert np.abs(drift[:, 0]).max() < 0.55  # whole pixels of a square lie up to half a pixel off
    assert (
        np.ptp(drift[:, 1]) < 0.3
    )  # a triangle's centre of mass lies below its drawn centre, always by the same
    assert 14 <= clip.radii[0] <= 18


@pytest.mark.parametrize(
    ("motion", "way"),
    [("slides left", (-1, 0)), ("slides right", (1, 0)), ("rises", (0, -1)), ("falls", (0, 1))],
)
def test_straight_motions_go_the_named_way_and_stay_in_the_picture(motion, way):
    for seed in range(20):
        clip = render(captions.parse(f"a blue disc {motion} over plain grey"), seed)
        step = np.diff(clip.centres[0], axis=0)
        assert (np.sign(np.where(np.abs(step) < 1e-4, 0, step)) == way).all()
        assert (clip.centres[0] - clip.radii[0] >= 0).all()
        assert (clip.centres[0] + clip.radii[0] <= 96).all()


def test_drawing_some_frames_gives_those_of_the_whole_clip():
    spec = captions.parse("a green ring bounces over brown checks")
    whole, some = render(spec, 9), render(spec, 9, frames=[2, 3, 12])
    assert (some.frames == whole.frames[[2, 3, 12]]).all()
    assert (some.masks == whole.masks[:, [2, 3, 12]]).all()


def test_a_thing_in_front_hides_the_one_behind_it_in_the_masks():
    thing = captions.parse("a red disc falls over plain blue").things[0]
    spec = scene.SceneSpec(
        (thing, scene.ThingSpec("white", "square", "falls")), scene.BackgroundSpec("blue", "plain")
    )
    rendered = render(spec, 1)
    assert rendered.masks.shape[0] == 2
    assert not (rendered.masks[0] & rendered.masks[1]).any()
