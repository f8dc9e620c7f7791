import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from vdit_ext.toyworld import model, text  # noqa: E402

TINY = model.CONFIG | dict(num_attention_heads=1, ffn_dim=64, num_layers=2)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return model.build(TINY)


@pytest.mark.parametrize("side", [16, 32])  # 512 tokens run the written-out attention, 2048 the fused one
def test_training_forward_equals_the_forward_of_the_class(tiny, side):
    latents = torch.randn(2, 54, 8, side, side)
    timestep = torch.tensor([31.0, 904.5])
    prompt = text.encode(["a red disc bounces over blue stripes", ""])
    with torch.no_grad():
        expected = tiny(latents, timestep, prompt, return_dict=False)[0]
        came = model.forward_frames(tiny, latents, torch.arange(8).expand(2, 8), timestep, prompt)
    torch.testing.assert_close(came, expected, atol=2e-5, rtol=1e-4)


def test_gradients_of_the_training_forward_equal_those_of_the_class(tiny):
    latents, timestep, prompt = torch.randn(1, 54, 2, 8, 8), torch.tensor([500.0]), text.encode([""])
    grads = []
    for run in (
        lambda: tiny(latents, timestep, prompt, return_dict=False)[0],
        lambda: model.forward_frames(tiny, latents, torch.arange(2)[None], timestep, prompt),
    ):
        tiny.zero_grad()
        run().square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in tiny.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], atol=1e-5, rtol=1e-3, msg=name)


def test_a_frame_knows_its_place_in_time_and_a_token_its_place_in_the_picture(tiny):
    latents = torch.zeros(1, 54, 1, 32, 32)
    with torch.no_grad():
        first, last = (tiny.patch_embedding(latents, torch.tensor([[place]])) for place in (0, 7))
    assert not torch.allclose(first, last)
    tokens = first[0].flatten(1).T
    assert torch.cdist(tokens, tokens).fill_diagonal_(9).min() > 1e-3


def test_a_clip_has_at_least_two_thousand_tokens_and_a_supported_head_size():
    assert 8 * 16 * 16 >= 2000
    assert model.CONFIG["attention_head_dim"] in (64, 96, 128)
