import itertools

import numpy as np
import pytest

from vdit_ext.toyworld import captions, scene


def test_every_scene_reads_back_from_its_own_caption():
    words = itertools.product(
        scene.THING_COLOURS, scene.SHAPES, scene.MOTIONS, scene.BACKGROUND_COLOURS, scene.TEXTURES
    )
    for colour, shape, motion, over, texture in words:
        spec = scene.SceneSpec((scene.ThingSpec(colour, shape, motion),), scene.BackgroundSpec(over, texture))
        assert captions.parse(captions.caption(spec)) == spec


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("A red disc bounces over blue stripes.", "a red disc bounces over blue stripes"),
        ("the red ball slides to the left over plain gray", "a red disc slides left over plain grey"),
        ("white circle falls over the pink dots", "a white disc falls over pink dots"),
    ],
)
def test_other_ways_to_say_it_give_the_canonical_caption(said, meant):
    assert captions.caption(captions.parse(said)) == meant


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        (
            "a red disk bounces over blue stripes",
            ['"disk"', "disc, square, triangle, ring", 'did you mean "disc"?'],
        ),
        ("a mauve disc bounces over blue stripes", ['"mauve"', "a colour", "red, green"]),
        ("a red disc swims over blue stripes", ['"swims"', "bounces, slides, rises, falls"]),
        ("a red disc slides up over blue stripes", ['"up"', "left, right"]),
        ("a red disc bounces over blue", ["a texture", "ended"]),
        ("a red disc bounces over blue stripes twice", ['"twice"', "end"]),
        ("", ["a colour", "ended"]),
        (7, ["prompt", "int"]),
    ],
)
def test_an_unknown_word_is_named_with_the_accepted_ones(prompt, parts):
    with pytest.raises(ValueError) as error:
        captions.parse(prompt)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_random_specs_depend_on_the_generator_alone():
    specs = [scene.random_spec(np.random.default_rng(5)) for _ in range(2)]
    assert specs[0] == specs[1]
