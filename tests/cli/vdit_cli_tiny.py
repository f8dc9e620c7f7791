"""The command on a model that samples in milliseconds; run as a script it is ``vdit`` with that model.

An untrained transformer of the toy model's shape with two layers, on clips of 4 frames of 36 by 36 pixels. It
shows that commands do what they say, not that clips look like anything.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from vdit_ext import compare
from vdit_ext.toyworld import codec, model, text

PROMPT = "a red disc bounces over blue stripes"
FRAMES, SIZE, FPS = 4, 36, 8


class TinySampler(compare.ToySampler):
    """ToySampler with its own loop; VDIT_TINY_WAIT seconds a step make it slow enough to interrupt."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = model.build(dict(model.CONFIG, num_layers=2)).eval().requires_grad_(False)
        self.fps = FPS
        self.calls = 0

    @classmethod
    def load(cls) -> TinySampler:
        return cls()

    @torch.no_grad()
    def sample(self, request, callback=None) -> np.ndarray:
        self.calls += 1
        generator = torch.Generator().manual_seed(request.seed)
        latents = torch.randn(1, codec.CHANNELS, FRAMES // 2, SIZE // 3, SIZE // 3, generator=generator)
        prompt = text.encode([request.prompt])
        for step in range(request.steps):
            time.sleep(float(os.environ.get("VDIT_TINY_WAIT", "0")))
            timestep = torch.tensor([1000.0 * (1 - step / request.steps)])
            clean = self.model(latents, timestep, prompt, return_dict=False)[0]
            latents = latents + (clean - latents) / (request.steps - step)
            if callback is not None:
                callback(step + 1, request.steps)
            if marker := os.environ.get("VDIT_TINY_MARKER"):
                Path(marker).touch()
        return codec.decode(latents)[0].numpy()


if __name__ == "__main__":
    compare.ToySampler.load = TinySampler.load
    from vdit_ext.cli import main

    sys.exit(main())
