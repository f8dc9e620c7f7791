"""block_sparse_attention and merge_attention against their definitions, on every backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import attention as cases
from torch.nn.functional import scaled_dot_product_attention

import vdit_ext
from vdit_ext.ops.attention import (
    block_sparse_attention_naive,
    lists_from_mask,
    merge_attention_naive,
)
from vdit_ext.testing import TOLERANCE, assert_close, generator

BACKENDS = ("cpu", "emu", "emu_sm90", "cuda")
LSE_TOLERANCE = 1e-5


def dtypes_of(backend):
    return (
        (torch.float16, torch.bfloat16)
        if backend.is_cuda_code
        else (torch.float32, torch.float16, torch.bfloat16)
    )


def run(backend, inputs):
    moved = inputs.to(backend.device)
    return backend.ops.block_sparse_attention(*moved.args, **moved.kwargs)


def check(backend, inputs):
    out, lse = run(backend, inputs)
    expected, expected_lse = block_sparse_attention_naive(*inputs.args, **inputs.kwargs)
    assert out.dtype == inputs.q.dtype and lse.dtype == torch.float32
    # exp() turns the fp32 rounding of a logit into a relative error: large logits cost accuracy by nature.
    logits = rounding_of_logits(inputs)
    assert_close(out, expected, tolerance=TOLERANCE[out.dtype] + logits, what="out")
    assert_close(lse, expected_lse, tolerance=LSE_TOLERANCE, what="lse")
    return out, lse


def rounding_of_logits(inputs) -> float:
    """fp32 rounding unit of the largest logit, at most the bound on the relative error of a weight."""
    scale = inputs.kwargs["scale"]
    scale = inputs.q.shape[-1] ** -0.5 if scale is None else abs(scale)
    largest = (inputs.q.float() @ inputs.k.float().transpose(-1, -2)).abs().max() if inputs.q.numel() else 0.0
    return float(largest) * scale * 2**-23


@pytest.mark.parametrize("case", cases.correctness, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_equals_definition(backend, case, dtype):
    if dtype not in dtypes_of(backend):
        pytest.skip("fp32 attention is for the CPU only")
    check(backend, cases.make_attention(case, dtype))


@pytest.mark.parametrize("dim", [8, 16, 40, 72, 80, 256])
def test_any_multiple_of_eight_on_cpu(dim):
    case = cases.AttentionCase("dim", head_dim=dim, seqlen_q=130, seqlen_kv=150, q_block=64, kv_block=64)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = cases.make_attention(case, dtype)
        out, _ = torch.ops.vdit.block_sparse_attention(*inputs.args, **inputs.kwargs)
        assert_close(out, block_sparse_attention_naive(*inputs.args, **inputs.kwargs)[0])


def test_density_one_is_dense_attention(backend):
    inputs = cases.make_attention(cases.C("dense", seqlen_q=384, seqlen_kv=384, density=1.0), torch.bfloat16)
    out, _ = run(backend, inputs)
    assert_close(out, scaled_dot_product_attention(*(t.float() for t in inputs.args[:3])).bfloat16())


def test_empty_row_gives_zero_and_minus_infinity(backend):
    inputs = cases.make_attention(cases.C("none", density=0.0), torch.bfloat16)
    out, lse = run(backend, inputs)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize(
    "shape", [(0, 2, 64, 64), (1, 0, 64, 64), (1, 2, 0, 64)], ids=["batch", "heads", "tokens"]
)
def test_empty_tensors(backend, shape):
    q = torch.empty(shape, dtype=torch.bfloat16, device=backend.device)
    nq = -(-shape[2] // 128)
    counts = torch.zeros(1, 1, nq, dtype=torch.int32, device=backend.device)
    lists = torch.zeros(1, 1, nq, 1, dtype=torch.int32, device=backend.device)
    out, lse = backend.ops.block_sparse_attention(q, q, q, counts, lists)
    assert out.shape == shape and lse.shape == shape[:3]


def test_no_keys_at_all(backend):
    q = torch.randn(1, 1, 70, 64, device=backend.device).bfloat16()
    k = q[:, :, :0]
    counts = torch.zeros(1, 1, 1, dtype=torch.int32, device=backend.device)
    lists = torch.zeros(1, 1, 1, 0, dtype=torch.int32, device=backend.device)
    out, lse = backend.ops.block_sparse_attention(q, k, k, counts, lists)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("kv_block", [64, "random:7"], ids=["uniform", "variable"])
def test_nan_and_inf_stay_in_the_rows_that_see_them(backend, bad, which, kv_block):
    case = cases.C("poison", seqlen_q=200, seqlen_kv=230, q_block=64, kv_block=kv_block, density=0.5, seed=5)
    inputs = cases.make_attention(case, torch.bfloat16)
    clean, _ = run(backend, inputs)
    getattr(inputs, which)[0, 1, 77, 3] = bad
    out, lse = run(backend, inputs)
    expected, expected_lse = block_sparse_attention_naive(*inputs.args, **inputs.kwargs)
    out, lse = out.cpu(), lse.cpu()
    touched = ~(expected.isfinite().all(-1) & expected_lse.isfinite())
    if which == "q":
        allowed = torch.zeros_like(touched)
        allowed[0, 1, 77] = True
    else:
        allowed = rows_that_see(inputs, head=1, key=77)
    assert not (touched & ~allowed).any()
    same = ~allowed
    assert torch.equal(out[same], clean.cpu()[same]), "a row that does not see the bad value changed"
    if which == "v":
        # Inf in v may meet a weight that rounds to 0, which the definition in fp64 does not.
        assert not out[..., 3][allowed].isfinite().any()
    else:
        # A key of score -Inf weighs nothing; every other bad score is NaN through the whole row.
        spoilt = allowed
        if which == "k":
            spoilt = allowed & ~(inputs.q[..., 3].float() * bad == -torch.inf)
        assert spoilt.any() and out[spoilt].isnan().all(), "the bad value was swallowed"
        assert not lse[spoilt].isfinite().any()
    if which != "v" or bad != bad:
        assert_close(out, expected, what="out")


def test_a_bad_key_that_all_rows_see_spoils_them_all(backend):
    inputs = cases.make_attention(cases.C("all_bad", seqlen_kv=190, kv_block=64, density=1.0), torch.bfloat16)
    inputs.k[:, :, 177] = torch.nan
    out, lse = run(backend, inputs)
    assert out.isnan().all() and lse.isnan().all()


def rows_that_see(inputs, head, key):
    from vdit_ext.ops.attention import block_bounds, mask_from_lists

    b, h, sq, _ = inputs.q.shape
    kv_bounds = block_bounds(
        inputs.kwargs["kv_offsets"], inputs.kwargs.get("kv_block_size", 0), inputs.k.shape[2], 0, head
    )
    q_bounds = block_bounds(inputs.kwargs["q_offsets"], inputs.kwargs.get("q_block_size", 0), sq, 0, head)
    mask = mask_from_lists(inputs.kv_num_blocks, inputs.kv_indices, len(kv_bounds))
    rows = torch.zeros(b, h, sq, dtype=torch.bool)
    for i, (start, end) in enumerate(q_bounds):
        rows[0, head, start:end] = any(
            mask[0, head, i, j] and s <= key < e for j, (s, e) in enumerate(kv_bounds)
        )
    return rows


def test_all_scores_minus_infinity_counts_as_seeing_nothing(backend):
    q = torch.ones(1, 1, 64, 64, device=backend.device).bfloat16()
    k = torch.full((1, 1, 64, 64), -torch.inf, device=backend.device).bfloat16()
    one = torch.ones(1, 1, 1, dtype=torch.int32, device=backend.device)
    out, lse = backend.ops.block_sparse_attention(q, k, q, one, torch.zeros_like(one)[..., None])
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_output_keeps_the_storage_order_of_q(backend):
    inputs = cases.make_attention(cases.C("order", layout="bshd"), torch.bfloat16)
    assert run(backend, inputs)[0].transpose(1, 2).is_contiguous()
    inputs = cases.make_attention(cases.C("order", layout="bhsd"), torch.bfloat16)
    assert run(backend, inputs)[0].is_contiguous()


def test_result_does_not_depend_on_list_order(backend):
    inputs = cases.make_attention(cases.C("order", seqlen_kv=640, kv_block=64, density=1.0), torch.bfloat16)
    out, _ = run(backend, inputs)
    inputs.kv_indices = inputs.kv_indices.flip(-1).contiguous()
    assert_close(run(backend, inputs)[0], out)


def test_equal_runs_give_equal_bits(backend):
    inputs = cases.make_attention(cases.ragged[4], torch.bfloat16)
    first, second = run(backend, inputs), run(backend, inputs)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def two_lists(pattern: str, blocks: int) -> torch.Tensor:
    """Which of the key blocks the first and the second 64 queries list, bool ``[2, blocks]``."""
    keep = torch.zeros(2, blocks, dtype=torch.bool)
    if pattern == "equal":
        keep[:, 3:15] = True
    elif pattern == "disjoint":
        keep[0, ::2], keep[1, 1::2] = True, True
    elif pattern == "nested":
        keep[0], keep[1, 5:9] = True, True
    elif pattern == "one in many":
        keep[0, -1], keep[1] = True, True
    elif pattern == "first empty":
        keep[1, 2:] = True
    elif pattern == "second empty":
        keep[0, :-1] = True
    elif pattern == "halves":
        keep[0, : blocks // 2], keep[1, blocks // 2 :] = True, True
    elif pattern == "random":
        keep = torch.rand(2, blocks, generator=generator(9)) < 0.5
    return keep


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "pattern",
    [
        "equal",
        "disjoint",
        "nested",
        "one in many",
        "first empty",
        "second empty",
        "both empty",
        "halves",
        "random",
    ],
)
def test_two_lists_of_one_thread_block(backend, pattern, dim):
    """64-row tiles share a thread block on compute capability 9.0, whatever their lists have in common."""
    blocks = 45  # of 48 keys, so that windows of the streams begin anywhere; more than a word of 32
    case = cases.C("two", seqlen_q=128, seqlen_kv=blocks * 48 - 7, head_dim=dim, q_block=64, kv_block=48)
    inputs = cases.make_attention(case, torch.bfloat16)
    keep = two_lists(pattern, blocks).expand(1, 2, -1, -1)
    inputs.kv_num_blocks, inputs.kv_indices = lists_from_mask(keep)
    check(backend, inputs)


@pytest.mark.parametrize("q_block", [64, (40, 64, 24, 0, 64, 1)], ids=["uniform", "variable"])
def test_a_block_listed_twice_counts_twice(backend, q_block):
    """Also where the other tiles of 64 rows are paired, for which a list must name a block only once."""
    case = cases.C("twice", seqlen_q=193, seqlen_kv=500, q_block=q_block, kv_block=40, density=0.5)
    inputs = cases.make_attention(case, torch.bfloat16)
    used = inputs.kv_num_blocks[0, 0, 1]
    inputs.kv_indices[0, 0, 1, used - 1] = inputs.kv_indices[0, 0, 1, 0]
    check(backend, inputs)


@pytest.mark.parametrize("dim", [64, 128])
def test_runs_of_rows_may_be_loaded_with_overlaps(backend, dim, monkeypatch):
    """The other way to cut clusters into TMA boxes gives the very bits; other kernels do not ask for it."""
    case = cases.C("runs", seqlen_q=150, seqlen_kv=900, head_dim=dim, q_block="random:4", kv_block="random:40")
    inputs = cases.make_attention(case, torch.bfloat16)
    once, once_lse = run(backend, inputs)
    monkeypatch.setenv("VDIT_ATTENTION_RUNS", "overlap")
    again, again_lse = check(backend, inputs)
    assert torch.equal(once, again) and torch.equal(once_lse, again_lse)


def test_more_key_blocks_than_a_warp_holds_bits(backend):
    case = cases.C("many", seqlen_q=128, seqlen_kv=2300, q_block=64, kv_block=2, density=0.03)
    check(backend, cases.make_attention(case, torch.bfloat16))


def test_merge_of_two_halves_is_the_whole(backend):
    inputs = cases.make_attention(cases.C("whole", seqlen_kv=512, density=1.0), torch.bfloat16)
    whole = run(backend, inputs)
    keep = torch.zeros(1, 2, 2, 4, dtype=torch.bool)
    keep[..., :3] = True
    parts = []
    for mask in (keep, ~keep):
        inputs.kv_num_blocks, inputs.kv_indices = lists_from_mask(mask)
        parts += run(backend, inputs)
    out, lse = backend.ops.merge_attention(*parts)
    assert_close(out, whole[0])
    assert_close(lse, whole[1], tolerance=LSE_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merge_equals_definition(backend, dtype):
    gen = generator(3)
    out1, out2 = (torch.randn(2, 67, 3, 64, generator=gen).to(dtype).transpose(1, 2) for _ in range(2))
    lse1, lse2 = (torch.randn(2, 3, 67, generator=gen) * 5 for _ in range(2))
    lse1[0, 0, :5] = -torch.inf
    lse2[0, 0, 3:9] = -torch.inf
    lse1[1, 2, 4], lse2[1, 2, 4] = 90.0, -90.0
    out1[0, 0, 1] = torch.nan  # what a part holds where it saw nothing must not leak
    moved = [t.to(backend.device) for t in (out1, lse1, out2, lse2)]
    out, lse = backend.ops.merge_attention(*moved)
    expected, expected_lse = merge_attention_naive(out1, lse1, out2, lse2)
    assert_close(out, expected)
    assert_close(lse, expected_lse, tolerance=LSE_TOLERANCE)


# --- refusals: one sentence that says what was expected and what came ---------------------------------------


def simple(dim=64, dtype=torch.bfloat16, sq=256, skv=256):
    return cases.make_attention(cases.C("simple", head_dim=dim, seqlen_q=sq, seqlen_kv=skv, density=1.0), dtype)


def refuse(backend, match, *, edit):
    inputs = simple()
    changed = edit(inputs)
    inputs = changed or inputs
    with pytest.raises(RuntimeError, match=match) as caught:
        run(backend, inputs)
    sentence = str(caught.value).strip().splitlines()[0]
    assert sentence.startswith("vdit::block_sparse_attention: "), sentence


def set_(name, value):
    def edit(inputs):
        if name in ("q", "k", "v", "kv_num_blocks", "kv_indices"):
            setattr(inputs, name, value(getattr(inputs, name)) if callable(value) else value)
        else:
            inputs.kwargs[name] = value
            inputs.kwargs = {n: v for n, v in inputs.kwargs.items() if v is not None}

    return edit


def offsets(*values):
    return torch.tensor(values, dtype=torch.int32)[None, None]


REFUSALS = {
    "dtype": (r"q must be float32, float16 or bfloat16, got float64", set_("q", lambda t: t.double())),
    "mixed_dtype": (r"k must be bfloat16, got float16", set_("k", lambda t: t.half())),
    "rank": (r"q must have 4 dimensions \[B, H, S, D\], got \[2, 256, 64\]", set_("q", lambda t: t[0])),
    "heads": (r"k must be \[1, 2, Skv, 64\] like q, got \[1, 1, 256, 64\]", set_("k", lambda t: t[:, :1])),
    "kv_length": (r"k and v must have the same length, got 256 and 255", set_("v", lambda t: t[:, :, :255])),
    "stride": (r"q must have a contiguous last dimension, got stride 256",
               set_("q", lambda t: t.contiguous().transpose(2, 3).contiguous().transpose(2, 3))),
    "list_dtype": (r"kv_num_blocks must be int32, got int64", set_("kv_num_blocks", lambda t: t.long())),
    "list_rank": (r"kv_indices must have 4 dimensions, got \[1, 2, 2\]", set_("kv_indices", lambda t: t[..., 0])),
    "list_heads": (r"kv_indices must begin with \[1 or 1, 2 or 1\], got \[1, 3, 2, 2\]",
                   set_("kv_indices", lambda t: t[:, [0, 0, 1]])),
    "list_length": (r"must list 2 query blocks, got \[1, 2, 1\]", set_("kv_num_blocks", lambda t: t[..., :1].contiguous())),
    "block_size": (r"block sizes must be positive, got 0 and 128", set_("q_block_size", 0)),
    "index_high": (r"kv_indices must be in 0..1, got 2 for query block 0", set_("kv_indices", lambda t: t + 1)),
    "index_negative": (r"kv_indices must be in 0..1, got -1", set_("kv_indices", lambda t: t - 1)),
    "count_high": (r"kv_num_blocks must be in 0..2 \(the width of kv_indices\), got 3", set_("kv_num_blocks", lambda t: t + 1)),
    "offsets_start": (r"q_offsets must start at 0, got 1", set_("q_offsets", offsets(1, 128, 256))),
    "offsets_fall": (r"kv_offsets must never fall, got 200 then 100 at position 2", set_("kv_offsets", offsets(0, 200, 100))),
    "offsets_end": (r"kv_offsets must end at the sequence length 256, got 255", set_("kv_offsets", offsets(0, 128, 255))),
    "offsets_dtype": (r"q_offsets must be int32, got int64", set_("q_offsets", offsets(0, 128, 256).long())),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(backend, name):
    if backend.name == "cuda" and name.startswith(
        ("index", "count", "offsets_start", "offsets_fall", "offsets_end")
    ):
        pytest.skip("cuda: list contents are checked with VDIT_CHECK_PLANS=1 only; they would need a host sync")
    match, edit = REFUSALS[name]
    refuse(backend, match, edit=edit)


def test_counts_of_every_head_are_checked_when_lists_broadcast(backend):
    if backend.name == "cuda":
        pytest.skip("cuda: list contents are checked with VDIT_CHECK_PLANS=1 only; they would need a host sync")
    inputs = simple()
    inputs.kv_indices = inputs.kv_indices[:, :1].contiguous()
    check(backend, inputs)
    inputs.kv_num_blocks[0, 1, 1] = 9
    with pytest.raises(RuntimeError, match=r"kv_num_blocks must be in 0..2 \(the width of kv_indices\), got 9"):
        run(backend, inputs)


def test_block_size_beyond_the_sequence_is_one_block(backend):
    inputs = simple(sq=100, skv=70)
    expected, _ = run(backend, inputs)
    inputs.kwargs |= {"q_block_size": 2**40, "kv_block_size": 1 << 30}
    assert torch.equal(run(backend, inputs)[0], expected)


def test_refuses_head_dim(backend):
    inputs = simple(dim=72 if backend.is_cuda_code else 260)
    expected = (
        "64, 96 or 128 on CUDA, got 72" if backend.is_cuda_code else "a multiple of 8 up to 256 on CPU, got 260"
    )
    with pytest.raises(RuntimeError, match=f"head_dim must be {expected}"):
        run(backend, inputs)


def test_refuses_misaligned_rows_in_cuda_code(backend):
    if not backend.is_cuda_code:
        pytest.skip("the CPU kernels take any alignment")
    shape = simple().q.shape
    # Made where it is used: a copy to a device would be aligned.
    base = torch.zeros(shape.numel() + 16, dtype=torch.bfloat16, device=backend.device)
    gapped = torch.zeros(*shape[:3], shape[3] + 4, dtype=torch.bfloat16, device=backend.device)
    for q in (base[1 : shape.numel() + 1].view(shape), gapped[..., : shape[3]]):
        inputs = simple().to(backend.device)
        inputs.q = q
        with pytest.raises(RuntimeError, match="q must have rows aligned to 16 bytes on CUDA"):
            run(backend, inputs)


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sliced"])
def test_inputs_keep_their_gaps_on_any_device(layout):
    inputs = cases.make_attention(cases.C("lies", layout=layout, lists="broadcast"), torch.bfloat16)
    moved = inputs.to("meta")
    for here, there in zip(inputs.args, moved.args, strict=True):
        assert there.device.type == "meta" and there.dtype == here.dtype and there.shape == here.shape
        assert there.stride() == here.stride() and there.storage_offset() == here.storage_offset()
    assert layout != "sliced" or (inputs.q.storage_offset() > 0 and inputs.q.stride(2) > 2 * 64)
    assert inputs.to("cpu").q.data_ptr() == inputs.q.data_ptr()


def test_refuses_mixed_devices():
    inputs = simple()
    with pytest.raises(
        RuntimeError, match="block_sparse_attention: k must be on cpu like the first argument, got meta"
    ):
        torch.ops.vdit.block_sparse_attention(inputs.q, inputs.k.to("meta"), inputs.v, *inputs.args[3:])


# --- torch.library and torch.compile ------------------------------------------------------------------------


@pytest.mark.parametrize("case", [cases.ragged[0], cases.ragged[4], cases.ragged[7]], ids=str)
def test_opcheck(case):
    inputs = cases.make_attention(case, torch.float32)
    torch.library.opcheck(torch.ops.vdit.block_sparse_attention.default, inputs.args, inputs.kwargs)


def test_compiles_whole_with_dynamic_shapes():
    def attend(inputs):
        out, lse = torch.ops.vdit.block_sparse_attention(*inputs[0], **inputs[1])
        return out * 2, lse + 1

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (200, 333, 512):
        inputs = cases.make_attention(
            cases.C("dyn", seqlen_q=length, seqlen_kv=length + 7, density=0.7), torch.float32
        )
        pair = (inputs.args, inputs.kwargs)
        for got, expected in zip(compiled(pair), attend(pair), strict=True):
            assert torch.equal(got, expected)


def test_64_bit_offsets_symbolically():
    """More than 2^31 elements: shapes propagate without materialising anything."""
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(1, 119_056, 24, 128 * 8, dtype=torch.bfloat16).transpose(1, 2)
        nq = -(-119_056 // 128)
        counts = torch.empty(1, 24, nq, dtype=torch.int32)
        out, lse = torch.ops.vdit.block_sparse_attention(
            q, q, q, counts, torch.empty(1, 24, nq, nq, dtype=torch.int32)
        )
    assert q.numel() > 2**31 and out.shape == q.shape and lse.shape == (1, 24, 119_056)
    assert out.stride() == q.stride()


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("step", ["head", "row"])
def test_64_bit_offsets_for_real(backend, which, step):
    """A tensor whose last head, or last row, begins beyond 2^31 elements.

    4 GiB on a GPU; on the CPU they are mapped lazily, so that only touched pages exist.
    """
    heads, length, dim = 2, 40, 64
    far = 2**31 + 4096
    if backend.device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("cuda: less than 6 GiB of GPU memory are free")
    storage = torch.UntypedStorage(2 * (far + 8 * length * dim), device=backend.device)
    base = torch.empty(0, dtype=torch.bfloat16, device=backend.device).set_(storage)
    # Strides of rows are multiples of 16 bytes; the last row begins a little beyond 2^31 in either case.
    strides = (0, far, dim, 1) if step == "head" else (0, dim, far // (length - 1) // 8 * 8, 1)
    tensors = [torch.randn(1, heads, length, dim, generator=generator(i)).bfloat16() for i in range(3)]
    one = torch.ones(1, 1, 1, dtype=torch.int32)
    lists = one, torch.zeros_like(one)[..., None]
    expected, _ = block_sparse_attention_naive(*tensors, *lists)
    inputs = [t.to(backend.device) for t in tensors]
    place = "qkv".index(which)
    inputs[place] = base.as_strided((1, heads, length, dim), strides).copy_(inputs[place])
    offset = (heads - 1) * strides[1] + (length - 1) * strides[2]
    assert 2**31 < offset < 2**31 + 2 * far // length
    out, _ = backend.ops.block_sparse_attention(*inputs, *(t.to(backend.device) for t in lists))
    assert_close(out, expected)


# --- what only a GPU needs to be asked for -------------------------------------------------------------------

CHECKED = """
import torch
from cases import attention as cases
import vdit_ext

