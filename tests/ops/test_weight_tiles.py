"""Weight tiles against the layouts that csrc/include/vdit/linear.h writes down, and the ops that widen them."""

from __future__ import annotations

import pytest
import torch
from cases.rows import on

from vdit_ext import ops
from vdit_ext.ops import linear as defs
from vdit_ext.testing import generator

SIZES = [(1, 1), (32, 32), (33, 16), (70, 100), (31, 65), (128, 160)]
BACKENDS = ("cpu", "emu", "emu_sm90", "cuda")


def draw(n: int, k: int, limit: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, limit, (n, k), generator=generator(seed), dtype=torch.uint8)


@pytest.mark.parametrize("pack", ["w4", "log4"])
@pytest.mark.parametrize("n, k", SIZES)
def test_unpack_is_the_inverse(pack, n, k):
    codes = draw(n, k)
    tiles = getattr(ops, f"pack_{pack}")(codes)
    assert tiles.shape == (-(-n // 32), -(-k // 32), 512) and tiles.dtype == torch.uint8
    assert torch.equal(getattr(ops, f"unpack_{pack}")(tiles, n, k), codes)
    whole = getattr(ops, f"unpack_{pack}")(tiles, -(-n // 32) * 32, -(-k // 32) * 32)
    assert whole.sum() == codes.sum(), "what lies past N and K is 0"


def test_w4_layout_byte_by_byte():
    codes = draw(64, 64, seed=1)
    tiles = ops.pack_w4(codes)
    for lane in range(32):
        for j in range(16):
            k = 16 * (j // 8) + 4 * (lane % 4) + j % 4
            n = 8 * (j // 4 % 2) + lane // 4
            byte = int(tiles[1, 1, 16 * lane + j])
            assert byte & 15 == codes[32 + n, 32 + k] and byte >> 4 == codes[32 + n + 16, 32 + k]


def test_log4_layout_code_by_code():
    codes = draw(64, 64, seed=2)
    tiles = ops.pack_log4(codes)
    for lane in range(32):
        for word in range(8):
            at = 16 * lane + 2 * word
            bits = int(tiles[1, 0, at]) | int(tiles[1, 0, at + 1]) << 8
            for t in range(4):
                n, k = 8 * (word // 2) + lane // 4, 16 * (word % 2) + 4 * (lane % 4) + t
                assert bits >> 4 * t & 15 == codes[32 + n, k]


@pytest.mark.parametrize("n, k", SIZES)
def test_expand_w4(backend, n, k):
    codes, low = draw(n, k), draw(n, k, seed=3)
    tiles, low_tiles = on(backend, ops.pack_w4(codes), ops.pack_w4(low))
    out = backend.ops.expand_w4(tiles, n, k)
    assert torch.equal(out.cpu(), codes.to(torch.int8))
    both = backend.ops.expand_w4(tiles, n, k, weight_low=low_tiles)
    assert torch.equal(both.cpu(), (16 * codes.int() + low - 128).to(torch.int8))
    width = -(-k // 16) * 16
    assert out.stride(0) == width and (out.as_strided((n, width), (width, 1))[:, k:] == 0).all()


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("n, k", SIZES)
def test_expand_log4(backend, n, k, bits):
    codes = draw(n, k, 2**bits)
    table = torch.randint(-128, 128, (n, 2**bits), generator=generator(4), dtype=torch.int8)
    tiles, table_there = on(backend, ops.pack_log4(codes), table)
    out = backend.ops.expand_log4(tiles, table_there, k)
    assert torch.equal(out.cpu(), table.gather(1, codes.long()))


def test_the_fourth_bit_of_three_bit_codes_is_not_read(backend):
    codes = draw(40, 48)
    table = torch.randint(-128, 128, (40, 8), generator=generator(4), dtype=torch.int8)
    tiles, table_there = on(backend, ops.pack_log4(codes), table)
    assert torch.equal(backend.ops.expand_log4(tiles, table_there, 48).cpu(), table.gather(1, codes.long() & 7))


def test_pack_refuses():
    for pack in (ops.pack_w4, ops.pack_log4):
        with pytest.raises(ValueError, match=r"codes must be in 0..15, got 16"):
            pack(torch.full((2, 2), 16, dtype=torch.uint8))
        with pytest.raises(ValueError, match=r"codes must be uint8 \[N, K\], got torch.int8"):
            pack(torch.zeros(2, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"tiles must be uint8 \[1, 2, 512\]"):
        ops.unpack_w4(torch.zeros(1, 1, 512, dtype=torch.uint8), 32, 33)


def test_expand_refuses(backend):
    tiles = torch.zeros(2, 1, 512, dtype=torch.uint8, device=backend.device)
    table = torch.zeros(40, 16, dtype=torch.int8, device=backend.device)
    for call, sentence in (
        (
            lambda o: o.expand_w4(tiles, 65, 32),
            r"weight must be \[3, 1, 512\] for 65 by 32 codes, got \[2, 1, 512\]",
        ),
        (lambda o: o.expand_w4(tiles.char(), 40, 32), "weight must be uint8, got int8"),
        (lambda o: o.expand_w4(tiles, 40, 0), "there must be 1 to 65536 in_features"),
        (lambda o: o.expand_w4(tiles, 40, 32, weight_low=tiles[:1]), r"weight_low must be \[2, 1, 512\]"),
        (
            lambda o: o.expand_log4(tiles, table[:, :4], 32),
            r"table must be \[40, 16\] \(four bits\) or \[40, 8\]",
        ),
        (lambda o: o.expand_log4(tiles, table[:, ::2], 32), "table must be contiguous"),
        (lambda o: o.expand_log4(tiles, table.int(), 32), "table must be int8, got int32"),
    ):
        with pytest.raises(RuntimeError, match=f"vdit::expand_(w4|log4): .*{sentence}"):
            call(backend.ops)


@pytest.mark.parametrize("low", [False, True])
def test_opcheck(low):
    tiles = ops.pack_w4(draw(40, 50))
    kwargs = {"weight_low": ops.pack_w4(draw(40, 50, seed=5))} if low else {}
    torch.library.opcheck(torch.ops.vdit.expand_w4.default, (tiles, 40, 50), kwargs)
    table = torch.zeros(40, 16, dtype=torch.int8)
    torch.library.opcheck(torch.ops.vdit.expand_log4.default, (tiles, table, 50))
    assert torch.equal(defs.expand_w4_naive(tiles, 40, 50, **kwargs), ops.expand_w4(tiles, 40, 50, **kwargs))
    assert torch.equal(defs.expand_log4_naive(tiles, table, 50), ops.expand_log4(tiles, table, 50))
