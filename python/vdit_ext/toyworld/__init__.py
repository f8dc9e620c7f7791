"""The toy world: a seeded renderer with ground truth, and a small model trained on it.

    from vdit_ext import toyworld
    pipe = toyworld.load_pipeline()
    result = pipe("a red disc bounces over blue stripes", seed=0)
    result.frames  # uint8 [16, 96, 96, 3], 8 frames a second

scene      words, specs and clips            captions  sentences to specs and back
renderer   specs to pixels and ground truth  codec     pixels to latents and back, exactly
text       sentences to codes                model     the transformer
train      makes the weights                 pipeline  samples with them
check      says whether a clip shows what was asked
dit        a second model: one picture of a class; train_dit and check_dit belong to it

Published models cannot stand in for these: their training data has no ground truth.
"""

from importlib import import_module

from .._extras import needing
from . import captions, scene
from .renderer import render
from .scene import BackgroundSpec, Clip, SceneSpec, ThingSpec

# These need diffusers, which takes seconds to import.
_LATE = {
    "load_pipeline": "pipeline",
    "ToyPipeline": "pipeline",
    "ToyResult": "pipeline",
    "load_dit": "dit",
    "ToyDiT": "dit",
}


def __getattr__(name):
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needing("diffusers", f"{__name__}.{name}"):
        module = import_module(f".{_LATE[name]}", __name__)
    return getattr(module, name)


__all__ = [
    "BackgroundSpec",
    "Clip",
    "SceneSpec",
    "ThingSpec",
    "ToyDiT",
    "ToyPipeline",
    "ToyResult",
    "captions",
    "load_dit",
    "load_pipeline",
    "render",
    "scene",
]
