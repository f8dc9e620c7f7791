import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("diffusers")

from vdit_ext.toyworld import model, pipeline, train

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


def test_a_run_goes_on_from_exported_weights_and_says_so(tmp_path):
    first = train.Run(dataclasses.replace(SETTINGS, steps=2))
    train.train(first, tmp_path, compiled=False)
    first.curve = [[2, 1.5, 0.5]]
    pipeline.export_run(first, tmp_path / "first")

    later = train.Run(dataclasses.replace(SETTINGS, steps=1, start=str(tmp_path / "first")))
    for name, value in first.averaged_state().items():
        assert torch.equal(later.averaged_state()[name], value.half().float()), name
    train.train(later, tmp_path, compiled=False)
    later.curve = [[1, 0.5, 0.25]]
    pipeline.export_run(later, tmp_path / "later")

    card = pipeline.read_card(tmp_path / "later")
    assert card["steps"] == 3 and card["began_from"] == pipeline.read_card(tmp_path / "first")
    assert str(tmp_path) not in json.dumps(card)
    curve = train.read_curve(tmp_path / "later" / "toy_t2v_loss.csv")
    assert [(step, loss) for step, _, loss in curve] == [(2, 0.5), (3, 0.25)]


def test_weights_of_another_model_are_no_start(tmp_path):
    pipeline.export_run(train.Run(SETTINGS), tmp_path)
    other = dataclasses.replace(SETTINGS, start=str(tmp_path), config=TINY | dict(num_layers=2))
    with pytest.raises(ValueError, match="start: expected weights of"):
        train.Run(other)


def test_a_checkpoint_is_not_overwritten_by_a_new_run(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"kept")
    done = CliRunner().invoke(train.app, ["--out", str(tmp_path), "--steps", "1"])
    assert done.exit_code == 2 and "--resume" in done.output
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"kept"


def test_an_export_folder_that_is_a_file_is_refused_before_training(tmp_path):
    (tmp_path / "file").touch()
    done = CliRunner().invoke(train.app, ["--out", str(tmp_path / "run"), "--export", str(tmp_path / "file")])
    assert done.exit_code == 2 and "--export" in done.output and not (tmp_path / "run").exists()


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
