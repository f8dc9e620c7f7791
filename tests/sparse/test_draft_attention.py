"""DraftAttention: section 9 of its specification line by line, then options, presets, compilation, bad inputs."""

from __future__ import annotations

import math

import pytest
import torch
from cases.sparse import count_graphs, masked_attention, rotary_tables, rows_of, tensors, turned
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vdit_ext import ops
from vdit_ext.sparse import SHAPES, DraftAttention, SparseMethod, StepInfo, TokenLayout, begin_step
from vdit_ext.sparse.draft_attention import PRESETS, count_kept
from vdit_ext.sparse.flops import attention_flops, video_flops
from vdit_ext.sparse.gate import flow_timesteps
from vdit_ext.sparse.scores import block_logits
from vdit_ext.sparse.tiles import count_tiles, tile_offsets, tile_order

CPU = torch.device("cpu")
RAGGED = TokenLayout((2, 7, 10))  # 2 x 3 tiles of 4 x 4 in a frame, the outer ones cut
SMALL = dict(tile=(4, 4))


def algorithm_1(frames: int, rows: int, columns: int, h: int, w: int) -> list[list[int]]:
    """Tokens of every tile, by the loops of Algorithm 1, leaving out what lies beyond the edges."""
    tiles = []
    for f in range(frames):
        for i in range(-(-rows // h)):
            for j in range(-(-columns // w)):
                tiles.append(
                    [
                        f * rows * columns + (i * h + u) * columns + j * w + v
                        for u in range(min(h, rows - i * h))
                        for v in range(min(w, columns - j * w))
                    ]
                )
    return tiles


def lifted_mask(counts: Tensor, lists: Tensor, tiles: list[list[int]]) -> Tensor:
    """Token mask ``[B, H, N, N]`` in raster order of kept tile pairs."""
    batch, heads, _ = counts.shape
    length = sum(map(len, tiles))
    mask = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i, kept in enumerate(rows_of(counts[b, h], lists[b, h])):
                for j in kept:
                    mask[b, h, torch.tensor(tiles[i])[:, None], torch.tensor(tiles[j])] = True
    return mask


def make_plan(method: DraftAttention, layout: TokenLayout, batch=1, heads=2, dim=16, seed=0):
    q, k, v = tensors(batch, heads, layout.num_tokens, dim, seed)
    plan = method.plan(q, k, layout, method.new_state(0, 1))
    return plan.validate(layout.num_tokens, layout.num_tokens), q, k, v


# ---------------------------------------------------------------------------------------------------------
# Section 9
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("parity", ["exact", "code"])
def test_draft_09_01_nothing_dropped_is_dense(dtype, tolerance, parity):
    """Sparsity 0 gives dense attention (fp32 to 1e-5, bf16 to 2e-2)."""
    method = DraftAttention(sparsity=0.0, parity=parity, **SMALL)
    for layout in (RAGGED, TokenLayout((2, 8, 8)), TokenLayout((2, 7, 10), 9)):
        q, k, v = tensors(1, 2, layout.num_tokens, 16, dtype=dtype)
        state = method.new_state(0, 1)
        out, _ = method.plan(q, k, layout, state).attend(q, k, v)
        torch.testing.assert_close(out.double(), masked_attention(q, k, v), atol=tolerance, rtol=tolerance)
        assert state.mean_density() == 1


@pytest.mark.parametrize("rows, columns", [(48, 80), (32, 48), (45, 80), (30, 52), (80, 45)])
def test_draft_09_02_permutation(rows, columns):
    """The permutation is a bijection with an inverse, equals Algorithm 1 on the real grids, and fixes text."""
    method = DraftAttention()
    tile = (16, 8) if rows > columns else (8, 16)
    for text_first in (False, True):
        layout = TokenLayout((2, rows, columns), 20, text_first=text_first)
        assert method.grid_tile(layout) == tile
        order = method.token_order(layout)
        assert order.dtype == torch.int32 and order.shape == (layout.num_tokens,)
        start = 20 if text_first else 0
        tiles = algorithm_1(2, rows, columns, *tile)
        assert (order[start : start + layout.num_video] - start).tolist() == [
            n for members in tiles for n in members
        ]
        text = slice(0, 20) if text_first else slice(layout.num_video, None)
        assert torch.equal(order[text], torch.arange(layout.num_tokens, dtype=torch.int32)[text])
        x = torch.arange(layout.num_tokens).float()[None, None, :, None]
        index = order[None, None]
        assert torch.equal(ops.unpermute_rows(ops.permute_rows(x, index), index), x)
        assert torch.equal(order.sort().values, torch.arange(layout.num_tokens, dtype=torch.int32))
    offsets = tile_offsets((2, rows, columns), tile, CPU)[0, 0]
    assert offsets.diff().tolist() == [len(t) for t in tiles]


@pytest.mark.parametrize("rows, columns", [(8, 16), (7, 10), (5, 17), (3, 3)])
def test_draft_09_03_tile_mean_is_average_pooling(rows, columns):
    """The tile mean equals average pooling in ceil mode without padding, ragged edges included."""
    grid, tile = (3, rows, columns), (4, 4)
    x = tensors(2, 2, 3 * rows * columns, 8, count=1)[0].contiguous()
    tiled = ops.permute_rows(x, tile_order(TokenLayout(grid), tile, CPU))
    pooled = ops.mean_pool_blocks(tiled, offsets=tile_offsets(grid, tile, CPU))
    picture = x.unflatten(2, grid).movedim(-1, 3).flatten(0, 2)  # [b * h * f, d, rows, columns]
    expected = nn.functional.avg_pool2d(picture, 4, ceil_mode=True, count_include_pad=False)
    expected = expected.flatten(2).movedim(1, 2).reshape(2, 2, -1, 8)
    torch.testing.assert_close(pooled, expected, atol=1e-6, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(sparsity=st.floats(0, 1), size=st.integers(1, 12), seed=st.integers(0, 99))
def test_draft_09_04_kept_count(sparsity, size, seed):
    """Kept count per head = ceil(r S^2) plus forced argmaxes; parity mode n - int((1 - r) n) + 1 without ties."""
    logits = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
    best = torch.softmax(logits, -1).argmax(-1)
    n, k = size * size, count_kept(sparsity, size * size)
    assert k - 1 <= (1 - sparsity) * n - 1e-7 or k == 0
    assert k >= (1 - sparsity) * n - 1e-5
    for score in ("probability", "logit"):
        counts, lists = DraftAttention(sparsity=sparsity, score=score).select(logits, 1)
        ranked = torch.softmax(logits, -1) if score == "probability" else logits
        for b in range(2):
            for h in range(3):
                kept = set(ranked[b, h].flatten().argsort(descending=True, stable=True)[:k].tolist())
                kept |= {i * size + int(best[b, h, i]) for i in range(size)}
                rows = rows_of(counts[b, h], lists[b, h])
                assert {i * size + j for i, row in enumerate(rows) for j in row} == kept
    counts, _ = DraftAttention(sparsity=sparsity, parity="code", score="logit").select(logits, 1)
    rank = int(sparsity * n)
    assert (counts.sum(-1) == (n if rank == 0 else 0 if rank >= n else n - rank + 1)).all()


@pytest.mark.parametrize("layout", [RAGGED, TokenLayout((2, 8, 8)), TokenLayout((1, 10, 7))], ids=str)
def test_draft_09_05_restored_output_is_masked_dense(layout):
    """Sparse attention, restored, equals dense attention in raster order under the lifted mask."""
    method = DraftAttention(sparsity=0.7, tile=(4, 3))
    plan, q, k, v = make_plan(method, layout, batch=2)
    tiles = algorithm_1(*layout.grid, *method.grid_tile(layout))
    mask = lifted_mask(plan.kv_num_blocks, plan.kv_indices, tiles)
    out, _ = plan.attend(q, k, v)
    torch.testing.assert_close(out.double(), masked_attention(q, k, v, mask), atol=1e-5, rtol=1e-5)
    assert torch.equal(plan.token_mask(layout.num_tokens, layout.num_tokens), mask)
    assert not mask.all()


@settings(max_examples=20, deadline=None)
@given(sparsities=st.lists(st.floats(0, 1), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_draft_09_06_kept_sets_are_nested(sparsities, seed):
    """What is kept at r1 is kept at every r2 > r1."""
    logits = torch.randn(1, 2, 9, 9, generator=torch.Generator().manual_seed(seed)).round(
        decimals=1
    )  # with ties
    for settings_ in (dict(), dict(score="logit"), dict(parity="code"), dict(budget="all_heads")):
        before = None
        for sparsity in sorted(sparsities, reverse=True):
            counts, lists = DraftAttention(sparsity=sparsity, **settings_).select(logits, 1)
            kept = ops.mask_from_lists(counts, lists, 9)
            assert before is None or not (before & ~kept).any()
            before = kept


def draft_and_token_logits(q: Tensor, k: Tensor, layout: TokenLayout, tile: tuple[int, int]):
    """Draft logits lifted to tokens and the token logits, both ``[N, N]`` of one head in tile order."""
    index = tile_order(layout, tile, CPU)
    offsets = tile_offsets(layout.grid, tile, CPU)
    q, k = ops.permute_rows(q, index), ops.permute_rows(k, index)
    draft = block_logits(ops.mean_pool_blocks(q, offsets=offsets), ops.mean_pool_blocks(k, offsets=offsets))[
        0, 0
    ]
    sizes = offsets[0, 0].diff()
    lifted = draft.repeat_interleave(sizes, 0).repeat_interleave(sizes, 1)
    token = (q @ k.transpose(-1, -2))[0, 0] * q.shape[-1] ** -0.5
    return draft, lifted, token, sizes


def test_draft_09_07_constant_tiles_lose_nothing():
    """q and k constant in each tile: draft logits equal token logits (delta = 0)."""
    tile = (4, 4)
    tiles = algorithm_1(*RAGGED.grid, *tile)
    q, k = (torch.empty(1, 1, RAGGED.num_tokens, 16) for _ in range(2))
    for number, members in enumerate(tiles):
        for seed, x in enumerate((q, k)):
            x[0, 0, members] = torch.randn(16, generator=torch.Generator().manual_seed(2 * number + seed))
    _, lifted, token, _ = draft_and_token_logits(q, k, RAGGED, tile)
    torch.testing.assert_close(lifted, token, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_draft_09_08_error_bounds(seed):
    """Theorem 3.3: ||S - S_draft||_F <= delta n; Theorem 3.5 with max |S_draft dropped| in place of t."""
    tile, sparsity = (4, 4), 0.75
    q, k = tensors(1, 1, RAGGED.num_tokens, 16, seed, 2)
    draft, lifted, token, sizes = draft_and_token_logits(q, k, RAGGED, tile)
    n = RAGGED.num_tokens
    delta = float((token - lifted).abs().max())
    assert float((token - lifted).norm()) <= delta * n

    counts, lists = DraftAttention(sparsity=sparsity, score="logit").select(draft[None, None], 2)
    kept = ops.mask_from_lists(counts, lists, len(draft))[0, 0]
    mask = kept.repeat_interleave(sizes, 0).repeat_interleave(sizes, 1)
    worst = float(draft[~kept].abs().max())
    dropped_share = float((~mask).float().mean())
    assert float((token * ~mask).norm()) <= n * (delta + worst) * math.sqrt(dropped_share) * (1 + 1e-6)


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("grid", [(2, 7, 10), (2, 8, 8)], ids=str)
def test_draft_09_09_text(grid, text_first):
    """Text rows and columns are fully kept; padded text never influences valid outputs."""
    method = DraftAttention(sparsity=0.9, **SMALL)
    for valid in (None, 37, 11, 0):
        layout = TokenLayout(grid, 37, valid, text_first)
        total, video = layout.num_tokens, layout.num_video
        plan, q, k, v = make_plan(method, layout)
        token = torch.arange(total)
        text = token < 37 if text_first else token >= video
        count = 37 if valid is None else valid
        pad = text & ((token >= count) if text_first else (token >= video + count))
        mask = plan.token_mask(total, total)
        assert mask[:, :, text & ~pad][..., ~pad].all() and mask[..., ~pad, :][..., text & ~pad].all()
        assert not mask[:, :, ~pad][..., pad].any() and not mask[:, :, pad][..., ~pad].any()
        assert not mask[:, :, ~text][..., ~text].all()
        out, _ = plan.attend(q, k, v)
        torch.testing.assert_close(out.double(), masked_attention(q, k, v, mask), atol=1e-5, rtol=1e-5)
        poisoned = [torch.where(pad[:, None], torch.nan, x) for x in (q, k, v)]
        again, _ = method.plan(*poisoned[:2], layout, method.new_state(0, 1)).attend(*poisoned)
        assert torch.equal(again[:, :, ~pad], out[:, :, ~pad])


def test_draft_09_10_batch_of_two_is_two_calls():
    """A batch of two (guidance) equals two single calls, also with unequal prompts."""
    method = DraftAttention(sparsity=0.8, **SMALL)
    q, k, v = tensors(2, 2, RAGGED.num_tokens + 9, 16)
    both, _ = method.plan(q, k, TokenLayout(RAGGED.grid, 9, (9, 4)), method.new_state(0, 1)).attend(q, k, v)
    for b, valid in enumerate((9, 4)):
        one = tuple(x[b : b + 1] for x in (q, k, v))
        plan = method.plan(*one[:2], TokenLayout(RAGGED.grid, 9, valid), method.new_state(0, 1))
        torch.testing.assert_close(plan.attend(*one)[0], both[b : b + 1], atol=1e-6, rtol=1e-5)


def test_draft_09_11_flat_row_keeps_something():
    """One flat query row among peaked ones: its output is finite and not zero."""
    layout = TokenLayout((1, 16, 16))  # 16 tiles
    tiles = algorithm_1(1, 16, 16, 4, 4)
    q, k, v = tensors(1, 1, 256, 16)
    for number, members in enumerate(tiles):
        code = torch.zeros(16)
        code[number] = 8.0
        q[0, 0, members] = code
        k[0, 0, members] = code
    q[0, 0, tiles[5]] = 0.0  # flat: every entry of its row is 1 / S
    kept = {}
    for parity in ("exact", "code"):
        method = DraftAttention(sparsity=0.95, parity=parity, **SMALL)
        plan = method.plan(q, k, layout, method.new_state(0, 1))
        kept[parity] = int(plan.kv_num_blocks[0, 0, 5])
        out, _ = plan.attend(q, k, v)
        assert out.isfinite().all()
    # The shipped rule starves the row, and its tokens come out as zeros; the exact one keeps its argmax.
    assert kept == {"exact": 1, "code": 0}
    method = DraftAttention(sparsity=0.95, **SMALL)
    out, _ = method.plan(q, k, layout, method.new_state(0, 1)).attend(q, k, v)
    assert (out[0, 0, tiles[5]].abs().amax(-1) > 0).all()


def norm(x: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)


class ToyDiT(nn.Module):
    """Two layers of norm, self-attention with RoPE and a token-wise MLP."""

    def __init__(self, width: int = 32, heads: int = 2):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(width, 3 * width), (width, width), (width, 2 * width), (2 * width, width)]
        self.layers = [[torch.randn(s, generator=generator) * s[0] ** -0.5 for s in shapes] for _ in range(2)]
        self.heads = heads

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: TokenLayout, method, states) -> Tensor:
        for (to_qkv, to_out, up, down), state in zip(self.layers, states, strict=True):
            q, k, v = (norm(x) @ to_qkv).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            q, k = (self.rotate(norm(y) * 3, cos, sin) for y in (q, k))
            out, _ = method.plan(q, k, layout, state).attend(q, k, v)
            x = x + out.transpose(1, 2).flatten(2) @ to_out
            x = x + torch.nn.functional.gelu(norm(x) @ up) @ down
        return x

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The video rows; the text behind them stays as it is."""
        video = len(cos)
        return torch.cat([turned(x[:, :, :video], cos, sin).to(x.dtype), x[:, :, video:]], 2)


@pytest.mark.parametrize(
    "layout",
    [RAGGED, TokenLayout((2, 8, 8)), TokenLayout((2, 7, 10), 6, 4), TokenLayout((2, 8, 8), 6)],
    ids=str,
)
def test_draft_09_12_hoisted_permutation(layout):
    """Permuting once, before the first layer, equals permuting in every layer, on a toy DiT with RoPE."""
    model, method = ToyDiT(), DraftAttention(sparsity=0.7, **SMALL)
    x = torch.randn(2, layout.num_tokens, 32, generator=torch.Generator().manual_seed(1))
    cos, sin = rotary_tables(layout.grid, 16)
    states = [method.new_state(i, 2) for i in range(2)]
    expected = model(x, cos, sin, layout, method, states)
    order = method.token_order(layout).long()
    for state in states:
        state.tokens_permuted = True
    video = order[: layout.num_video]
    hoisted = model(x[:, order], cos[video], sin[video], layout, method, states)
    restored = torch.empty_like(hoisted)
    restored[:, order] = hoisted
    torch.testing.assert_close(restored, expected, atol=1e-5, rtol=1e-5)
    assert states[0].mean_density() < 0.9
    everything = DraftAttention(sparsity=0.0, **SMALL)
    dense = model(x, cos, sin, layout, everything, [everything.new_state(i, 2) for i in range(2)])
    assert (dense - expected).abs().max() > 1e-2, (
        "the sparse model must differ from the dense one to say anything"
    )


def test_draft_09_13_gate_counts():
    """Thresholds give 15/50, 8/30, 15/50 and, image to video, 8/40 dense steps; counting gives floor(f steps)."""
    expected = {
        "hunyuan-t2v-768p": 15,
        "hunyuan-custom-768p": 8,
        "wan2.1-14b-768p": 15,
        "wan2.1-14b-512p": 15,
        "wan2.1-14b-i2v-512p": 8,
    }
    for model, count in expected.items():
        shape, method = SHAPES[model], DraftAttention.preset(model, "repo")
        times = flow_timesteps(shape.steps, shape.flow_shift)
        infos = [StepInfo(i, shape.steps, t, shape.layers) for i, t in enumerate(times)]
        assert [method.is_dense(info, 20) for info in infos] == [i < count for i in range(shape.steps)]
        layers = [method.is_dense(infos[-1], layer) for layer in range(shape.layers)]
        assert sum(layers) == (2 if "hunyuan" in model else 1) and layers[0]
        paper = DraftAttention.preset(model)
        assert sum(paper.is_dense(info, 20) for info in infos) == math.floor(0.25 * shape.steps)
    counted = DraftAttention.preset("wan2.1-14b-768p")
    times = flow_timesteps(40, 5)
    assert sum(counted.is_dense(StepInfo(i, None, t, 40), 20) for i, t in enumerate(times)) == 10


def test_draft_09_14_tile_counts():
    """S is 990, 1020, 630, 252; ragged 720p HunyuanVideo also 990, with 80-token bottom tiles."""
    expected = {
        "hunyuan-t2v-768p": 990,
        "hunyuan-custom-768p": 1020,
        "wan2.1-14b-768p": 630,
        "wan2.1-14b-512p": 252,
        "hunyuan-t2v-720p": 990,
    }
    for model, count in expected.items():
        grid = SHAPES[model].grid
        assert count_tiles(grid, (8, 16)) == count
        sizes = tile_offsets(grid, (8, 16), CPU)[0, 0].diff()
        assert len(sizes) == count and int(sizes.sum()) == math.prod(grid)
        bottom = sizes.view(grid[0], -1, grid[2] // 16)[:, -1]
        assert (bottom == (80 if model == "hunyuan-t2v-720p" else 128)).all()
        assert (sizes.view(grid[0], -1, grid[2] // 16)[:, :-1] == 128).all()


# ---------------------------------------------------------------------------------------------------------
# Options, presets, compilation, bad inputs
# ---------------------------------------------------------------------------------------------------------


def test_flops_of_section_7():
    """total = dense - 0.75 s 4 N^2 d layers forwards gives the highest-sparsity rows at 768p."""
    hunyuan = attention_flops(126_720, 3072, 60, 50) / 1e15
    assert video_flops(682.67, hunyuan, 1 - 0.9, 0.25) == pytest.approx(283.1, abs=0.1)
    wan = attention_flops(80_640, 5120, 40, 100) / 1e15
    assert video_flops(609.52, wan, 1 - 0.75, 0.25) == pytest.approx(309.9, abs=0.1)


def test_forced_blocks():
    logits = torch.randn(1, 2, 12, 12, generator=torch.Generator().manual_seed(0))
    frame = torch.arange(12) // 4
    sink = frame == 0
    same = frame[:, None] == frame
    base = DraftAttention(sparsity=0.9)
    plain = ops.mask_from_lists(*base.select(logits, 3), 12)
    for settings_, extra in (
        (dict(first_frame_sink=True), sink.expand(12, 12)),
        (dict(same_frame=True), same),
        (dict(first_frame_sink=True, same_frame=True), sink | same),
    ):
        forced = ops.mask_from_lists(*DraftAttention(sparsity=0.9, **settings_).select(logits, 3), 12)
        assert torch.equal(forced, plain | extra)


def test_budget_of_all_heads():
    logits = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    logits[:, 1] += 20.0
    counts, lists = DraftAttention(sparsity=0.5, score="logit", budget="all_heads").select(logits, 1)
    assert counts.shape == (2, 2, 6) and lists.shape == (2, 2, 6, 6)
    assert (counts[:, 0] == 1).all() and (counts[:, 1] == 6).all()


def test_uniform_and_variable_blocks_agree():
    method = DraftAttention(sparsity=0.8, **SMALL)
    layout, padded = TokenLayout((2, 8, 8), 20), TokenLayout((2, 8, 8), 20, 20)
    plan, q, k, v = make_plan(method, layout)
    variable = method.plan(q, k, padded, method.new_state(0, 1))
    assert plan.q_offsets is None and variable.q_offsets is not None
    torch.testing.assert_close(plan.attend(q, k, v)[0], variable.attend(q, k, v)[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(plan.density(148, 148), variable.density(148, 148))


def test_density_is_measured():
    method = DraftAttention(sparsity=0.75, **SMALL)
    layout = TokenLayout((2, 8, 8), 6, 4)
    q, k, _ = tensors(1, 2, layout.num_tokens, 16)
    state = method.new_state(0, 1)
    assert math.isnan(state.mean_density()) and state.density is None
    plan = method.plan(q, k, layout, state)
    torch.testing.assert_close(state.density, plan.token_mask(134, 134).float().mean((-1, -2)))
    method.plan(q, k, TokenLayout((2, 8, 8), 6, 0), state)
    assert state.mean_density() == pytest.approx(float(state._densities[0].mean() + state.density.mean()) / 2)
    begin_step(method, StepInfo(3, 9, 400.0, 1), layout, [state])
    begin_step(method, StepInfo(0, 9, 900.0, 1), layout, [state])
    assert state.density is None


def test_presets():
    for model, kinds in PRESETS.items():
        for kind in kinds:
            assert isinstance(DraftAttention.preset(model, kind), SparseMethod)
    repo = DraftAttention.preset("hunyuan-t2v-768p", "repo")
    assert (repo.sparsity, repo.dense_above, repo.parity, repo.dense_layers) == (0.9, 945.0, "code", 2)
    assert DraftAttention.preset("wan2.1-14b-768p").sparsity == 0.75
    toy = DraftAttention.preset("toy")
    plan, *_ = make_plan(toy, SHAPES["toy"].layout, heads=3, dim=64)
    assert float(plan.density(2048, 2048).max()) <= 0.35
    with pytest.raises(ValueError, match=r"model must be one of .*wan2.1-14b-768p.*, got 'cogvideox'"):
        DraftAttention.preset("cogvideox")


def test_compiles_to_one_graph():
    method = DraftAttention(sparsity=0.6, **SMALL)
    assert count_graphs(method, TokenLayout((2, 7, 8), 5, 3), batch=2, steps=2) == 1


@pytest.mark.parametrize(
    "given_, sentence",
    [
        (dict(sparsity=1.1), "sparsity must be at least 0 and at most 1, got 1.1"),
        (dict(tile=(8,)), "tile must be two sizes of at least 1"),
        (dict(score="rank"), "score must be one of probability, logit, got 'rank'"),
        (dict(parity="both"), "parity must be one of exact, code"),
        (dict(budget="layer"), "budget must be one of head, all_heads"),
        (dict(dense_layers=-1), "dense_layers must be at least 0, got -1"),
        (dict(dense_layers=1.5), "DraftAttention: dense_layers must be a whole number, got 1.5"),
        (dict(sparsity="0.9"), "DraftAttention: sparsity must be a number, got '0.9'"),
        (dict(dense_above="925"), "DraftAttention: dense_above must be a number, got '925'"),
        (dict(tile=[8, 0]), r"tile must be two sizes of at least 1 .*, got \(8, 0\)"),
        (dict(tile=(8, 16.0)), r"tile must be two sizes .*, whole numbers, got \(8, 16.0\)"),
        (dict(tile=8), "tile must be two sizes of at least 1 .*, got 8"),
        (dict(tile="8x"), "tile must be two sizes of at least 1 .*, got '8x'"),
    ],
)
def test_bad_settings(given_, sentence):
    with pytest.raises(ValueError, match=sentence):
        DraftAttention(**given_)


def test_a_tile_from_json_is_a_tuple():
    method = DraftAttention(tile=[4, 4])
    assert method == DraftAttention(tile=(4, 4)) and hash(method) == hash(DraftAttention(tile=(4, 4)))
    assert method.tile == (4, 4)
    make_plan(method, RAGGED)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("score", ["probability", "logit"])
@pytest.mark.parametrize("parity", ["exact", "code"])
@pytest.mark.parametrize("layout", [RAGGED, TokenLayout((2, 8, 8), 5, 3)], ids=str)
def test_a_bad_key_breaks_no_other_tile(bad, score, parity, layout):
    """Its tile is not chosen by rank; all other rows attend as they would without that tile's logits."""
    method = DraftAttention(sparsity=0.6, parity=parity, score=score, **SMALL)
    total, video = layout.num_tokens, layout.num_video
    q, k, v = tensors(1, 2, total, 16)
    k[0, 1, 31, 4] = bad
    plan = method.plan(q, k, layout, method.new_state(0, 1)).validate(total, total)
    mask = plan.token_mask(total, total)
    kept = mask[0, 1, :video, :video].float().mean()
    assert 0.25 < kept < 0.55, "the budget is still met"
    out, lse = plan.attend(q, k, v)
    touched = torch.zeros(1, 2, total, dtype=torch.bool)
    touched[0, 1] = mask[0, 1, :, 31]
    assert not touched[0, 1, :video].any()
    assert out[~touched].isfinite().all()
    assert torch.equal(lse.isinf(), ~mask.any(-1)), "rows are empty by the rule only"
    # The other head is what it is without the bad value.
    k[0, 1, 31, 4] = 0.0
    expected = method.plan(q, k, layout, method.new_state(0, 1)).token_mask(total, total)
    assert torch.equal(mask[0, 0], expected[0, 0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("score", ["probability", "logit"])
@pytest.mark.parametrize("parity", ["exact", "code"])
def test_a_bad_query_becomes_nan_and_its_tile_sees_everything(bad, score, parity):
    method = DraftAttention(sparsity=0.6, parity=parity, score=score, **SMALL)
    q, k, v = tensors(1, 2, RAGGED.num_tokens, 16)
    clean = method.plan(q, k, RAGGED, method.new_state(0, 1)).token_mask(140, 140)
    q[0, 1, 31] = bad
    plan = method.plan(q, k, RAGGED, method.new_state(0, 1)).validate(140, 140)
    mask = plan.token_mask(140, 140)
    tile = next(t for t in algorithm_1(2, 7, 10, 4, 4) if 31 in t)
    assert mask[0, 1, tile].all() and torch.equal(mask[0, 0], clean[0, 0])
    others = [t for t in range(140) if t not in tile]
    assert not mask[0, 1, others].all()
    out, _ = plan.attend(q, k, v)
    bad_rows = torch.zeros(1, 2, 140, dtype=torch.bool)
    bad_rows[0, 1, 31] = True
    assert out[bad_rows].isnan().all() and out[~bad_rows].isfinite().all()
    # Nothing finite anywhere: everything is kept, and NaN comes out instead of zeros.
    q[:], k[:] = torch.nan, torch.nan
    out, _ = method.plan(q, k, RAGGED, method.new_state(0, 1)).attend(q, k, v)
    assert out.isnan().all()


def test_bad_inputs():
    method = DraftAttention(**SMALL)
    state = method.new_state(0, 1)
    q, k, _ = tensors(1, 2, RAGGED.num_tokens, 16)
    with pytest.raises(ValueError, match=r"DraftAttention: the layout \(2, 7, 10\) .* has 140 tokens, got 139"):
        method.plan(q[:, :, 1:], k[:, :, 1:], RAGGED, state)
    with pytest.raises(ValueError, match="as many queries as keys, got 140 and 20"):
        method.plan(q, k[:, :, :20], RAGGED, state)
    with pytest.raises(ValueError, match="grid must be three sizes"):
        TokenLayout((0, 4, 4))
    with pytest.raises(ValueError, match="text_valid must lie between 0 and text_len = 4, got 5"):
        TokenLayout((1, 4, 4), 4, 5)
