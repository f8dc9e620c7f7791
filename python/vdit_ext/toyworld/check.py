"""Measures in decoded pixels whether a clip shows what its caption says.

Nothing here looks at latents or at the model: pixels are compared with the known background plate
and the known colours, the thing's track is read off them, and its motion is named from the track.

    python -m vdit_ext.toyworld.check --prompts 40
"""

import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import typer

from . import captions, renderer, scene

# Distances between colours are Euclidean in 0..255 RGB.
THING_DISTANCE = 55.0  # a pixel this far from every mixture of the plate's tones belongs to a thing
COLOUR_DISTANCE = 70.0  # the thing's mean colour may be this far from the named one
BACKGROUND_ERROR = 16.0  # mean absolute error of the plate, away from the thing
MOVED = 22.0  # pixels; less than this counts as standing still
SHOWN_SHARE = 0.85  # of the frames must show the thing


def measure(frames: np.ndarray, spec: scene.SceneSpec) -> dict:
    """Check a clip uint8 [f, 96, 96, 3] against a spec with one thing.

    Returns a dict: the bools `colour`, `motion`, `background` and `shape`, all together `passed`,
    what was seen (`seen_colour`, `seen_motion`, `seen_shape`), `track` float
    [f][2] (x, y in pixels, NaN where nothing shows), `shown` (share of frames with a thing),
    `colour_distance` and `background_error` in 0..255. Raises ValueError for frames of another size.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[1:] != (*scene.SIZE, 3):
        h, w = scene.SIZE
        raise ValueError(f"expected frames [f, {h}, {w}, 3], got {frames.shape}; decode the latents first")
    (thing,) = spec.things
    plate = renderer.background_plate(spec).astype(np.float32)
    pixels = frames.astype(np.float32)
    masks = np.stack([_largest_piece(_off_tones(p, spec) > THING_DISTANCE) for p in pixels])
    track = np.stack([_centre(mask) for mask in masks])
    shown = float(np.isfinite(track[:, 0]).mean())
    seen_colour, distance = _name_colour(pixels, masks)
    seen_motion = _name_motion(track)
    seen_shape = _name_shape(masks)
    error = _background_error(pixels, masks, plate)
    found = {
        "colour": seen_colour == thing.colour and distance < COLOUR_DISTANCE,
        "motion": seen_motion == thing.motion and shown >= SHOWN_SHARE,
        "shape": seen_shape == thing.shape,
        "background": error < BACKGROUND_ERROR,
    }
    return {
        "passed": all(found.values()),
        **found,
        "seen_colour": seen_colour,
        "seen_motion": seen_motion,
        "seen_shape": seen_shape,
        "colour_distance": distance,
        "background_error": error,
        "shown": shown,
        "track": track.tolist(),
    }


def _off_tones(picture: np.ndarray, spec: scene.SceneSpec) -> np.ndarray:
    """[h, w] distance of each pixel to the line between the background's two tones.

    A stripe in the wrong place is then a fault of the background, not a thing.
    """
    dark, light = (np.asarray(tone, np.float32) for tone in scene.BACKGROUND_COLOURS[spec.background.colour])
    along = ((picture - dark) @ (light - dark) / ((light - dark) @ (light - dark))).clip(-0.2, 1.2)
    return np.linalg.norm(picture - dark - along[..., None] * (light - dark), axis=-1)


def _largest_piece(mask: np.ndarray) -> np.ndarray:
    """The largest connected part, so that a stray speck does not pull the centre; empty when tiny."""
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # spread the largest number through each piece
        spread = np.where(mask, np.maximum.reduce(_with_neighbours(label)), 0)
        if (spread == label).all():
            break
        label = spread
    names, sizes = np.unique(label[mask], return_counts=True)
    if not len(names) or sizes.max() < 60:
        return np.zeros_like(mask)
    return label == names[sizes.argmax()]


def _with_neighbours(picture: np.ndarray) -> list[np.ndarray]:
    """A picture and its shifts by one pixel up, down, left and right."""
    padded = np.pad(picture, 1)
    return [padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]


def _centre(mask: np.ndarray) -> np.ndarray:
    """Middle of the box around a mask: a ring and a triangle then have the centre they are drawn at."""
    if not mask.any():
        return np.full(2, np.nan)
    y, x = np.nonzero(mask)
    return np.array([(x.min() + x.max() + 1) / 2, (y.min() + y.max() + 1) / 2])


def _name_colour(pixels: np.ndarray, masks: np.ndarray) -> tuple[str | None, float]:
    if not masks.any():
        return None, float("inf")
    mean = np.median(pixels[masks], axis=0)
    distance = {name: float(np.linalg.norm(mean - rgb)) for name, rgb in scene.THING_COLOURS.items()}
    nearest = min(distance, key=distance.get)
    return nearest, distance[nearest]


def _name_motion(track: np.ndarray) -> str | None:
    """Name of the motion a track shows, or None when it shows none of them."""
    seen = track[np.isfinite(track[:, 0])]
    if len(seen) < 4:
        return None
    dx, dy = seen[-2:].mean(0) - seen[:2].mean(0)
    spread_x, spread_y = np.ptp(seen, axis=0)
    if spread_y > MOVED and spread_x < MOVED and _turns(seen[:, 1]) >= 2:
        return "bounces"
    if abs(dx) > MOVED and spread_y < MOVED:
        return "slides right" if dx > 0 else "slides left"
    if abs(dy) > MOVED and spread_x < MOVED:
        return "falls" if dy > 0 else "rises"
    return None


def _turns(values: np.ndarray, least: float = 8.0) -> int:
    """How often a series changes direction by more than `least` pixels."""
    turns, direction, extreme = 0, 0, values[0]
    for value in values[1:]:
        if direction >= 0 and value < extreme - least:
            turns, direction, extreme = turns + (direction > 0), -1, value
        elif direction <= 0 and value > extreme + least:
            turns, direction, extreme = turns + (direction < 0), 1, value
        elif (direction > 0 and value > extreme) or (direction < 0 and value < extreme):
            extreme = value
    return turns


def _name_shape(masks: np.ndarray) -> str | None:
    """The shape that overlaps best with the mean of the masks, each moved to the middle.

    A person, too, sees the shape over the whole clip and not in one ragged frame.
    """
    shown = masks[masks.any((1, 2))]
    if not len(shown):
        return None
    mean = np.mean([_to_middle(mask) for mask in shown], axis=0)
    size = np.sqrt(shown.sum((1, 2)).mean())
    scores = {
        shape: max(_overlap(mean, shape, size * share) for share in (0.94, 1.0, 1.06)) for shape in scene.SHAPES
    }
    return max(scores, key=scores.get)


def _to_middle(mask: np.ndarray) -> np.ndarray:
    """The mask moved by whole pixels so that its centre of mass is the middle of the picture."""
    y, x = np.nonzero(mask)
    moved = np.zeros(mask.shape, np.float32)
    y = y + round(mask.shape[0] / 2 - y.mean() - 0.5)
    x = x + round(mask.shape[1] / 2 - x.mean() - 0.5)
    inside = (y >= 0) & (y < mask.shape[0]) & (x >= 0) & (x < mask.shape[1])
    moved[y[inside], x[inside]] = 1
    return moved


def _overlap(mean: np.ndarray, shape: str, size: float) -> float:
    """Intersection over union of a mean mask with a shape of area size**2."""
    drawn = _drawn(shape, size * _RADIUS_PER_SIZE[shape])
    return float(np.minimum(drawn, mean).sum() / np.maximum(drawn, mean).sum())


def _drawn(shape: str, radius: float) -> np.ndarray:
    middle = np.array([scene.SIZE[1] / 2, scene.SIZE[0] / 2])
    return _to_middle(renderer.shape_cover(shape, radius, middle[None])[0] >= 0.5)


_RADIUS_PER_SIZE = {shape: 20.0 / np.sqrt(_drawn(shape, 20.0).sum()) for shape in scene.SHAPES}


def _background_error(pixels: np.ndarray, masks: np.ndarray, plate: np.ndarray) -> float:
    errors = []
    for picture, mask in zip(pixels, masks, strict=True):
        away = ~_grown(mask, 4)
        if away.any():
            errors.append(np.abs(picture - plate)[away].mean())
    return float(np.mean(errors)) if errors else float("inf")


def _grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    for _ in range(pixels):
        mask = np.logical_or.reduce(_with_neighbours(mask))
    return mask


PARTS = ("colour", "motion", "shape", "background", "passed")


def evaluate(pipe, prompts: int, seed: int = 1000, progress=None, **sampling) -> tuple[dict, list[np.ndarray]]:
    """Sample seeded random prompts and check each.

    Returns pass rates per part with every case's result, and the clips. Prompt i is drawn from
    seed + i, which is also its sampling seed.
    """
    cases, clips = [], []
    for i in range(prompts):
        spec = scene.random_spec(np.random.default_rng(seed + i))
        prompt = captions.caption(spec)
        began = time.monotonic()
        frames = pipe(prompt, seed=seed + i, **sampling).frames
        result = measure(frames, spec)
        result.pop("track")
        seconds = round(time.monotonic() - began, 2)
        cases.append({"prompt": prompt, "seed": seed + i, "seconds": seconds, **result})
        clips.append(frames)
        if progress is not None:
            progress(i + 1, prompts, cases[-1])
    rates = {part: sum(case[part] for case in cases) / len(cases) for part in PARTS}
    return {"prompts": prompts, "seed": seed, "sampling": sampling, "rates": rates, "cases": cases}, clips


app = typer.Typer(add_completion=False)


@app.command()
def main(
    prompts: int = typer.Option(20, help="How many random prompts to sample."),
    steps: int = typer.Option(0, help="Denoising steps; 0 takes the pipeline's own number."),
    guidance: float = typer.Option(-1.0, help="Guidance scale; below 0 takes the pipeline's own."),
    seed: int = 1000,
    weights: Path | None = typer.Option(None, help="Folder of the weights; the package's own when left out."),
    record: Path | None = typer.Option(None, help="Write the result to this JSON file."),
    picture: Path | None = typer.Option(None, help="Write a contact sheet to this PNG file."),
):
    """Sample many prompts and print how many clips show what was asked."""
    from .pipeline import WEIGHTS, load_pipeline, read_card

    sampling = {"num_inference_steps": steps} if steps else {}
    sampling |= {"guidance_scale": guidance} if guidance >= 0 else {}

    def say(done, total, case):
        missed = [part for part in PARTS[:-1] if not case[part]]
        verdict = f"not {', '.join(missed)}" if missed else "ok"
        print(f"{done}/{total} {case['prompt']}: {verdict}", flush=True)

    if record is not None:
        check_output("--record", record)
    if picture is not None:
        check_output("--picture", picture)
        image = pillow(picture)
    folder = weights or WEIGHTS
    result, clips = evaluate(load_pipeline(folder=folder), prompts, seed, say, **sampling)
    result["weights_sha256"] = read_card(folder)["sha256"]
    print("  ".join(f"{part} {rate:.0%}" for part, rate in result["rates"].items()))
    if record is not None:
        record.write_text(json.dumps(result, indent=1) + "\n")
    if picture is not None:
        from .sheet import clip_grid

        image.fromarray(clip_grid(clips)).save(picture)


def check_output(option: str, path: Path) -> None:
    """End with exit code 2 and one sentence where a file cannot be written; called before any sampling."""
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            fits = not path.is_dir() and (not path.exists() or os.access(path, os.W_OK))
    except OSError:
        fits = False
    if not fits:
        _refuse(f"{option}: a file that can be written was expected, got {str(path)!r}; choose another path.")


def pillow(picture: Path):
    """Pillow's Image module; ends with exit code 2 and one sentence for another suffix or without Pillow."""
    if picture.suffix.lower() != ".png":
        _refuse(f"--picture: a file name ending in .png was expected, got {str(picture)!r}.")
    try:
        from PIL import Image
    except ModuleNotFoundError:
        _refuse("--picture: pillow is expected, it is not installed; run `pip install 'vdit-ext[video]'`.")
    return Image


def _refuse(sentence: str):
    typer.echo(sentence, err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
