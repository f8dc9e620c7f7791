"""Loads the trained toy model and samples clips through diffusers' `WanPipeline`."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load, save

from . import captions, codec, model, scene, text

WEIGHTS = Path(__file__).parent.parent / "weights"
NAME = "toy_t2v"
DEFAULT_STEPS = 16
DEFAULT_GUIDANCE = 8.0
FLOW_SHIFT = 12.0  # as in training: scenes are decided at high noise, where most steps should fall
# Below this noise level the scene is decided; leaning on the prompt there only draws halos.
GUIDED_ABOVE = 0.95

_WHAT = "toy text-to-video model of vdit_ext, trained on its own rendered clips"

_CARD = {
    "config": dict,
    "settings": dict,
    "steps": int,
    "active_seconds": int,
    "sha256": str,
}  # what must be there

# The pixel sizes for which WanPipeline, counting on its own VAE, makes latents of 8 by 32 by 32.
_WAN_SIZE = dict(height=256, width=256, num_frames=29)


@dataclasses.dataclass(frozen=True)
class ToyResult:
    """frames uint8 [16, 96, 96, 3]; latents float32 [1, 54, 8, 32, 32]; the spec that was asked for."""

    frames: np.ndarray
    latents: torch.Tensor
    spec: scene.SceneSpec


class ToyPipeline:
    """Text to video with the toy model.

    transformer  WanTransformer3DModel that predicts clean latents, 2048 tokens a clip
    scheduler    UniPCMultistepScheduler with flow sigmas and prediction_type "sample"
    wan          the WanPipeline that joins the two; its text encoder and VAE are None
    """

    num_frames = scene.NUM_FRAMES
    fps = scene.FPS
    size = scene.SIZE

    def __init__(self, transformer: WanTransformer3DModel, scheduler=None):
        scheduler = scheduler or UniPCMultistepScheduler(
            prediction_type="sample", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
        )
        parts = dict(tokenizer=None, text_encoder=None, vae=None)
        self.wan = WanPipeline(**parts, scheduler=scheduler, transformer=transformer)
        self.wan.set_progress_bar_config(disable=True)

    @property
    def transformer(self) -> WanTransformer3DModel:
        return self.wan.transformer

    @transformer.setter
    def transformer(self, value) -> None:
        self.wan.transformer = value

    @property
    def scheduler(self):
        return self.wan.scheduler

    @scheduler.setter
    def scheduler(self, value) -> None:
        self.wan.scheduler = value

    def __call__(
        self,
        prompt: str,
        *,
        seed: int = 0,
        num_inference_steps: int = DEFAULT_STEPS,
        guidance_scale: float = DEFAULT_GUIDANCE,
        callback: Callable[[int, int], None] | None = None,
    ) -> ToyResult:
        """Sample one clip; the same arguments on the same machine give the same bytes.

        guidance_scale: 1 takes the prompt as it is, at about half the cost; above 1 leans on it while
        the noise level is above `GUIDED_ABOVE`.
        callback(step, total) runs after each denoising step, step counting from 1.
        Raises ValueError, as `captions.parse` does, for a prompt outside the grammar.
        """
        spec = captions.parse(prompt)
        latents = self.wan(
            prompt_embeds=text.encode([captions.caption(spec)]),
            negative_prompt_embeds=text.encode([""]),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=_after_step(callback, num_inference_steps),
            output_type="latent",
            **_WAN_SIZE,
        ).frames
        latents = latents.float().cpu()
        return ToyResult(codec.decode(latents)[0].numpy(), latents, spec)


def _after_step(callback, total: int):
    def on_step_end(wan, step, _timestep, kwargs):
        if wan.scheduler.sigmas[step + 1] < GUIDED_ABOVE:
            wan._guidance_scale = 1.0  # diffusers' way to end guidance early
        if callback is not None:
            callback(step + 1, total)
        return kwargs

    return on_step_end


def load_pipeline(dtype: torch.dtype = torch.float32, folder: Path = WEIGHTS, name: str = NAME) -> ToyPipeline:
    """The pipeline with the weights that come with the package, on the CPU, in `dtype`.

    Raises ValueError with one sentence when the weights are missing, damaged or of another model.
    """
    card = read_card(folder, name)
    data = read_whole(Path(folder), name, card)
    transformer = model.build(card["config"])
    fill_parameters(transformer, load(data), f"{name}.safetensors")
    _convert(transformer, dtype)
    return ToyPipeline(transformer.eval().requires_grad_(False))


def read_card(folder: Path = WEIGHTS, name: str = NAME) -> dict:
    """What is recorded beside the weights: config, settings, steps, losses, world version, sha256."""
    path = Path(folder) / f"{name}.json"
    try:
        card = json.loads(_read(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: expected JSON, got {error}; install the package again") from None
    if not isinstance(card, dict):
        came = type(card).__name__
        raise ValueError(f"{path.name}: expected a JSON object, got {came}; install the package again")
    if card.get("world_version") != scene.WORLD_VERSION:
        came, wanted = card.get("world_version"), scene.WORLD_VERSION
        raise ValueError(f"{path.name}: expected weights of toy world {wanted}, got {came}; train again")
    for key, kind in _CARD.items():
        if not isinstance(card.get(key), kind):
            came = type(card[key]).__name__ if key in card else "nothing"
            raise ValueError(
                f"{path.name}: expected {key} to be {kind.__name__}, got {came}; install the package again"
            )
    return card


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(
            f"expected a file {path.name}, got none there; install the package again or train the weights"
        )
    return path.read_bytes()


def read_whole(folder: Path, name: str, card: dict) -> bytes:
    """The bytes of a weights file that its card knows. Raises ValueError for other ones."""
    path = folder / f"{name}.safetensors"
    data = _read(path)
    came = hashlib.sha256(data).hexdigest()
    if came != card["sha256"]:
        wanted = f"sha256 {card['sha256'][:12]}... as in {name}.json"
        raise ValueError(f"{path.name}: expected {wanted}, got {came[:12]}...; install the package again")
    return data


def fill_parameters(transformer, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Copy tensors into all parameters. Raises ValueError when names or shapes of the file `name` differ."""
    wanted = dict(transformer.named_parameters())
    for key in [*wanted, *tensors]:
        if key not in wanted or key not in tensors or wanted[key].shape != tensors[key].shape:
            expected = tuple(wanted[key].shape) if key in wanted else "no such tensor"
            came = tuple(tensors[key].shape) if key in tensors else "none"
            problem = f"expected {key} {expected}, got {came}"
            raise ValueError(f"{name}: {problem}; these weights belong to another model")
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(tensors[key])


