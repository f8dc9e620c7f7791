"""Measures whether the toy image model draws the class it was asked for, in decoded pixels.

python -m vdit_ext.toyworld.check_dit --pictures 48
"""

import json
import time
from pathlib import Path

import numpy as np
import typer

from . import check, dit, renderer, scene

PARTS = ("colour", "shape", "background", "passed")


def measure(picture: np.ndarray, label: int) -> dict:
    """Check a picture uint8 [96, 96, 3] against a class number.

    The background is free: it is taken to be the one, of those the model has seen, that fits the picture best.
    Returns a dict: the bools `colour`, `shape`, `background` (it is close to that plate) and, all together,
    `passed`; what was seen (`seen_colour`, `seen_shape`, `seen_background`), and `background_error` in 0..255.
    """
    spec = scene.SceneSpec((dit.thing_of(label),), nearest_background(picture))
    found = check.measure(picture[None], spec)
    kept = {name: found[name] for name in ("colour", "shape", "background")}
    seen = {name: found[name] for name in ("seen_colour", "seen_shape", "background_error")}
    background = f"{spec.background.colour} {spec.background.texture}"
    return {"passed": all(kept.values()), **kept, **seen, "seen_background": background}


def nearest_background(picture: np.ndarray) -> scene.BackgroundSpec:
    """The known background with the smallest median error over all pixels; the thing covers fewer than half."""
    choices = [scene.BackgroundSpec(c, t) for c in scene.BACKGROUND_COLOURS for t in dit.TEXTURES]

    def error(choice: scene.BackgroundSpec) -> float:
        thing = scene.ThingSpec("red", "disc", scene.MOTIONS[0])
        plate = renderer.background_plate(scene.SceneSpec((thing,), choice)).astype(np.float32)
        return float(np.median(np.abs(picture - plate).sum(-1)))

    return min(choices, key=error)


def evaluate(model: dit.ToyDiT, pictures: int, seed: int = 1000, **sampling) -> tuple[dict, np.ndarray]:
    """Sample classes in turn and check each picture; picture i has class i modulo 24 and seed `seed + i`.

    Returns pass rates per part with every case, and the pictures uint8 [n, 96, 96, 3].
    """
    labels = [i % len(dit.CLASSES) for i in range(pictures)]
    began = time.monotonic()
    frames = []
    for first in range(0, pictures, 24):
        part = labels[first : first + 24]
        frames.append(dit.decode(model(part, seed=seed + first, **sampling)).numpy())
    frames = np.concatenate(frames)
    seconds = round((time.monotonic() - began) / pictures, 3)
    cases = [
        {"class": dit.CLASSES[label], "seed": seed + i, **measure(frame, label)}
        for i, (frame, label) in enumerate(zip(frames, labels, strict=True))
    ]
    rates = {part: sum(case[part] for case in cases) / pictures for part in PARTS}
    result = {"pictures": pictures, "seed": seed, "sampling": sampling, "rates": rates}
    return result | {"seconds_per_picture": seconds, "cases": cases}, frames


def sheet(frames: np.ndarray, columns: int = 12, gap: int = 4) -> np.ndarray:
    """Pictures uint8 [n, h, w, 3] as one uint8 picture, row by row."""
    bordered = [np.pad(f, ((gap, 0), (gap, 0), (0, 0)), constant_values=255) for f in frames]
    bordered += [np.full_like(bordered[0], 255)] * (-len(bordered) % columns)
    rows = [np.concatenate(bordered[i : i + columns], 1) for i in range(0, len(bordered), columns)]
    return np.concatenate(rows, 0)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    pictures: int = typer.Option(48, min=1, help="How many pictures to sample."),
    steps: int = typer.Option(dit.DEFAULT_STEPS, help="Denoising steps."),
    guidance: float = typer.Option(dit.DEFAULT_GUIDANCE, help="Guidance scale; 1 leaves guidance out."),
    seed: int = 1000,
    weights: Path | None = typer.Option(None, help="Folder of the weights; the package's own when left out."),
    record: Path | None = typer.Option(None, help="Write the result to this JSON file."),
    picture: Path | None = typer.Option(None, help="Write a contact sheet to this PNG file."),
):
    """Sample every class and print how many pictures show what was asked."""
    if record is not None:
        check.check_output("--record", record)
    if picture is not None:
        check.check_output("--picture", picture)
        image = check.pillow(picture)
    folder = weights or dit.WEIGHTS
    sampling = {"num_inference_steps": steps, "guidance_scale": guidance}
    result, frames = evaluate(dit.load_dit(folder=folder), pictures, seed, **sampling)
    result["weights_sha256"] = dit.read_card(folder, dit.NAME)["sha256"]
    print("  ".join(f"{part} {rate:.0%}" for part, rate in result["rates"].items()))
    if record is not None:
        record.write_text(json.dumps(result, indent=1) + "\n")
    if picture is not None:
        image.fromarray(sheet(frames)).save(picture)


if __name__ == "__main__":
    app()
