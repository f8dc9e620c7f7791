"""A class-conditional toy image model: a diffusers `DiTTransformer2DModel`, small, that predicts noise.

It stands in for DiT-XL/2 where a method was published for image DiTs. A picture is one frame of the toy
world with every block of 3 x 3 pixels reduced to its mean colour, [3, 32, 32]; the class is the shape and
colour of the thing; its place and size and the background are left to the sampler's noise.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import load

from . import codec, renderer, scene
from .pipeline import WEIGHTS, fill_parameters, read_card, read_whole

NAME = "toy_dit"
CHANNELS, GRID = 3, 32
CLASSES = tuple(f"{colour} {shape}" for shape in scene.SHAPES for colour in scene.THING_COLOURS)
NULL_CLASS = len(CLASSES)  # no class, for classifier-free guidance
TEXTURES = ("stripes", "plain")  # of the backgrounds this model has seen
DEFAULT_STEPS = 25
DEFAULT_GUIDANCE = 3.0

CONFIG = dict(
    num_attention_heads=2,
    attention_head_dim=64,
    in_channels=CHANNELS,
    num_layers=5,
    sample_size=GRID,
    patch_size=2,
    num_embeds_ada_norm=len(CLASSES),
)

# Mean and spread of the codec's three block-mean channels over random frames, so that latents are near
# zero mean and unit variance as the noise schedule expects.
_MEAN = (-0.89, 0.07, -0.01)
_SPREAD = (0.97, 0.5, 0.59)


def class_of(thing: scene.ThingSpec) -> int:
    """The class number of a thing, an index into `CLASSES`."""
    return CLASSES.index(f"{thing.colour} {thing.shape}")


def thing_of(label: int) -> scene.ThingSpec:
    """The thing a class number asks for; its motion means nothing here."""
    colour, shape = CLASSES[label].split()
    return scene.ThingSpec(colour, shape, scene.MOTIONS[0])


def random_frame(rng: np.random.Generator) -> tuple[np.ndarray, scene.SceneSpec]:
    """One frame uint8 [96, 96, 3] of a random scene that this model knows, and its spec."""
    drawn = scene.random_spec(rng)
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    spec = scene.SceneSpec(drawn.things, scene.BackgroundSpec(drawn.background.colour, texture))
    place = [int(rng.integers(scene.NUM_FRAMES))]
    return renderer.render(spec, int(rng.integers(2**62)), frames=place).frames[0], spec


def encode(frames: torch.Tensor) -> torch.Tensor:
    """uint8 or float frames [b, 96, 96, 3], 0..255, to float32 latents [b, 3, 32, 32]."""
    still = frames[:, None].expand(-1, codec.FRAMES, -1, -1, -1)
    means = codec.encode(still)[:, :CHANNELS, 0]
    return (means - _column(_MEAN, means)) / _column(_SPREAD, means)


def decode(latents: torch.Tensor) -> torch.Tensor:
    """Latents [b, 3, 32, 32] to uint8 frames [b, 96, 96, 3], every 3 x 3 pixels of one colour."""
    latents = latents.float()
    means = latents * _column(_SPREAD, latents) + _column(_MEAN, latents)
    whole = means.new_zeros(len(means), codec.CHANNELS, 1, *means.shape[2:])
    whole[:, :CHANNELS, 0] = means
    return codec.decode(whole)[:, 0]


def _column(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=like.device).view(1, -1, 1, 1)


def build(config: dict = CONFIG) -> DiTTransformer2DModel:
    """An untrained model; seed torch first. Every block begins as the identity (adaLN-Zero).

    It stays in evaluation mode, in training too: the class has no dropout but that of its labels, which it
    would draw anew in every block.
    """
    net = DiTTransformer2DModel(**config)
    ends = [block.norm1.linear for block in net.transformer_blocks]
    for linear in (*ends, net.proj_out_1, net.proj_out_2):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return net.eval()


def make_scheduler() -> DDIMScheduler:
    """The linear schedule of the DiT paper, deterministic when sampled with eta 0."""
    return DDIMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, clip_sample=False)


class ToyDiT:
    """The toy image model with its sampler.

    transformer  DiTTransformer2DModel that predicts noise, 256 tokens a picture
    scheduler    any diffusers scheduler for noise prediction; DDIM unless another is set
    """

    def __init__(self, transformer: DiTTransformer2DModel, scheduler=None):
        self.transformer, self.scheduler = transformer, scheduler or make_scheduler()

    @torch.no_grad()
    def __call__(
        self,
        classes: list[int],
        *,
        seed: int = 0,
        num_inference_steps: int = DEFAULT_STEPS,
        guidance_scale: float = DEFAULT_GUIDANCE,
        callback: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Sample one picture a class number; returns latents float32 [b, 3, 32, 32], for `decode`.

        Picture i starts from noise of seed + i, so that a batch and its parts agree. guidance_scale 1 leaves
        guidance out. callback(step, total) runs after each denoising step, step counting from 1.
        Raises ValueError for a number that is no class.
        """
        wrong = [label for label in classes if not 0 <= label < len(CLASSES)]
        if wrong or not classes:
            came = wrong[0] if wrong else "none"
            raise ValueError(
                f"expected class numbers 0 to {len(CLASSES) - 1}, got {came}; see toyworld.dit.CLASSES"
            )
        labels, guided = torch.tensor(classes), guidance_scale != 1
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(classes))]
        latents = torch.stack([torch.randn(CHANNELS, GRID, GRID, generator=g) for g in generators])
        self.scheduler.set_timesteps(num_inference_steps)
        for i, time in enumerate(self.scheduler.timesteps):
            noise = self._predict(latents, time, labels, guidance_scale if guided else None)
            latents = self.scheduler.step(noise, time, latents, generator=generators).prev_sample
            if callback is not None:
                callback(i + 1, num_inference_steps)
        return latents

    def _predict(self, latents, time, labels, guidance: float | None) -> torch.Tensor:
        net = self.transformer
        dtype = next(net.parameters()).dtype
        if guidance is None:
            return net(latents.to(dtype), time.expand(len(labels)), labels).sample.float()
        both = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
        noise = net(latents.repeat(2, 1, 1, 1).to(dtype), time.expand(len(both)), both).sample.float()
        named, free = noise.chunk(2)
        return free + guidance * (named - free)


def load_dit(dtype: torch.dtype = torch.float32, folder: Path = WEIGHTS, name: str = NAME) -> ToyDiT:
    """The toy image model with the weights that come with the package, on the CPU, in `dtype`.

    Raises ValueError with one sentence when the weights are missing, damaged or of another model.
    """
    card = read_card(folder, name)
    data = read_whole(Path(folder), name, card)
    net = build(card["config"])
    fill_parameters(net, load(data), f"{name}.safetensors")
    for parameter in net.parameters():
        parameter.data = parameter.data.to(dtype)
    return ToyDiT(net.requires_grad_(False))