def _convert(transformer, dtype: torch.dtype) -> None:
    """Change the dtype as diffusers does on loading: what the class wants in float32 stays there."""
    for name, parameter in transformer.named_parameters():
        if not any(part in name.split(".") for part in transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)


def export_run(run, folder: Path, name: str = NAME, *, what: str = _WHAT, module: str = "train") -> None:
    """Write a training run's averaged weights (float16), its card and its loss curve into a folder.

    Each file appears whole or not at all. A run that began from other weights carries on their loss curve, and
    its card holds theirs as `began_from`.
    """
    from .train import read_curve, write_curve, write_whole

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.to(torch.float16).contiguous() for key, value in run.averaged_state().items()}
    data = save(tensors)
    settings = dataclasses.asdict(run.settings)
    start, config = settings.pop("start"), settings.pop("config")
    earlier, curve = None, run.curve
    if start:
        earlier = read_card(Path(start), name)
        steps, seconds = earlier["steps"], earlier["active_seconds"]
        later = [[step + steps, round(second + seconds, 1), loss] for step, second, loss in curve]
        curve = read_curve(Path(start) / f"{name}_loss.csv") + later
    card = {
        "what": what,
        "config": config,
        "settings": settings,
        "command": _command(run.settings, module),
        "world_version": scene.WORLD_VERSION,
        "steps": run.step + (earlier["steps"] if earlier else 0),
        "active_seconds": round(run.active_seconds) + (earlier["active_seconds"] if earlier else 0),
        "last_loss": run.curve[-1][2] if run.curve else None,
        "torch": torch.__version__,
        "sha256": hashlib.sha256(data).hexdigest(),
        "began_from": earlier,
    }
    write_whole(folder / f"{name}.safetensors", lambda path: path.write_bytes(data))
    write_whole(folder / f"{name}_loss.csv", lambda path: write_curve(curve, path))
    write_whole(folder / f"{name}.json", lambda path: path.write_text(json.dumps(card, indent=2) + "\n"))


def _command(settings, module: str) -> str:
    budget = f"--steps {settings.steps}" if settings.steps else f"--minutes {settings.minutes:g}"
    start = " --start WEIGHTS_BEFORE" if settings.start else ""
    said = f"python -m vdit_ext.toyworld.{module} --out RUN {budget} --seed {settings.seed}{start}"
    return f"{said} --export WEIGHTS"