inputs = cases.make_attention(cases.C("simple", density=1.0), torch.bfloat16).to("cuda")
out, _ = torch.ops.vdit.block_sparse_attention(*inputs.args, **inputs.kwargs)
assert out.isfinite().all()
inputs.kv_indices += 1
try:
    out, lse = torch.ops.vdit.block_sparse_attention(*inputs.args, **inputs.kwargs)
    print("nan" if out.isnan().all() and lse.isnan().all() else "not nan")
except RuntimeError as error:
    print(str(error).splitlines()[0])
"""


@pytest.mark.parametrize(
    "value, said",
    [
        ("1", "vdit::block_sparse_attention: kv_indices must be in 0..1, got 2 for query block 0"),
        ("0", "nan"),
        ("", "nan"),
    ],
)
def test_plans_are_checked_on_a_gpu_on_request(value, said):
    """VDIT_CHECK_PLANS, which is read once a process; the CPU and the emulator check always."""
    if not torch.cuda.is_available() or vdit_ext.ops.LIBRARIES["cuda"] != "loaded":
        pytest.skip("cuda: only a GPU leaves lists unchecked, and there is none here or no library for it")
    folders = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "VDIT_CHECK_PLANS": value, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    if not value:
        del env["VDIT_CHECK_PLANS"]
    done = subprocess.run([sys.executable, "-c", CHECKED], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == said
