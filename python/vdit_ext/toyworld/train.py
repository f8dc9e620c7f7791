"""Trains the toy transformer: python -m vdit_ext.toyworld.train --out DIR --minutes 90 --resume

Clips are rendered as they are needed, each from (seed, step), so that a resumed run sees what an
uninterrupted one would have seen. Most of the budget goes to clips cut down to two of their eight
latent frames, each at its true place in time; the last part sees whole clips.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from . import captions, codec, model, renderer, scene, text


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides a run; saved with the weights.

    Give either minutes (active time, so that a stopped process loses nothing) or steps.
    stages: (share of the budget at which it ends, latent frames per clip, clips per step, noise shift).
    The shift grows with the frames: where a thing is and how it moves is decided at noise levels
    above 0.9, the more so the more frames speak for it.
    """

    seed: int = 0
    minutes: float = 98.0
    steps: int = 0
    stages: tuple[tuple[float, int, int, float], ...] = (
        (0.27, 2, 16, 4.0),
        (0.52, 4, 8, 4.0),
        (0.58, 4, 8, 12.0),
        (1.0, 8, 4, 12.0),
    )
    matrix_lr: float = 2e-3
    other_lr: float = 1e-3
    warmup_steps: int = 60
    flat_share: float = 0.5  # of the budget at full learning rate, a cosine to zero after it
    ema: float = 0.99
    null_prompts: float = 0.1
    smallest_noise: float = 0.2  # caps the weight 1/noise**2 of a clip's loss
    start: str = ""  # folder of exported weights to begin with; "" draws new ones
    config: dict = dataclasses.field(default_factory=lambda: dict(model.CONFIG))


# For weights that know the world already: where a thing is needs whole clips.
LATER_STAGES = ((0.25, 4, 8, 8.0), (1.0, 8, 4, 12.0))


@dataclasses.dataclass(frozen=True)
class Team:
    """Processes that train one model together, each on its share of every batch.

    On a CPU that other work shares, two processes of one thread beat one of two threads: they wait for
    each other once a step and not once an operation (2.7 s a step instead of 4.2 s in one such case).
    """

    rank: int = 0
    size: int = 1

    def average(self, parameters, loss: torch.Tensor) -> float:
        """Replace every gradient by the team's mean; returns the mean loss."""
        if self.size > 1:
            gradients = [p.grad for p in parameters]
            flat = torch.cat([*(g.flatten() for g in gradients), loss.detach().view(1)])
            torch.distributed.all_reduce(flat)
            *parts, loss = (flat / self.size).split([*(g.numel() for g in gradients), 1])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        return float(loss.detach())

    def agree(self, *numbers: float) -> list[float]:
        """The numbers of the first member, for all."""
        told = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            torch.distributed.broadcast(told, 0)
        return told.tolist()


ALONE = Team()


