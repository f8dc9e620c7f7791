"""Hadamard matrices of every size that video transformers need, and products with them.

A size is K0 * 2^p: powers of two by Sylvester's doubling, K0 = 4 * odd by Paley's two constructions from
quadratic residues of a prime, and where no prime fits by the array of Goethals and Seidel from four circulant
matrices. ViDiT-Q's full-size rotation uses them (specs section 4).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

FUSED_HADAMARD = (16, 32, 64, 128)  # block sizes that quantize_rows applies itself

_PALEY_1 = {12: 11, 20: 19, 60: 59, 108: 107, 140: 139}  # order to the prime q = 3 mod 4, order = q + 1
_PALEY_2 = {28: 13, 36: 17}  # order to the prime q = 1 mod 4, order = 2 (q + 1)
# Order 4 n to (n, g, masks): the first rows of four circulants of size n, constant on the orbits of x -> g x
# mod n. Bit i of a mask is 1 where the entries of the i-th orbit, by smallest member, are -1. Found by going
# through all masks whose spectrum stays below 4 n; any such four with autocorrelations that cancel would do.
_FOUR_CIRCULANTS = {
    52: (13, 5, (2, 10, 10, 12)),
    156: (39, 16, (1742, 7353, 1799, 4284)),
    172: (43, 37, (14, 92, 104, 196)),
}
CORES = tuple(sorted({*_PALEY_1, *_PALEY_2, *_FOUR_CIRCULANTS}))


def hadamard_block(in_features: int) -> int:
    """The block size for C channels: 128 where it divides C, else the largest power of two that does, from 16
    on, else 0 (no rotation)."""
    power = in_features & -in_features
    return 0 if power < FUSED_HADAMARD[0] else min(power, FUSED_HADAMARD[-1])


def random_signs(in_features: int, seed: int) -> Tensor:
    """fp32 ``[C]`` of +1 and -1, the same on every machine for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, (in_features,), generator=generator).to(torch.float32) * 2 - 1


def split_size(size: int) -> tuple[int, int]:
    """``(K0, P)`` with ``size = K0 * P``, P a power of two and K0 1 or one of :data:`CORES`.

    Raises:
        ValueError: no Hadamard matrix of this size is built here.
    """
    power = size & -size
    odd = size // power if size > 0 else 0
    core = 1 if odd == 1 else 4 * odd
    if odd == 0 or (core > 1 and (core not in CORES or power < 4)):
        cores = ", ".join(map(str, CORES))
        raise ValueError(
            f"vdit_ext.quant: a Hadamard size must be a power of two, or one times {cores}, got {size}; rotate "
            "by blocks instead"
        )
    return core, size // core


def hadamard(size: int) -> Tensor:
    """The fp32 ``[size, size]`` matrix of +1 and -1, rows orthogonal; sizes as in :func:`split_size`."""
    core, power = split_size(size)
    return torch.kron(_core(core), multiply_blocks(torch.eye(power), power) * math.sqrt(power)).round()


def multiply_blocks(x: Tensor, size: int, *, transposed: bool = False) -> Tensor:
    """fp32 ``[..., C]`` times the orthogonal block-diagonal matrix of ``hadamard(size) / sqrt(size)``, or times
    the transpose, its inverse."""
    core, power = split_size(size)
    blocks = _butterflies(x.unflatten(-1, (-1, core, power)))
    if core > 1:
        matrix = _core(core).T if transposed else _core(core)
        blocks = torch.einsum("...ip,ij->...jp", blocks, matrix.to(x))
    return blocks.flatten(-3) / math.sqrt(size)


def _butterflies(x: Tensor) -> Tensor:
    """Times the Sylvester matrix of the last dimension's size, in natural order."""
    half = 1
    while half < x.shape[-1]:
        first, second = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack((first + second, first - second), -2).flatten(-3)
        half *= 2
    return x


@lru_cache(maxsize=16)
def _core(order: int) -> Tensor:
    if order == 1:
        return torch.ones(1, 1)
    if order in _PALEY_1:
        return _paley_1(_PALEY_1[order])
    if order in _PALEY_2:
        return _paley_2(_PALEY_2[order])
    return _goethals_seidel(*_FOUR_CIRCULANTS[order])


def _residues(prime: int) -> Tensor:
    """The matrix ``Q[i, j]`` = Legendre symbol of ``j - i``, bordered by a row and a column of zeros."""
    symbol = torch.full((prime,), -1.0)
    symbol[torch.arange(1, prime) ** 2 % prime] = 1.0
    symbol[0] = 0.0
    bordered = torch.zeros(prime + 1, prime + 1)
    bordered[1:, 1:] = _circulant(symbol)
    return bordered


def _paley_1(prime: int) -> Tensor:
    skew = _residues(prime)  # skew-symmetric for a prime of 3 mod 4
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    return torch.eye(prime + 1) + skew


def _paley_2(prime: int) -> Tensor:
    conference = _residues(prime)  # symmetric for a prime of 1 mod 4
    conference[0, 1:] = conference[1:, 0] = 1.0
    off_diagonal = torch.kron(conference, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return off_diagonal + torch.kron(torch.eye(prime + 1), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]))


def _goethals_seidel(n: int, multiplier: int, masks: tuple[int, ...]) -> Tensor:
    a, b, c, d = (_circulant(_orbit_row(n, multiplier, mask)) for mask in masks)
    br, cr, dr = (part.flip(1) for part in (b, c, d))
    btr, ctr, dtr = (part.T.flip(1) for part in (b, c, d))
    rows = [(a, br, cr, dr), (-br, a, dtr, -ctr), (-cr, -dtr, a, btr), (-dr, ctr, -btr, a)]
    return torch.cat([torch.cat(row, 1) for row in rows])


def _orbit_row(n: int, multiplier: int, mask: int) -> Tensor:
    row, seen, index = torch.ones(n), set(), 0
    for start in range(n):
        if start in seen:
            continue
        member = start
        while member not in seen:
            seen.add(member)
            if mask >> index & 1:
                row[member] = -1.0
            member = member * multiplier % n
        index += 1
    return row


def _circulant(row: Tensor) -> Tensor:
    """``[n]`` to ``[n, n]``: entry (i, j) is ``row[(j - i) mod n]``."""
    place = torch.arange(len(row))
    return row[(place[None] - place[:, None]) % len(row)]
