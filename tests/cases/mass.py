"""Shared cases of block_mass and block_mass_topk: what bench/ checks on a GPU is what the tests check."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vdit_ext.testing import TOLERANCE, generator

from .attention import AttentionCase, make_tensor


@dataclass(frozen=True)
class MassCase:
    """One call of block_mass.

    Attributes:
        name: what is awkward about it.
        batch, heads, seqlen_q, seqlen_kv, head_dim: sizes.
        q_block, kv_block: block sizes.
        kv_lengths: keys that are no padding, one number a batch entry, or None for all.
        layout: as AttentionCase has it.
        drift: added to the true lse, as an lse of an earlier step is off.
        gain: factor on q, so that attention is as peaked as wanted.
    """

    name: str
    batch: int = 1
    heads: int = 2
    seqlen_q: int = 256
    seqlen_kv: int = 256
    head_dim: int = 64
    q_block: int = 64
    kv_block: int = 64
    kv_lengths: tuple[int, ...] | None = None
    layout: str = "bshd"
    drift: float = 0.0
    gain: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def kwargs(self) -> dict:
        lengths = None if self.kv_lengths is None else torch.tensor(self.kv_lengths, dtype=torch.int32)
        return {"kv_lengths": lengths, "q_block_size": self.q_block, "kv_block_size": self.kv_block}


def true_lse(q: Tensor, k: Tensor, kv_lengths=None) -> Tensor:
    """Natural log of the softmax's denominators, fp32 ``[B, H, Sq]``; -inf where there is no key."""
    logits = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    if kv_lengths is not None:
        padding = torch.arange(k.shape[2]) >= torch.as_tensor(kv_lengths)[:, None]
        logits = logits.masked_fill(padding[:, None, None], -torch.inf)
    return torch.logsumexp(logits, -1).float()


def make_mass(case: MassCase, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and lse of a case on the CPU, the same for every backend."""
    gen = generator(case.seed)
    shape = AttentionCase(case.name, case.batch, case.heads, head_dim=case.head_dim, layout=case.layout)
    q = make_tensor(shape, case.seqlen_q, gen, dtype).mul_(case.gain)
    k = make_tensor(shape, case.seqlen_kv, gen, dtype)
    return q, k, true_lse(q, k, case.kv_lengths) + case.drift


def assert_masses(got: Tensor, expected: Tensor, q: Tensor, k: Tensor, lse: Tensor) -> None:
    """Every mass to the relative error that fp32 has: terms are positive, so that none is lost in a sum.

    An exponent is a difference of two numbers, whose rounding the exponential makes a relative error.
    """
    logits = (q.float() @ k.float().mT).abs() * q.shape[-1] ** -0.5
    largest = sum(float(t.float().nan_to_num(0, 0, 0).abs().max()) if t.numel() else 0.0 for t in (logits, lse))
    tolerance = TOLERANCE[torch.float32] + largest * 2**-23
    got, expected = got.cpu().double(), expected.cpu().double()
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert torch.equal(got.isnan(), expected.isnan()), "NaN disagrees"
    gap = (got - expected).abs().nan_to_num(0)
    over = gap - tolerance * expected.nan_to_num(0) - 1e-30  # where exponentials leave the normal numbers
    assert not (over > 0).any(), (
        f"mass {got.flatten()[over.argmax()]} for {expected.flatten()[over.argmax()]}, which is off by more than "
        f"{tolerance:.1e} of it"
    )


C = MassCase

correctness = [
    C("one_token", seqlen_q=1, seqlen_kv=1),
    C("one_query_many_keys", seqlen_q=1, seqlen_kv=401),
    C("many_queries_one_key", seqlen_q=300, seqlen_kv=1),
    C("whole_blocks", seqlen_q=256, seqlen_kv=320, layout="bhsd"),
    C("ragged", batch=2, seqlen_q=333, seqlen_kv=201),
    C("ragged_d96", batch=2, head_dim=96, seqlen_q=201, seqlen_kv=333),
    C("ragged_d128", batch=2, head_dim=128, seqlen_q=333, seqlen_kv=201),
    C("blocks_of_128", seqlen_q=333, seqlen_kv=300, q_block=128, kv_block=128),
    C("q_64_kv_128", head_dim=128, seqlen_q=200, seqlen_kv=450, kv_block=128),
    C("q_128_kv_64", head_dim=96, seqlen_q=450, seqlen_kv=200, q_block=128),
    C("padded_keys", batch=3, seqlen_q=130, seqlen_kv=300, kv_lengths=(300, 130, 0)),
    C("padded_keys_128", batch=3, head_dim=128, seqlen_q=140, seqlen_kv=300, q_block=128, kv_block=128,
      kv_lengths=(257, 1, 128)),
    C("sliced_view", batch=2, layout="sliced", seqlen_q=190, seqlen_kv=190),
    C("odd_blocks", batch=2, seqlen_q=203, seqlen_kv=210, q_block=50, kv_block=37, kv_lengths=(210, 100)),
    C("long_query_blocks", seqlen_q=700, seqlen_kv=190, q_block=300, kv_block=100),
    C("rows_alone", seqlen_q=21, seqlen_kv=70, q_block=1, kv_block=16),
    C("all_in_one_block", seqlen_q=150, seqlen_kv=90, q_block=2**30, kv_block=2**30),
    C("many_steps", head_dim=128, seqlen_q=270, seqlen_kv=1111, kv_block=192, kv_lengths=(1000,)),
    C("blocks_of_256", seqlen_q=530, seqlen_kv=300, q_block=256, kv_block=128),
    C("peaked", seqlen_q=256, seqlen_kv=256, gain=4.0),
    C("stale_down", seqlen_q=140, seqlen_kv=200, gain=3.0, drift=-40.0),
    C("stale_up", seqlen_q=140, seqlen_kv=200, gain=3.0, drift=40.0),
]  # fmt: skip
