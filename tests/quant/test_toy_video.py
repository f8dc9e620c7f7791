"""ViDiT-Q on the trained toy model: decoded clips against those of full precision.

Short clips here, for speed; ``bench/quant_toy.py`` has the table over whole ones.
"""

from __future__ import annotations

import pytest
import torch
from cases.quant import snr

from vdit_ext import toyworld
from vdit_ext.quant import QuantLinear, apply, calibrate, linear_layers
from vdit_ext.quant.baselines import round_to_nearest
from vdit_ext.quant.vidit_q import average_bits, quantize
from vdit_ext.toyworld import captions, codec, text

STEPS, PROMPT = 4, "a red disc bounces over blue stripes"
CALIBRATION = ("a green square slides left over grey dots", "a yellow ring falls over pink checks")


def sample(pipe, prompt: str, seed: int, on_step=lambda step, steps: None) -> torch.Tensor:
    """Frames, fp32 [4, 96, 96, 3] in 0 .. 1, of the first two latent frames."""

    def after(wan, step, timestep, kwargs):
        if step + 1 < STEPS:
            on_step(step + 1, STEPS)
        return kwargs

    on_step(0, STEPS)
    latents = pipe.wan(
        prompt_embeds=text.encode([captions.caption(captions.parse(prompt))]),
        negative_prompt_embeds=text.encode([""]),
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=after,
        output_type="latent",
        height=256,
        width=256,
        num_frames=5,
    ).frames
    return codec.decode(latents.float())[0].to(torch.float32) / 255


def psnr(frames: torch.Tensor, reference: torch.Tensor) -> float:
    return float(-10 * torch.log10((frames - reference).square().mean()))


@pytest.fixture(scope="module")
def toy():
    pipe = toyworld.load_pipeline()
    runs = [lambda p=p, i=i: sample(pipe, p, 10 + i) for i, p in enumerate(CALIBRATION)]
    return pipe, calibrate(pipe.transformer, runs), sample(pipe, PROMPT, 0)


def clip_psnr(toy, quantized) -> float:
    pipe, _, reference = toy
    with apply(pipe.transformer, quantized) as applied:
        return psnr(sample(pipe, PROMPT, 0, applied.set_step), reference)


def test_w8a8_is_within_35_decibels(toy):
    quantized = quantize(toy[0].transformer, toy[1], bits="w8a8")
    assert clip_psnr(toy, quantized) >= 35


def test_w4a8_with_mixed_precision_is_within_28_decibels(toy):
    model = toy[0].transformer
    quantized = quantize(model, toy[1], bits="w4a8-mp")
    assert quantized.report["average_weight_bits"] == average_bits(linear_layers(model), quantized.intervals)
    assert quantized.report["average_weight_bits"] < 6.5
    assert clip_psnr(toy, quantized) >= 28


def test_mask_and_rotation_beat_rounding_in_most_layers(toy):
    """Output error at 4 bits on the calibration's rows, group by group."""
    model, found = toy[0].transformer, toy[1]
    both = quantize(model, found, bits="w4a8").layers
    plain = round_to_nearest(model, bits="w4a8").layers
    gains = []
    for info in linear_layers(model):
        linear, rows = model.get_submodule(info.name), found[info.name].rows[:128]
        exact = linear(rows)
        ours, theirs = (snr(QuantLinear(some[info.name])(rows), exact) for some in (both, plain))
        gains.append(ours - theirs)
    gains = torch.tensor(gains)
    assert gains.median() > 0.5 and (gains > 0).float().mean() > 0.8