class Run:
    """Model, averaged copy, optimizers and progress of one training; `save` and `load` keep all of it."""

    def __init__(self, settings: Settings, device: str = "cpu", first_weights: Callable | None = None):
        """first_weights(settings) makes the model; the text-to-video model when None."""
        torch.manual_seed(settings.seed)
        self.settings, self.device = settings, torch.device(device)
        self.model = (first_weights or _first_weights)(settings).to(self.device)
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        matrices, others = _split_parameters(self.model)
        self.optimizers = [
            torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.step, self.active_seconds, self.curve = 0, 0.0, []

    @property
    def progress(self) -> float:
        """0..1: how much of the budget is used."""
        if self.settings.steps:
            return min(1.0, self.step / self.settings.steps)
        return min(1.0, self.active_seconds / (60 * self.settings.minutes))

    def save(self, path: Path) -> None:
        """Write a checkpoint; a kill while writing leaves the previous one whole."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "active_seconds": self.active_seconds,
            "curve": self.curve,
            "settings": dataclasses.asdict(self.settings),
        }
        write_whole(path, lambda part: torch.save(state, part))

    def load(self, path: Path) -> None:
        """Take up a checkpoint. Raises ValueError when it was made with other settings."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        mine = json.loads(json.dumps(dataclasses.asdict(self.settings)))
        theirs = json.loads(json.dumps(state["settings"]))
        changed = [name for name in mine if mine[name] != theirs.get(name)]
        if changed:
            names = ", ".join(changed)
            raise ValueError(
                f"expected a checkpoint of these settings, got other {names} in {path.name}; use another --out"
            )
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.active_seconds, self.curve = state["step"], state["active_seconds"], state["curve"]

    def averaged_state(self) -> dict[str, torch.Tensor]:
        """The averaged weights, which sample better than the last ones."""
        return {name: value.detach().cpu() for name, value in self.average.items()}


def _first_weights(settings: Settings):
    """Exported weights to go on from, or new ones; of the model that the settings describe."""
    if not settings.start:
        return model.build(settings.config)
    from .pipeline import load_pipeline

    net = load_pipeline(folder=Path(settings.start)).transformer
    came = {name: net.config[name] for name in settings.config}
    if json.loads(json.dumps(came)) != json.loads(json.dumps(settings.config)):
        wanted = settings.config
        raise ValueError(f"start: expected weights of {wanted}, got {came}; leave it out to train anew")
    return net.train().requires_grad_(True)


def _split_parameters(net) -> tuple[list, list]:
    """Matrices inside the network learn by orthogonalised steps; its ends, modulation and biases by AdamW."""
    matrices, others = [], []
    for name, parameter in net.named_parameters():
        inner = "blocks." in name and "norm" not in name and parameter.ndim == 2
        (matrices if inner else others).append(parameter)
    return matrices, others


def make_batch(settings: Settings, step: int, frames: int, clips: int, shift: float):
    """The batch of a step, decided by (seed, step) alone.

    Returns latents float32 [clips, 54, frames, 32, 32], int64 frame places [clips, frames],
    prompt codes [clips, 12, text_dim], noise like the latents, and noise levels [clips] in 0..1.
    """
    rng = np.random.default_rng([settings.seed, step])
    total = scene.NUM_FRAMES // codec.FRAMES
    pictures, places, prompts = [], [], []
    for _ in range(clips):
        chosen = np.sort(rng.choice(total, frames, replace=False))
        drawn = (chosen[:, None] * codec.FRAMES + np.arange(codec.FRAMES)).ravel()
        clip = renderer.render(scene.random_spec(rng), int(rng.integers(2**62)), frames=drawn)
        pictures.append(clip.frames)
        places.append(chosen)
        prompts.append("" if rng.random() < settings.null_prompts else captions.caption(clip.spec))
    latents = codec.encode(torch.from_numpy(np.stack(pictures)))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    noise = torch.randn(latents.shape, generator=generator)
    levels = _noise_levels(clips, shift, generator)
    return latents, torch.from_numpy(np.stack(places)), text.encode(prompts), noise, levels


def _noise_levels(clips: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """Mostly bell-shaped; evenly spread for a fifth, so that both ends of sampling are trained too."""
    bell = torch.sigmoid(1.2 * torch.randn(clips, generator=generator))
    even = torch.rand(clips, generator=generator)
    level = torch.where(torch.rand(clips, generator=generator) < 0.2, even, bell)
    return (shift * level / (1 + (shift - 1) * level)).clamp(0.002, 1.0)


def loss_of(net, batch, settings: Settings, run_block=None) -> torch.Tensor:
    """Velocity loss of the predicted clean latents; a scalar, with float32 gradients."""
    latents, places, prompt, noise, level = batch
    wide = level.view(-1, 1, 1, 1, 1)
    noisy = (1 - wide) * latents + wide * noise
    # bfloat16 products halve a step on CPUs that have them; parameters and tokens stay float32.
    with autocast(latents.device):
        clean = model.forward_frames(net, noisy, places, level * 1000, prompt, run_block)
    error = (clean.float() - latents).pow(2).mean((1, 2, 3, 4))
    return (error / level.clamp_min(settings.smallest_noise).pow(2)).mean()


def autocast(device):
    """bfloat16 products where the device has them."""
    if device.type == "cpu" and not torch.backends.mkldnn.is_available():
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def train_step(run: Run, run_block=None, team: Team = ALONE) -> float:
    """One update; returns the loss. Advances `run.step`, not the clock."""
    settings = run.settings
    stage = next(stage for end, *stage in settings.stages if run.progress < end or end == 1.0)
    whole = make_batch(settings, run.step, *stage)
    batch = [part[team.rank :: team.size].to(run.device) for part in whole]
    return update(run, loss_of(run.model, batch, settings, run_block), team)


def update(run: Run, loss: torch.Tensor, team: Team = ALONE) -> float:
    """One step of the optimizers along the loss; returns the team's mean loss."""
    settings = run.settings
    loss.backward()
    loss = team.average(list(run.model.parameters()), loss)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    factor = _rate(run)
    for optimizer, top in zip(run.optimizers, (settings.matrix_lr, settings.other_lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = top * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    _follow(run)
    run.step += 1
    return loss


def _rate(run: Run) -> float:
    warm = min(1.0, (run.step + 1) / run.settings.warmup_steps)
    flat = run.settings.flat_share
    late = max(0.0, (run.progress - flat) / (1 - flat))
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * late)))


@torch.no_grad()
def _follow(run: Run) -> None:
    keep = min(run.settings.ema, (run.step + 1) / (run.step + 10))
    names, values = zip(*run.model.named_parameters(), strict=True)
    torch._foreach_lerp_([run.average[n] for n in names], list(values), 1 - keep)


def train(
    run: Run,
    out: Path,
    *,
    compiled: bool = True,
    save_every: float = 120.0,
    team: Team = ALONE,
    step: Callable[[Run, Team], float] | None = None,
) -> None:
    """Train to the end of the budget; the first member writes checkpoint.pt and loss.csv into `out`.

    SIGTERM saves and returns. A step's time counts for at most three usual steps, so that a
    process stopped for a while does not lose its budget.
    step(run, team) makes one update and returns the loss; the text-to-video model's when None.
    """
    if step is None:
        run_block = torch.compile(model.block_forward, dynamic=False) if compiled else None
        step = functools.partial(_step_with, run_block)
    stop, usual, saved, losses = [], [], time.monotonic(), []
    before = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    with _bar() as bar:
        task = bar.add_task("training", total=1.0, loss="", visible=team.rank == 0)
        stopped = 0.0
        while run.progress < 1.0 and not stopped:
            began = time.monotonic()
            losses.append(step(run, team))
            usual = [*usual[-49:], time.monotonic() - began]
            active = run.active_seconds + min(usual[-1], 3 * statistics.median(usual))
            run.active_seconds, stopped = team.agree(active, len(stop))
            if run.step % 25 == 0:
                run.curve.append([run.step, round(run.active_seconds, 1), round(statistics.mean(losses), 5)])
                losses = []
                bar.update(task, completed=run.progress, loss=f"step {run.step} loss {run.curve[-1][2]:.4f}")
            if team.rank == 0 and time.monotonic() - saved > save_every:
                _record(run, out)
                saved = time.monotonic()
    if team.rank == 0:
        _record(run, out)
    signal.signal(signal.SIGTERM, before)


def _step_with(run_block, run: Run, team: Team) -> float:
    return train_step(run, run_block, team)


def _record(run: Run, out: Path) -> None:
    run.save(out / "checkpoint.pt")
    write_curve(run.curve, out / "loss.csv")


def _bar() -> Progress:
    words = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}")
    return Progress(*words, TimeRemainingColumn())


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside its place, then move it there: it appears whole or not at all."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


