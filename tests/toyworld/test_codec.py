import pytest
import torch

from vdit_ext.toyworld import codec


def test_decode_is_the_inverse_of_encode_for_every_byte():
    frames = torch.randint(
        0, 256, (2, 16, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    latents = codec.encode(frames)
    assert latents.shape == (2, 54, 8, 32, 32)
    assert latents.dtype == torch.float32
    assert torch.equal(codec.decode(latents), frames)


def test_the_transform_keeps_distances_up_to_its_scale():
    a, b = torch.rand(2, 1, 4, 6, 9, 3, generator=torch.Generator().manual_seed(1)) * 255
    apart = (codec.encode(a) - codec.encode(b)).norm()
    torch.testing.assert_close(apart, (a - b).norm() / 127.5 * codec.SCALE)


def test_values_beyond_the_bytes_are_clipped():
    assert codec.decode(torch.full((1, 54, 1, 1, 1), 50.0)).max() == 255


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: codec.encode(torch.zeros(16, 96, 96, 3)), "(16, 96, 96, 3)"),
        (lambda: codec.encode(torch.zeros(1, 15, 96, 96, 3)), "15"),
        (lambda: codec.decode(torch.zeros(1, 16, 8, 32, 32)), "54"),
    ],
)
def test_wrong_shapes_are_named(call, part):
    with pytest.raises(ValueError) as error:
        call()
    assert part in str(error.value)
