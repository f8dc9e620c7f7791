"""Draws a scene: antialiased shapes by signed distance over a fixed textured plate.

Only the thing's start, speed and size are drawn from the seed. Textures have a fixed period and
phase: a small model then spends its capacity on the thing that moves.
"""

import numpy as np

from . import captions
from .scene import BACKGROUND_COLOURS, NUM_FRAMES, SIZE, THING_COLOURS, Clip, SceneSpec

CELL = 12  # pixels; stripes and checks are one cell wide, dots stand one cell apart
RADIUS = (14.0, 18.0)  # pixels, smallest and largest thing
TRAVEL = (44.0, 54.0)  # pixels from the first to the last frame, for things that slide, rise or fall
BOUNCE_HEIGHT = (38.0, 52.0)  # pixels
BOUNCE_FRAMES = 8  # frames from one touch of the floor to the next


def render(spec: SceneSpec, seed: int, *, frames=None) -> Clip:
    """Draw a spec with a seed; the same arguments give the same bytes.

    frames: indices in [0, 16) to draw, all when None. Leaving some out changes no other frame.
    """
    rng = np.random.default_rng(seed)
    index = np.arange(NUM_FRAMES) if frames is None else np.asarray(frames)
    plate = _plate(spec.background.colour, spec.background.texture)
    video = np.repeat(plate[None], len(index), 0)
    masks, centres, radii = [], [], []
    for thing in spec.things:
        radius = rng.uniform(*RADIUS)
        track = _TRACKS[thing.motion](rng, radius)[index]
        cover = _cover(thing.shape, radius, track)
        colour = np.asarray(THING_COLOURS[thing.colour], np.float32)
        video += cover[..., None] * (colour - video)
        masks = [mask & (cover < 0.5) for mask in masks] + [cover >= 0.5]
        centres.append(track)
        radii.append(radius)
    return Clip(
        frames=_to_bytes(video),
        masks=np.stack(masks),
        centres=np.stack(centres).astype(np.float32),
        radii=np.asarray(radii, np.float32),
        background=_to_bytes(plate),
        caption=captions.caption(spec),
        spec=spec,
        seed=seed,
    )


def background_plate(spec: SceneSpec) -> np.ndarray:
    """uint8 [96, 96, 3]: what stands behind the things."""
    return _to_bytes(_plate(spec.background.colour, spec.background.texture))


def shape_cover(shape: str, radius: float, centres: np.ndarray) -> np.ndarray:
    """float32 [f, 96, 96] in 0..1: how much of each pixel a shape covers, centres [f, 2] in pixels."""
    return _cover(shape, radius, np.asarray(centres))


def _to_bytes(picture: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _grid() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[: SIZE[0], : SIZE[1]].astype(np.float32) + 0.5
    return y, x


_Y, _X = _grid()
_PLATES: dict[tuple[str, str], np.ndarray] = {}


def _plate(colour: str, texture: str) -> np.ndarray:
    if (colour, texture) not in _PLATES:
        dark, light = (np.asarray(tone, np.float32) for tone in BACKGROUND_COLOURS[colour])
        amount = _TEXTURES[texture]()[..., None]
        _PLATES[colour, texture] = dark + amount * (light - dark)
    return _PLATES[colour, texture]


def _stripes() -> np.ndarray:
    return (_X // CELL % 2).astype(np.float32)


def _checks() -> np.ndarray:
    return ((_X // CELL + _Y // CELL) % 2).astype(np.float32)


def _dots() -> np.ndarray:
    distance = np.hypot(_X % CELL - CELL / 2, _Y % CELL - CELL / 2)
    return np.clip(0.3 * CELL - distance + 0.5, 0, 1).astype(np.float32)


def _plain() -> np.ndarray:
    return np.full(SIZE, 0.5, np.float32)


_TEXTURES = {"stripes": _stripes, "checks": _checks, "dots": _dots, "plain": _plain}


def _cover(shape: str, radius: float, track: np.ndarray) -> np.ndarray:
    x = _X[None] - track[:, 0, None, None].astype(np.float32)
    y = _Y[None] - track[:, 1, None, None].astype(np.float32)
    return np.clip(0.5 - _DISTANCES[shape](x, y, np.float32(radius)), 0, 1)


def _disc(x, y, radius):
    return np.hypot(x, y) - radius


def _ring(x, y, radius):
    return np.abs(np.hypot(x, y) - 0.72 * radius) - 0.28 * radius


def _square(x, y, radius):
    return np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius


def _triangle(x, y, radius):
    # An upright triangle: a floor and two slopes of 60 degrees, as deep as the disc below its centre.
    slope = np.float32(0.75**0.5) * np.abs(x) - 0.5 * y
    return np.maximum(y - 0.85 * radius, slope - 0.58 * radius)


_DISTANCES = {"disc": _disc, "ring": _ring, "square": _square, "triangle": _triangle}


def _bounces(rng, radius):
    x = rng.uniform(radius + 4, SIZE[1] - radius - 4)
    height, phase = rng.uniform(*BOUNCE_HEIGHT), rng.uniform()
    turn = np.arange(NUM_FRAMES) / BOUNCE_FRAMES + phase
    part = turn % 1.0
    y = SIZE[0] - radius - 2 - height * 4 * part * (1 - part)  # free fall between two touches
    return np.stack([np.full(NUM_FRAMES, x), y], -1)


def _straight(axis: int, sign: int):
    def track(rng, radius):
        travel = rng.uniform(*TRAVEL)
        low = rng.uniform(radius + 2, SIZE[axis] - radius - 2 - travel)
        along = low + travel * np.linspace(0, 1, NUM_FRAMES)[::sign]
        across = rng.uniform(radius + 4, SIZE[1 - axis] - radius - 4)
        return np.stack([along, np.full(NUM_FRAMES, across)][:: 1 if axis == 1 else -1], -1)

    return track


_TRACKS = {
    "bounces": _bounces,
    "slides left": _straight(axis=1, sign=-1),
    "slides right": _straight(axis=1, sign=1),
    "rises": _straight(axis=0, sign=-1),
    "falls": _straight(axis=0, sign=1),
}
