"""Trains the toy image model: python -m vdit_ext.toyworld.train_dit --out DIR --minutes 30 --resume

The loop, the optimizers, the checkpoints and the clock are those of `train`; the batch and the loss are
DDPM's: noise of a random one of 1000 steps, and the squared error of the predicted noise.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
import typer

from . import dit, train
from .pipeline import export_run


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides a run; saved with the weights. Give either minutes (active time) or steps."""

    seed: int = 0
    minutes: float = 30.0
    steps: int = 0
    pictures: int = 16  # a batch
    matrix_lr: float = 2e-3
    other_lr: float = 1e-3
    warmup_steps: int = 60
    flat_share: float = 0.5  # of the budget at full learning rate, a cosine to zero after it
    ema: float = 0.995
    null_classes: float = 0.1
    most_weight: float = 300.0  # caps the weight 1 / signal of a picture's loss
    start: str = ""  # folder of exported weights to begin with; "" draws new ones
    config: dict = dataclasses.field(default_factory=lambda: dict(dit.CONFIG))


def make_batch(settings: Settings, step: int):
    """The batch of a step, decided by (seed, step) alone.

    Returns latents and noise float32 [b, 3, 32, 32], steps int64 [b] in 0..999, class numbers int64 [b].
    """
    rng = np.random.default_rng([settings.seed, step])
    frames, labels = [], []
    for _ in range(settings.pictures):
        frame, spec = dit.random_frame(rng)
        frames.append(frame)
        labels.append(dit.NULL_CLASS if rng.random() < settings.null_classes else dit.class_of(spec.things[0]))
    latents = dit.encode(torch.from_numpy(np.stack(frames)))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    noise = torch.randn(latents.shape, generator=generator)
    # One step from each of as many equal parts, so that every batch sees all noise levels.
    place = (torch.arange(len(labels)) + torch.rand(len(labels), generator=generator)) / len(labels)
    return latents, noise, (place * 1000).long().clamp_max(999), torch.tensor(labels)


def loss_of(net, batch, most_weight: float) -> torch.Tensor:
    """Squared error of the predicted noise, weighted; a scalar, with float32 gradients.

    The weight is that of the velocity's error, 1 over the share of the signal, up to a limit: unweighted, noise
    levels at which colours and places are decided hardly count.
    """
    latents, noise, steps, labels = batch
    scheduler = dit.make_scheduler()
    noisy = scheduler.add_noise(latents, noise, steps)
    weight = (1 / scheduler.alphas_cumprod.to(latents.device)[steps]).clamp_max(most_weight)
    with train.autocast(latents.device):
        predicted = net(noisy, steps, labels).sample
    return ((predicted.float() - noise).pow(2).mean((1, 2, 3)) * weight).mean()


def train_step(run: train.Run, team: train.Team = train.ALONE) -> float:
    """One update; returns the loss."""
    batch = [part[team.rank :: team.size].to(run.device) for part in make_batch(run.settings, run.step)]
    return train.update(run, loss_of(run.model, batch, run.settings.most_weight), team)


def start(settings: Settings, device: str = "cpu") -> train.Run:
    """A run at its first step. Raises ValueError where the weights to begin with are of another model."""
    return train.Run(settings, device, first_weights=_first_weights)


def _first_weights(settings: Settings):
    if not settings.start:
        return dit.build(settings.config)
    folder = Path(settings.start)
    came = dit.read_card(folder, dit.NAME)["config"]
    if came != settings.config:
        wanted = settings.config
        raise ValueError(f"start: expected weights of {wanted}, got {came}; leave it out to train anew")
    return dit.load_dit(folder=folder).transformer.requires_grad_(True)


def export(run: train.Run, folder: Path) -> None:
    """Write the averaged weights, their card and their loss curve into a folder, as `toy_dit.*`."""
    what = "toy class-conditional image model of vdit_ext, trained on its own rendered frames"
    export_run(run, folder, dit.NAME, what=what, module="train_dit")


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Path = typer.Option(..., help="Folder for checkpoint.pt and loss.csv."),
    minutes: float = typer.Option(30.0, help="Active time to train."),
    steps: int = typer.Option(0, help="Train this many steps instead of some minutes."),
    seed: int = 0,
    resume: bool = typer.Option(False, help="Go on from OUT/checkpoint.pt when it exists."),
    device: str = typer.Option("auto", help="cpu, cuda, or auto: cuda when there is one."),
    start_from: str = typer.Option("", "--start", help="Go on from the weights exported into this folder."),
    threads: int = typer.Option(0, help="Threads on a CPU; 0 leaves torch's number."),
    export_to: Path | None = typer.Option(None, "--export", help="Also write the weights into this folder."),
):
    """Train the toy class-conditional image model."""
    device = train.chosen_device(device)
    train.check_folders(out, resume, export_to)
    if threads:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(seed=seed, minutes=minutes, steps=steps, start=start_from)
    if start_from:
        settings = dataclasses.replace(settings, flat_share=0.4)
    run = start(settings, device)
    if resume and (out / "checkpoint.pt").exists():
        run.load(out / "checkpoint.pt")
    train.train(run, out, step=train_step)
    if export_to is not None:
        export(run, export_to)


if __name__ == "__main__":
    app()
