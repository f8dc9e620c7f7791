"""The toy class-conditional image model: its pictures, training, weights and check."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("diffusers")

from vdit_ext import toyworld
from vdit_ext.toyworld import check_dit, dit, scene, train, train_dit

TINY = dit.CONFIG | dict(num_attention_heads=1, attention_head_dim=32, num_layers=1)
SETTINGS = train_dit.Settings(steps=4, pictures=4, warmup_steps=2, config=TINY)


@pytest.fixture(scope="module")
def trained():
    return toyworld.load_dit()


def real_frames(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    frames, specs = zip(*(dit.random_frame(rng) for _ in range(count)), strict=True)
    return np.stack(frames), specs


# --- pictures ------------------------------------------------------------------------------------------------


def test_every_shape_and_colour_is_a_class():
    assert len(dit.CLASSES) == len(set(dit.CLASSES)) == 24
    for label in range(24):
        assert dit.class_of(dit.thing_of(label)) == label


def test_latents_of_frames_are_near_zero_mean_and_unit_variance():
    latents = dit.encode(torch.from_numpy(real_frames(256)[0]))
    assert latents.shape == (256, 3, 32, 32) and latents.dtype == torch.float32
    assert latents.mean((0, 2, 3)).abs().max() < 0.1
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_decoded_frames_are_the_means_of_three_by_three_pixels():
    frames = torch.from_numpy(real_frames(4)[0])
    decoded = dit.decode(dit.encode(frames))
    blocks = frames.float().view(4, 32, 3, 32, 3, 3).mean((2, 4))
    wide = blocks.repeat_interleave(3, 1).repeat_interleave(3, 2)
    assert decoded.dtype == torch.uint8 and (decoded - wide).abs().max() <= 0.51


# --- check ---------------------------------------------------------------------------------------------------


def test_the_check_passes_real_frames_and_names_what_it_sees():
    frames, specs = real_frames(48, seed=3)
    decoded = dit.decode(dit.encode(torch.from_numpy(frames))).numpy()
    for frame, spec in zip(decoded, specs, strict=True):
        result = check_dit.measure(frame, dit.class_of(spec.things[0]))
        assert result["passed"], (spec, result)
        assert result["seen_background"] == f"{spec.background.colour} {spec.background.texture}"


@pytest.mark.parametrize("part", ["colour", "shape"])
def test_the_check_fails_frames_of_another_class(part):
    words = {"colour": tuple(scene.THING_COLOURS), "shape": scene.SHAPES}[part]
    frames, specs = real_frames(24, seed=4)
    for frame, spec in zip(frames, specs, strict=True):
        thing = spec.things[0]
        other = words[(words.index(getattr(thing, part)) + 1) % len(words)]
        result = check_dit.measure(frame, dit.class_of(dataclasses.replace(thing, **{part: other})))
        assert not result[part] and not result["passed"]


def test_the_check_fails_noise():
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    assert not check_dit.measure(noise, 0)["background"]


def test_a_sheet_has_all_pictures_row_by_row():
    frames = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    picture = check_dit.sheet(frames, columns=3, gap=2)
    assert picture.shape == (20, 30, 3)
    assert (picture[2:10, 12:20] == 1).all() and (picture[12:20, 2:10] == 3).all()
    assert (picture[12:20, 22:] == 255).all()


# --- training ------------------------------------------------------------------------------------------------


def test_a_batch_depends_on_seed_and_step_alone_and_covers_all_noise_levels():
    first, again, other = (train_dit.make_batch(SETTINGS, step) for step in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    _, _, steps, labels = first
    assert (steps // 250).tolist() == [0, 1, 2, 3]
    assert ((labels >= 0) & (labels <= dit.NULL_CLASS)).all()


def test_a_new_model_predicts_nothing_and_every_block_is_the_identity():
    torch.manual_seed(0)
    net = dit.build(TINY)
    latents = torch.randn(2, 3, 32, 32)
    assert not net(latents, torch.tensor([1, 500]), torch.tensor([0, 24])).sample.any()
    tokens = torch.randn(2, 256, 32)
    block = net.transformer_blocks[0]
    assert torch.equal(block(tokens, timestep=torch.tensor([1, 5]), class_labels=torch.tensor([0, 1])), tokens)


def test_the_loss_weighs_noise_levels_by_their_signal_up_to_a_limit():
    net = dit.build(TINY)  # predicts 0, so that each picture's error is the mean square of its noise
    latents, noise = torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
    for step in (0, 400, 999):
        signal = float(dit.make_scheduler().alphas_cumprod[step])
        loss = train_dit.loss_of(net, (latents, noise, torch.tensor([step]), torch.tensor([0])), 300.0)
        assert float(loss) == pytest.approx(min(1 / signal, 300.0), rel=1e-5)


def test_loss_falls_within_a_few_steps():
    run = train_dit.start(dataclasses.replace(SETTINGS, steps=24, pictures=8))
    losses = [train_dit.train_step(run) for _ in range(24)]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_a_resumed_run_ends_with_the_same_weights_as_an_uninterrupted_one(tmp_path):
    whole = train_dit.start(SETTINGS)
    train.train(whole, tmp_path, step=train_dit.train_step)

    half = train_dit.start(SETTINGS)
    for _ in range(2):
        train_dit.train_step(half)
    half.save(tmp_path / "checkpoint.pt")
    resumed = train_dit.start(SETTINGS)
    resumed.load(tmp_path / "checkpoint.pt")
    train.train(resumed, tmp_path, step=train_dit.train_step)

    assert resumed.step == whole.step == 4
    for name, value in whole.averaged_state().items():
        assert torch.equal(value, resumed.averaged_state()[name]), name


def test_exported_weights_are_loaded_and_trained_on(tmp_path):
    first = train_dit.start(dataclasses.replace(SETTINGS, steps=2))
    train.train(first, tmp_path, step=train_dit.train_step)
    train_dit.export(first, tmp_path / "first")
    loaded = dit.load_dit(folder=tmp_path / "first").transformer
    for name, value in loaded.named_parameters():
        assert torch.equal(value, first.averaged_state()[name].half().float()), name

    later = train_dit.start(dataclasses.replace(SETTINGS, steps=1, start=str(tmp_path / "first")))
    train.train(later, tmp_path, step=train_dit.train_step)
    train_dit.export(later, tmp_path / "later")
    card = dit.read_card(tmp_path / "later", dit.NAME)
    assert card["steps"] == 3 and card["began_from"] == dit.read_card(tmp_path / "first", dit.NAME)
    assert "train_dit" in card["command"] and str(tmp_path) not in json.dumps(card)
    with pytest.raises(ValueError, match="start: expected weights of"):
        train_dit.start(dataclasses.replace(SETTINGS, start=str(tmp_path / "first"), config=dit.CONFIG))


def test_damaged_weights_are_refused(tmp_path):
    train_dit.export(train_dit.start(SETTINGS), tmp_path)
    path = tmp_path / "toy_dit.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"toy_dit.safetensors: expected sha256 .* install the package again"):
        dit.load_dit(folder=tmp_path)


def test_a_checkpoint_is_not_overwritten_by_a_new_run(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"kept")
    done = CliRunner().invoke(train_dit.app, ["--out", str(tmp_path), "--steps", "1"])
    assert done.exit_code == 2 and "--resume" in done.output
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"kept"


# --- the weights that come with the package ------------------------------------------------------------------


def test_the_trained_model_samples_the_same_from_the_same_seed(trained):
    steps = []
    first = trained([0, 7], seed=3, num_inference_steps=4, callback=lambda *now: steps.append(now))
    again = trained([7], seed=4, num_inference_steps=4)
    assert first.shape == (2, 3, 32, 32) and first.isfinite().all()
    torch.testing.assert_close(first[1], again[0], atol=1e-4, rtol=1e-4)
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_guidance_needs_the_null_class(trained):
    plain, guided = (trained([3], num_inference_steps=3, guidance_scale=g) for g in (1.0, 3.0))
    assert not torch.equal(plain, guided)


@pytest.mark.parametrize("classes", [[], [24], [-1]], ids=str)
def test_a_number_that_is_no_class_is_refused(trained, classes):
    with pytest.raises(ValueError, match="expected class numbers 0 to 23, got"):
        trained(classes)


def test_the_card_tells_how_the_weights_were_made():
    card = dit.read_card(dit.WEIGHTS, dit.NAME)
    curve = train.read_curve(dit.WEIGHTS / "toy_dit_loss.csv")
    assert card["config"] == json.loads(json.dumps(dit.CONFIG))
    assert card["steps"] >= curve[-1][0] > 1000 and curve[-1][2] < 0.2 * curve[0][2]
    assert (dit.WEIGHTS / "toy_dit.safetensors").stat().st_size < 5e6


def test_the_recorded_check_is_of_these_weights():
    record = json.loads((dit.WEIGHTS / "toy_dit_check.json").read_text())
    assert record["weights_sha256"] == dit.read_card(dit.WEIGHTS, dit.NAME)["sha256"]
    assert record["pictures"] == len(record["cases"])
