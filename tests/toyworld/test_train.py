import dataclasses

import pytest
import torch

pytest.importorskip("diffusers")

from vdit_ext.toyworld import model, train

TINY = model.CONFIG | dict(num_attention_heads=1, ffn_dim=32, num_layers=1)
SETTINGS = train.Settings(steps=4, stages=((0.5, 1, 2, 4.0), (1.0, 2, 1, 12.0)), warmup_steps=2, config=TINY)


def test_a_batch_depends_on_seed_and_step_alone():
    first, again, other = (train.make_batch(SETTINGS, step, 2, 3, 4.0) for step in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    latents, places, prompt, noise, level = first
    assert latents.shape == noise.shape == (3, 54, 2, 32, 32)
    assert (places.diff(dim=1) > 0).all()
    assert ((level > 0) & (level <= 1)).all()


def test_a_resumed_run_ends_with_the_same_weights_as_an_uninterrupted_one(tmp_path):
    whole = train.Run(SETTINGS)
    for _ in range(4):
        train.train_step(whole)

    half = train.Run(SETTINGS)
    for _ in range(2):
        train.train_step(half)
    half.save(tmp_path / "checkpoint.pt")
    resumed = train.Run(SETTINGS)
    resumed.load(tmp_path / "checkpoint.pt")
    train.train(resumed, tmp_path, compiled=False)

    assert resumed.step == whole.step == 4
    for name, value in whole.averaged_state().items():
        assert torch.equal(value, resumed.averaged_state()[name]), name


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    train.Run(SETTINGS).save(tmp_path / "checkpoint.pt")
    other = train.Run(dataclasses.replace(SETTINGS, matrix_lr=0.1))
    with pytest.raises(ValueError, match="matrix_lr"):
        other.load(tmp_path / "checkpoint.pt")


def test_the_budget_in_minutes_counts_active_time():
    run = train.Run(dataclasses.replace(SETTINGS, steps=0, minutes=2))
    run.active_seconds = 30
    assert run.progress == 0.25


def test_loss_falls_within_a_few_steps():
    run = train.Run(dataclasses.replace(SETTINGS, steps=14, stages=((1.0, 1, 4, 4.0),)))
    losses = [train.train_step(run) for _ in range(14)]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
