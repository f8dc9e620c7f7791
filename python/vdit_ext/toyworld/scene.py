"""What a toy scene is made of: the words, the spec, and the clip with all that is known about it.

Everything here is plain data. A spec says what was asked for; a clip holds the pixels together
with the ground truth that made them, so that a check never has to guess.
"""

from dataclasses import dataclass

import numpy as np

# Raise this whenever a rendered pixel, a word, or a random draw changes: weights record it.
WORLD_VERSION = 1

NUM_FRAMES = 16
FPS = 8
SIZE = (96, 96)  # height, width in pixels

SHAPES = ("disc", "square", "triangle", "ring")
MOTIONS = ("bounces", "slides left", "slides right", "rises", "falls")
TEXTURES = ("stripes", "checks", "dots", "plain")

# Things are bright and backgrounds muted, so that a blue disc still shows over blue stripes.
THING_COLOURS = {
    "red": (225, 45, 40),
    "green": (60, 210, 70),
    "blue": (40, 100, 250),
    "yellow": (245, 205, 45),
    "white": (245, 245, 245),
    "purple": (175, 70, 225),
}
BACKGROUND_COLOURS = {  # dark tone, light tone
    "blue": ((34, 50, 96), (72, 96, 150)),
    "green": ((30, 62, 42), (62, 104, 74)),
    "grey": ((76, 76, 80), (124, 124, 130)),
    "brown": ((84, 58, 40), (132, 98, 72)),
    "pink": ((142, 88, 104), (186, 134, 148)),
}


@dataclass(frozen=True)
class ThingSpec:
    """One thing: a colour of `THING_COLOURS`, a shape of `SHAPES`, a motion of `MOTIONS`."""

    colour: str
    shape: str
    motion: str


@dataclass(frozen=True)
class BackgroundSpec:
    """A colour of `BACKGROUND_COLOURS` and a texture of `TEXTURES`."""

    colour: str
    texture: str


@dataclass(frozen=True)
class SceneSpec:
    """What a caption says: things from back to front, and what they move over."""

    things: tuple[ThingSpec, ...]
    background: BackgroundSpec


@dataclass(frozen=True)
class Clip:
    """A rendered scene with its ground truth (n things, f frames, h by w pixels).

    frames      uint8 [f, h, w, 3], RGB
    masks       bool [n, f, h, w], the pixels each thing shows (not those hidden by another)
    centres     float32 [n, f, 2], x and y in pixels, 0 at the left and top pixel edge
    radii       float32 [n], half the thing's extent in pixels
    background  uint8 [h, w, 3], the plate without things
    caption     the canonical sentence of the spec
    """

    frames: np.ndarray
    masks: np.ndarray
    centres: np.ndarray
    radii: np.ndarray
    background: np.ndarray
    caption: str
    spec: SceneSpec
    seed: int


def random_spec(rng: np.random.Generator) -> SceneSpec:
    """One scene with one thing, every word equally likely and independent of the others."""

    def pick(words):
        return list(words)[rng.integers(len(words))]

    thing = ThingSpec(pick(THING_COLOURS), pick(SHAPES), pick(MOTIONS))
    return SceneSpec((thing,), BackgroundSpec(pick(BACKGROUND_COLOURS), pick(TEXTURES)))