def write_curve(curve: list, path: Path) -> None:
    """Write rows of step, active seconds and mean loss since the row before as CSV."""
    lines = ["step,seconds,loss"] + [f"{step},{seconds},{loss}" for step, seconds, loss in curve]
    path.write_text("\n".join(lines) + "\n")


def read_curve(path: Path) -> list:
    """What `write_curve` wrote."""
    rows = (line.split(",") for line in path.read_text().splitlines()[1:])
    return [[int(step), float(seconds), float(loss)] for step, seconds, loss in rows]


def work(settings: Settings, out: Path, resume: bool, device: str, compiled: bool, team: Team = ALONE) -> Run:
    """One member's whole training, from the checkpoint when there is one and `resume` is set."""
    if team.size > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // team.size))
        store = torch.distributed.FileStore(str(out / "team"), team.size)
        torch.distributed.init_process_group("gloo", store=store, rank=team.rank, world_size=team.size)
    run = Run(settings, device)
    if resume and (out / "checkpoint.pt").exists():
        run.load(out / "checkpoint.pt")
    train(run, out, compiled=compiled, team=team)
    if team.size > 1:
        torch.distributed.destroy_process_group()
    return run


def launch(settings: Settings, out: Path, *, resume=False, device="cpu", compiled=True, workers=1) -> Run:
    """Train with this many processes on this machine; returns the finished run."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "team").unlink(missing_ok=True)
    start = torch.multiprocessing.get_context("spawn").Process
    arguments = (settings, out, resume, device, compiled)
    teams = [Team(rank, workers) for rank in range(1, workers)]
    others = [start(target=work, args=(*arguments, team), daemon=True) for team in teams]
    for process in others:
        process.start()
    run = work(*arguments, Team(0, workers))
    for process in others:
        process.join()
    return run


def chosen_device(name: str) -> str:
    """cpu or cuda for `auto`, the name itself otherwise."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def check_folders(out: Path, resume: bool, export: Path | None) -> None:
    """End with exit code 2 and one sentence where training would overwrite a run or could not write."""
    if (out / "checkpoint.pt").exists() and not resume:
        _refuse(
            f"--out: a folder without checkpoint.pt was expected, {out} has one; add --resume or take another"
        )
    if export is not None and export.exists() and not (export.is_dir() and os.access(export, os.W_OK)):
        _refuse(f"--export: a folder that can be written was expected, got {export}; choose another one")


