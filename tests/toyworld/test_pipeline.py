import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from vdit_ext import toyworld
from vdit_ext.toyworld import check, codec, pipeline

EXAMPLE = "a red disc bounces over blue stripes"


@pytest.fixture(scope="module")
def pipe():
    return toyworld.load_pipeline()


def test_the_weights_are_small_and_their_making_is_recorded():
    folder = pipeline.WEIGHTS
    assert (folder / "toy_t2v.safetensors").stat().st_size <= 8_000_000
    card = pipeline.read_card()
    assert {"config", "settings", "command", "steps", "world_version", "sha256"} <= set(card)
    assert card["settings"]["seed"] is not None
    assert len((folder / "toy_t2v_loss.csv").read_text().splitlines()) > 10


@pytest.mark.parametrize(
    ("prompt", "seed"),
    [
        (EXAMPLE, 0),
        ("a yellow square slides right over green checks", 1),
        ("a white ring rises over plain pink", 2),
    ],
)
def test_seeded_samples_show_what_was_asked(pipe, prompt, seed):
    result = pipe(prompt, seed=seed, num_inference_steps=12)
    assert result.frames.shape == (16, 96, 96, 3)
    assert result.frames.dtype == np.uint8
    assert result.latents.shape == (1, 54, 8, 32, 32)
    assert np.array_equal(codec.decode(result.latents)[0].numpy(), result.frames)
    assert check.measure(result.frames, result.spec)["passed"]


def test_a_seed_repeats_and_the_callback_counts_steps(pipe):
    told = []
    first = pipe(
        EXAMPLE, seed=5, num_inference_steps=2, callback=lambda step, total: told.append((step, total))
    )
    again = pipe(EXAMPLE, seed=5, num_inference_steps=2)
    assert told == [(1, 2), (2, 2)]
    assert torch.equal(first.latents, again.latents)


def test_the_pipeline_is_the_one_of_diffusers(pipe):
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    assert isinstance(pipe.wan, WanPipeline)
    assert isinstance(pipe.transformer, WanTransformer3DModel)
    assert isinstance(pipe.scheduler, UniPCMultistepScheduler)
    assert (pipe.num_frames, pipe.fps, pipe.size) == (16, 8, (96, 96))


def test_half_precision_keeps_what_the_class_wants_in_float32():
    half = toyworld.load_pipeline(torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16
    assert half.transformer.scale_shift_table.dtype == torch.float32
    assert half(EXAMPLE, num_inference_steps=1).latents.isfinite().all()


def test_an_unknown_word_is_refused_before_sampling(pipe):
    with pytest.raises(ValueError, match="zebra"):
        pipe("a red zebra bounces over blue stripes")


@pytest.fixture
def copied(tmp_path):
    for path in pipeline.WEIGHTS.glob("toy_t2v*"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_damaged_weights_are_refused_in_one_sentence(copied):
    path = copied / "toy_t2v.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match="expected sha256 .* got .*install the package again") as error:
        toyworld.load_pipeline(folder=copied)
    assert "\n" not in str(error.value)


def test_weights_of_another_model_are_refused(copied):
    card = json.loads((copied / "toy_t2v.json").read_text())
    card["config"]["num_layers"] += 1
    (copied / "toy_t2v.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="belong to another model"):
        toyworld.load_pipeline(folder=copied)


@pytest.mark.parametrize(
    ("card", "told"),
    [
        (b"[]", "expected a JSON object, got list"),
        (b"{", "expected JSON"),
        (b"\xff\xfe{}", "expected JSON"),
        (b'{"world_version": 1, "config": {}}', "expected settings to be dict, got nothing"),
        (
            b'{"world_version": 1, "config": {}, "settings": {}, "steps": 1, "active_seconds": 1, "sha256": 5}',
            "expected sha256 to be str, got int",
        ),
    ],
)
def test_a_foreign_card_is_refused_in_one_sentence(copied, card, told):
    (copied / "toy_t2v.json").write_bytes(card)
    with pytest.raises(ValueError, match=told) as error:
        toyworld.load_pipeline(folder=copied)
    assert "\n" not in str(error.value)


def test_the_recorded_check_is_of_these_weights():
    record = json.loads((pipeline.WEIGHTS / "toy_t2v_check.json").read_text())
    assert record["weights_sha256"] == pipeline.read_card()["sha256"]
    assert record["prompts"] >= 40 and record["rates"]["passed"] >= 0.9


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match="toy_t2v.json"):
        toyworld.load_pipeline(folder=tmp_path)
