"""What the tests of the sparse methods compare with: plain loops and fp64, written apart from the package."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

LAYERS = 12


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention ``[B, H, S, D]`` in fp64 under a bool mask ``[B|1, H|1, Sq, Skv]``; rows that see nothing give 0."""
    scores = q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(nan=0.0) @ v.double()


def expand_map(
    keep: Tensor, q_sizes: list[int], kv_sizes: list[int], q_order: Tensor, kv_order: Tensor
) -> Tensor:
    """Token mask ``[Sq, Skv]`` of a block map ``[nQ, nKV]`` over permuted tokens, one block pair at a time."""
    mask = torch.zeros(sum(q_sizes), sum(kv_sizes), dtype=torch.bool)
    row = 0
    for i, rows in enumerate(q_sizes):
        column = 0
        for j, columns in enumerate(kv_sizes):
            if keep[i, j]:
                mask[q_order[row : row + rows, None], kv_order[column : column + columns]] = True
            column += columns
        row += rows
    return mask


def rows_of(counts: Tensor, lists: Tensor) -> list[set[int]]:
    """Kept blocks of every row of one head, from ``[nQ]`` and ``[nQ, W]``."""
    return [set(row[:count]) for count, row in zip(counts.tolist(), lists.tolist(), strict=True)]


def tensors(batch: int, heads: int, length: int, dim: int, seed: int = 0, count: int = 3, dtype=torch.float32):
    """``count`` normal tensors ``[B, H, S, D]``, stored as ``[B, S, H, D]`` like a model's projections."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, length, heads, dim, generator=generator).to(dtype).transpose(1, 2)
        for _ in range(count)
    )


def rotary_tables(grid: tuple[int, int, int], head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of three-axis rotary embedding, fp32 ``[tokens, head_dim]``, each value twice."""
    side = head_dim // 6
    angles = []
    for place, count in zip(
        torch.meshgrid(*map(torch.arange, grid), indexing="ij"),
        (head_dim // 2 - 2 * side, side, side),
        strict=True,
    ):
        frequency = 10_000 ** -(torch.arange(count, dtype=torch.float64) / max(1, count))
        angles.append(place.reshape(-1, 1) * frequency)
    table = torch.cat(angles, -1).repeat_interleave(2, -1)
    return table.cos().float(), table.sin().float()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rows of ``x [..., S, D]`` with neighbouring pairs turned by tables ``[S, D]``, as complex products, fp64."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos[:, ::2].double(), sin[:, ::2].double())).flatten(-2)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine similarity of two tensors."""
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def count_graphs(method, layout, *, heads: int = 2, dim: int = 16, steps: int = 3, batch: int = 1) -> int:
    """Graphs that one compiled ``plan`` and attention needs over all layers and some steps, fullgraph.

    Also checks that the compiled code computes what eager code does.
    """
    torch._dynamo.reset()
    counter = CompileCounter()

    def attention(q, k, v, state):
        plan = method.plan(q, k, layout, state)
        return plan.attend(q, k, v)[0]

    compiled = torch.compile(attention, backend=counter, fullgraph=True)
    states = [method.new_state(layer, LAYERS) for layer in range(LAYERS)]
    twins = [method.new_state(layer, LAYERS) for layer in range(LAYERS)]
    for step in range(steps):
        for layer in range(LAYERS):
            q, k, v = tensors(batch, heads, layout.num_tokens, dim, seed=100 * step + layer)
            out = compiled(q, k, v, states[layer])
            torch.testing.assert_close(out, attention(q, k, v, twins[layer]))
    torch._dynamo.reset()
    return counter.frame_count