def _refuse(sentence: str):
    typer.echo(sentence, err=True)
    raise typer.Exit(2)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Path = typer.Option(..., help="Folder for checkpoint.pt and loss.csv."),
    minutes: float = typer.Option(98.0, help="Active time to train."),
    steps: int = typer.Option(0, help="Train this many steps instead of some minutes."),
    seed: int = 0,
    resume: bool = typer.Option(False, help="Go on from OUT/checkpoint.pt when it exists."),
    device: str = typer.Option("auto", help="cpu, cuda, or auto: cuda when there is one."),
    workers: int = typer.Option(1, help="Processes that share each batch, on a CPU; 2 suits a shared machine."),
    start: str = typer.Option("", help="Go on from the weights exported into this folder."),
    export: Path | None = typer.Option(None, help="Also write the weights into this folder."),
    compiled: bool = typer.Option(True, help="Compile the transformer blocks."),
):
    """Train the toy text-to-video model."""
    device = chosen_device(device)
    check_folders(out, resume, export)
    settings = Settings(seed=seed, minutes=minutes, steps=steps, start=start)
    if start:
        settings = dataclasses.replace(settings, stages=LATER_STAGES, flat_share=0.4)
    run = launch(settings, out, resume=resume, device=device, compiled=compiled, workers=workers)
    if export is not None:
        from .pipeline import export_run

        export_run(run, export)


if __name__ == "__main__":
    # Through the package, so that worker processes find these classes under their real name.
    from vdit_ext.toyworld.train import app as packaged

    packaged()
