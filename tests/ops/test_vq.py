"""The ops of the vq family against their definitions, on every backend. Section 9 of the VQ4DiT specification is
where the tests named ``*_property_*`` come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import vq as cases
from cases.attention import as_it_lies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vdit_ext import _C, ops
from vdit_ext.ops import vq as defs
from vdit_ext.testing import assert_close, generator

BACKENDS = ("cpu", "emu", "emu_sm90", "cuda")
quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
HALVES = [torch.bfloat16, torch.float16]
FLOATS = [*HALVES, torch.float32]
by_dim = pytest.mark.parametrize("dim", cases.DIMS, ids=cases.DIM_IDS)


def on(backend, *tensors):
    return [as_it_lies(t, backend.device) for t in tensors]


def run(backend, inputs: cases.LinearInputs, **changes):
    there = inputs.to(backend.device)
    return backend.ops.vq_linear(*there.args, **(there.kwargs | changes)).cpu()


def skip_unless_taken(backend, case, dtype=torch.bfloat16):
    if backend.is_cuda_code and not case.cuda:
        pytest.skip("K is a multiple of 16 on CUDA")
    if backend.is_cuda_code and dtype == torch.float32:
        pytest.skip("fp32 products run on the CPU only")


def paths(backend):
    return ["fused", "expand"] if backend.is_cuda_code else ["auto"]


# --- codes in tiles -----------------------------------------------------------------------------------------


@by_dim
@given(n=st.integers(0, 70), words=st.integers(0, 90), seed=st.integers(0, 99))
@quick
def test_property_pack_unpack_identity_for_8_6_and_12_bit_codes_with_odd_tails(dim, n, words, seed):
    """Two 6-bit indices make a 12-bit code, and an odd number of them a half-filled one."""
    indices = torch.randint(0, defs.CODEWORDS[dim], (n, words), generator=generator(seed))
    tiles = ops.pack_vq(indices, dim)
    assert tiles.shape == (-(-n // 32), -(-words * dim // 64), defs.TILE_BYTES[dim])
    assert torch.equal(ops.unpack_vq(tiles, n, words * dim), indices.int())


def test_property_every_12_bit_code_survives_packing():
    pairs = torch.stack([torch.arange(4096) % 64, torch.arange(4096) // 64], -1).reshape(64, 128)
    assert torch.equal(ops.unpack_vq(ops.pack_vq(pairs, 2), 64, 256), pairs.int())


def lane_and_quad(n: int, quad: int) -> tuple[int, int]:
    """The inverse of vdit/vq.h's formula, found by trying every lane and quad of a tile."""
    for lane in range(32):
        for j in range(16):
            k = 32 * (j // 8) + 16 * (j % 2) + 4 * (lane % 4)
            if (8 * (j % 8 // 2) + lane // 4, k) == (n, 4 * quad):
                return lane, j
    raise AssertionError((n, quad))


def test_property_the_tile_formula_is_a_bijection_on_32_by_16_codes():
    places = {lane_and_quad(n, quad) for n in range(32) for quad in range(16)}
    assert len(places) == 32 * 16


def test_tiles_follow_the_formula():
    quads = torch.randint(0, 256, (32, 16), generator=generator(0))
    pairs = torch.randint(0, 64, (32, 32), generator=generator(1))
    bytes_of_quads = ops.pack_vq(quads, 4)[0, 0].tolist()
    bytes_of_pairs = bytes(ops.pack_vq(pairs, 2)[0, 0].tolist())
    for n in range(32):
        for quad in range(16):
            lane, j = lane_and_quad(n, quad)
            assert bytes_of_quads[16 * lane + j] == quads[n, quad]
            bits = int.from_bytes(bytes_of_pairs[24 * lane : 24 * lane + 24], "little") >> 12 * j & 4095
            assert bits == pairs[n, 2 * quad] + 64 * pairs[n, 2 * quad + 1]


def test_packing_refuses():
    with pytest.raises(ValueError, match="pack_vq: dim must be 4 or 2, got 3"):
        ops.pack_vq(torch.zeros(2, 2, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match="pack_vq: indices must be in 0..63, got 0 to 64"):
        ops.pack_vq(torch.tensor([[0, 64]]), 2)
    with pytest.raises(ValueError, match=r"pack_vq: indices must be integers \[N, K / 4\], got torch.float32"):
        ops.pack_vq(torch.zeros(2, 2), 4)
    with pytest.raises(
        ValueError, match=r"unpack_vq: codes must be uint8 \[1, 2, 512 or 768\] for a weight \[32, 65\]"
    ):
        ops.unpack_vq(torch.zeros(1, 1, 512, dtype=torch.uint8), 32, 65)
    with pytest.raises(ValueError, match="unpack_vq: in_features must be a multiple of 4, got 6"):
        ops.unpack_vq(torch.zeros(1, 1, 512, dtype=torch.uint8), 32, 6)


# --- vq_assign ----------------------------------------------------------------------------------------------


def assign(backend, vectors, codebook, count=1):
    return [t.cpu() for t in backend.ops.vq_assign(*on(backend, vectors, codebook), count)]


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_property_assignment_is_the_true_nearest_codeword(backend, dim, count):
    vectors = torch.randn(301, dim, generator=generator(dim))
    codebook = torch.randn(67, dim, generator=generator(dim + 50))
    indices, distances = assign(backend, vectors, codebook, count)
    true = (vectors.double()[:, None] - codebook.double()).square().sum(-1)  # brute force
    chosen = true.gather(1, indices.long())
    assert_close(chosen.float(), true.sort(1).values[:, :count].float(), tolerance=1e-5, what="nearest")
    assert_close(distances, chosen.float(), tolerance=1e-5, what="distances")
    assert all(len(set(row)) == count for row in indices.tolist()), "no codeword twice"


@pytest.mark.parametrize("count", [2, 4, 7])
def test_property_candidate_lists_are_sorted_by_distance(backend, count):
    vectors, codebook = torch.randn(500, 4, generator=generator(0)), torch.randn(256, 4, generator=generator(1))
    _, distances = assign(backend, vectors, codebook, count)
    assert (distances[:, 1:] >= distances[:, :-1]).all() and (distances >= 0).all()


def test_property_candidate_0_equals_the_nearest_code(backend):
    vectors, codebook = torch.randn(333, 4, generator=generator(0)), torch.randn(256, 4, generator=generator(1))
    nearest, distance = assign(backend, vectors, codebook)
    for count in (2, 5, 8):
        indices, distances = assign(backend, vectors, codebook, count)
        assert torch.equal(indices[:, :1], nearest) and torch.equal(distances[:, :1], distance)


@pytest.mark.parametrize("dim,count", [(2, 1), (4, 2), (4, 8), (7, 4)])
def test_assign_is_exact_on_integers_with_ties_to_the_lower_index(backend, dim, count):
    gen = generator(dim)
    vectors = torch.randint(-3, 4, (257, dim), generator=gen).float()
    codebook = torch.randint(-3, 4, (90, dim), generator=gen).float()  # many words twice and at equal distance
    indices, distances = assign(backend, vectors, codebook, count)
    expected = defs.vq_assign_naive(vectors, codebook, count)
    assert torch.equal(indices, expected[0]) and torch.equal(distances, expected[1])


def test_assign_walks_a_codebook_larger_than_shared_memory(backend):
    """The nearest word is planted near the end: 20,011 words of 8 floats are 640 KB."""
    codebook = torch.randn(20011, 8, generator=generator(0)) + 10
    vectors = torch.randn(5, 8, generator=generator(1))
    codebook[19990] = vectors[3]
    indices, distances = assign(backend, vectors, codebook, 2)
    expected = defs.vq_assign_naive(vectors, codebook, 2)
    assert indices[3, 0] == 19990 and torch.equal(indices, expected[0])
    assert_close(distances, expected[1], tolerance=1e-5)


def test_assign_corners(backend):
    codebook = torch.randn(9, 4, generator=generator(0))
    indices, distances = assign(backend, torch.zeros(0, 4), codebook, 3)
    assert indices.shape == (0, 3) and distances.shape == (0, 3)
    indices, distances = assign(backend, torch.zeros(2, 4), codebook[:1])
    assert indices.tolist() == [[0], [0]]
    assert_close(distances, codebook[:1].square().sum(1, keepdim=True).expand(2, 1))
    broken = torch.full((1, 4), torch.nan)
    indices, distances = assign(backend, broken, codebook, 3)
    assert indices.tolist() == [[0, 1, 2]] and distances.isnan().all()
    codebook[0] = torch.nan
    indices, _ = assign(backend, torch.zeros(1, 4), codebook, 2)
    assert 0 not in indices.tolist()[0]


def test_assign_refuses(backend):
    vectors, codebook = on(backend, torch.zeros(3, 4), torch.zeros(5, 4))
    assign = backend.ops.vq_assign
    with pytest.raises(
        RuntimeError, match=r"vq_assign: vectors must be \[V, D\] with D in 1..16, got \[3, 17\]"
    ):
        assign(*on(backend, torch.zeros(3, 17), torch.zeros(5, 17)))
    with pytest.raises(RuntimeError, match=r"codebook must be \[C, 4\] with C in 1..65536, got \[5, 3\]"):
        assign(vectors, codebook[:, :3])
    with pytest.raises(RuntimeError, match=r"codebook must be \[C, 4\] with C in 1..65536, got \[0, 4\]"):
        assign(vectors, codebook[:0])
    with pytest.raises(RuntimeError, match=r"codebook must be \[C, 4\] with C in 1..65536, got \[65537, 4\]"):
        assign(vectors, codebook[:1].expand(65537, 4))
    with pytest.raises(RuntimeError, match=r"count must be in 1..5 \(8, or the codewords .*\), got 6"):
        assign(vectors, codebook, 6)
    with pytest.raises(RuntimeError, match="codebook must be float32, got float16"):
        assign(vectors, codebook.half())
    with pytest.raises(RuntimeError, match="vectors must be float32, got bfloat16"):
        assign(vectors.bfloat16(), codebook)


# --- vq_dequantize ------------------------------------------------------------------------------------------


@by_dim
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize("n,k", [(1, 4), (32, 64), (33, 64), (70, 200), (31, 1), (5, 131), (64, 48), (40, 66)])
def test_dequantize_is_the_codebook_bit_by_bit(backend, dim, dtype, n, k):
    codes, codebook = cases.make_codes(n, k, dim), cases.make_codebook(dim, dtype)
    out = backend.ops.vq_dequantize(*on(backend, codes, codebook), n, k)
    assert out.dtype == dtype and torch.equal(out.cpu(), defs.vq_dequantize_naive(codes, codebook, n, k))


@by_dim
def test_property_decode_of_encode_equals_c_of_a_bitwise(backend, dim):
    n, k = 45, 112
    weight = torch.randn(n, k, generator=generator(0))
    codebook = cases.make_codebook(dim, torch.float32)
    assignment, _ = assign(backend, weight.reshape(-1, dim), codebook)
    codes = ops.pack_vq(assignment.reshape(n, k // dim), dim)
    out = backend.ops.vq_dequantize(*on(backend, codes, codebook), n, k).cpu()
    assert torch.equal(
        out.view(torch.int32), codebook[assignment.flatten().long()].reshape(n, k).view(torch.int32)
    )


@by_dim
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dequantize_scales_rows_in_fp32(backend, dim, dtype):
    codes, codebook = cases.make_codes(50, 136, dim), cases.make_codebook(dim, dtype)
    scale = torch.rand(50, generator=generator(3)) + 0.5
    out = backend.ops.vq_dequantize(*on(backend, codes, codebook), 50, 136, row_scale=scale.to(backend.device))
    assert torch.equal(out.cpu(), defs.vq_dequantize_naive(codes, codebook, 50, 136, row_scale=scale))


def test_dequantize_nothing(backend):
    codes, codebook = on(backend, cases.make_codes(0, 8, 4), cases.make_codebook(4, torch.float32))
    assert backend.ops.vq_dequantize(codes, codebook, 0, 8).shape == (0, 8)


def test_dequantize_refuses(backend):
    codes, codebook = on(backend, cases.make_codes(33, 64, 4), cases.make_codebook(4, torch.float32))
    call = backend.ops.vq_dequantize
    with pytest.raises(
        RuntimeError, match=r"codes must be \[2, 2, 512\] \(256 words of 4\) or .*got \[2, 1, 512\]"
    ):
        call(codes, codebook, 33, 65)
    with pytest.raises(RuntimeError, match=r"codes must be \[1, 1, 512\].*got \[2, 1, 512\]"):
        call(codes, codebook, 32, 64)
    with pytest.raises(RuntimeError, match=r"codes must be \[2, 1, 512\].*got \[2, 1, 500\]"):
        call(codes[..., :500], codebook, 33, 64)
    with pytest.raises(RuntimeError, match="codes must be uint8, got int32"):
        call(codes.int(), codebook, 33, 64)
    with pytest.raises(
        RuntimeError, match=r"codebook must be \[256, 4\] for tiles of 512 bytes, got \[64, 2\]"
    ):
        call(codes, codebook[:64, :2].contiguous(), 33, 64)
    with pytest.raises(RuntimeError, match="codebook must be float32, float16, bfloat16 or int8, got float64"):
        call(codes, codebook.double(), 33, 64)
    with pytest.raises(RuntimeError, match="there must be 1 to 65536 input channels, got 65537"):
        call(codes, codebook, 33, 65537)
    with pytest.raises(RuntimeError, match="row_scale must be None with an int8 codebook"):
        call(codes, codebook.to(torch.int8), 33, 64, row_scale=torch.ones(33, device=backend.device))
    with pytest.raises(RuntimeError, match=r"row_scale must be \[33\], got \[32\]"):
        call(codes, codebook, 33, 64, row_scale=torch.ones(32, device=backend.device))


# --- vq_linear ----------------------------------------------------------------------------------------------


def exact_sums(inputs: cases.LinearInputs) -> torch.Tensor:
    """By numpy in int64, over the dequantized weight."""
    k = inputs.x.shape[-1]
    weight = defs.vq_dequantize_naive(inputs.codes, inputs.codebook, inputs.out_features, k).numpy()
    return torch.from_numpy(inputs.x.numpy().astype(np.int64) @ weight.astype(np.int64).T)


@by_dim
@pytest.mark.parametrize("case", cases.corner + cases.odd_k, ids=str)
def test_property_gemm_equals_dequant_and_matmul_exactly_in_int32(backend, case, dim):
    skip_unless_taken(backend, case)
    inputs = cases.make_linear(case, dim, torch.int8, torch.int32)
    for path in ("fused", "expand"):
        out = run(backend, inputs, path=path)
        assert out.dtype == torch.int32 and torch.equal(out.long(), exact_sums(inputs)), path


def test_sums_of_the_largest_codes_are_exact(backend):
    """The bound on K is what int32 holds."""
    inputs = cases.make_linear(cases.LinearCase("extreme", (2,), n=3, k=65536), 4, torch.int8, torch.int32)
    inputs.x.fill_(-128)
    inputs.codebook.fill_(-128)
    assert (run(backend, inputs) == 2**30).all()


@by_dim
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", cases.corner + cases.odd_k, ids=str)
def test_property_gemm_equals_dequant_and_matmul_to_1e_3_in_halves(backend, case, dtype, dim):
    """M = 0, M = 1, ragged M and N are among the cases; sums in fp32, so that only they round."""
    skip_unless_taken(backend, case, dtype)
    inputs = cases.make_linear(case, dim, dtype, torch.float32)
    expected = defs.vq_linear_naive(*inputs.args, **inputs.kwargs)
    assert_close(
        run(backend, inputs, path="fused"), expected, tolerance=1e-3 if dtype != torch.float32 else 2e-6
    )


@by_dim
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize("case", cases.epilogues, ids=str)
def test_linear_epilogues(backend, case, dtype, dim):
    skip_unless_taken(backend, case, dtype)
    inputs = cases.make_linear(case, dim, dtype)
    expected = defs.vq_linear_naive(*inputs.args, **inputs.kwargs)
    for path in ("fused", "expand"):
        assert_close(run(backend, inputs, path=path), expected, what=path)


@pytest.mark.parametrize("residual", [False, True], ids=["bare", "residual"])
def test_autocast_does_not_change_the_type(backend, residual):
    """torch's linear, which multiplies an expanded weight, would follow it."""
    inputs = cases.make_linear(cases.LinearCase("cast", (20,), residual=residual), 4, torch.bfloat16)
    expected = defs.vq_linear_naive(*inputs.args, **inputs.kwargs)
    with torch.autocast(backend.device, dtype=torch.float16):
        out = run(backend, inputs, path="expand")
    assert out.dtype == torch.bfloat16
    assert_close(out, expected)


@pytest.mark.parametrize("lead", [(70,), (2, 35), (35, 2)], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["bare", "residual"])
def test_an_expanded_float_weight_takes_one_result(emulator, lead, residual):
    """torch's linear writes to the result, where the epilogue finishes it."""
    inputs = cases.make_linear(
        cases.LinearCase("once", lead, n=96, k=64, bias=True, residual=residual), 4, torch.bfloat16
    )
    expected = defs.vq_linear_naive(*inputs.args, **inputs.kwargs)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        out = run(emulator, inputs, path="expand")
    assert_close(out, expected)
    result_bytes = 70 * 96 * 2
    allocated = [event.self_cpu_memory_usage for event in profile.events()]
    assert allocated.count(result_bytes) == 1, allocated


@by_dim
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
def test_linear_out_dtypes(backend, dim, rows, out_dtype):
    case = cases.LinearCase("out", (rows,), residual=True, bias=True)
    for dtype in (torch.bfloat16, torch.int8):
        inputs = cases.make_linear(case, dim, dtype, out_dtype)
        out = run(backend, inputs)
        assert out.dtype == out_dtype
        assert_close(out, defs.vq_linear_naive(*inputs.args, **inputs.kwargs))


@by_dim
@pytest.mark.parametrize("rows", [3, 40])
def test_rows_do_not_depend_on_their_neighbours(backend, dim, rows):
    """A NaN row stays in its row, and what lies behind the rows of a view is not read."""
    inputs = cases.make_linear(cases.LinearCase("nan", (rows,), k=80), dim, torch.bfloat16)
    expected = run(backend, inputs)
    wide = torch.full((rows, 160), torch.nan, dtype=torch.bfloat16)
    wide[:, :80] = inputs.x
    inputs.x = wide[:, :80]
    inputs.x[1] = torch.nan
    out = run(backend, inputs)
    others = [r for r in range(rows) if r != 1]
    assert out[1].isnan().all() and torch.equal(out[others], expected[others])


@by_dim
@given(m=st.integers(0, 40), n=st.integers(0, 70), k=st.integers(1, 90), seed=st.integers(0, 99))
@quick
def test_any_size_on_the_cpu(dim, m, n, k, seed):
    inputs = cases.make_linear(cases.LinearCase("drawn", (m,), n=n, k=k), dim, torch.float32)
    inputs.codes = cases.make_codes(n, k, dim, seed)
    assert_close(ops.vq_linear(*inputs.args), defs.vq_linear_naive(*inputs.args))


def test_linear_refuses(backend):
    inputs = cases.make_linear(cases.LinearCase("bad", (3,), n=33, k=64), 4, torch.bfloat16).to(backend.device)
    x, codes, codebook, n = inputs.args
    call, scale = backend.ops.vq_linear, torch.ones(3, device=backend.device)
    with pytest.raises(RuntimeError, match="vq_linear: codebook must be bfloat16 like x, got float16"):
        call(x, codes, codebook.half(), n)
    with pytest.raises(RuntimeError, match="codebook must be int8 like x, got bfloat16"):
        call(x.to(torch.int8), codes, codebook, n, x_scale=scale)
    with pytest.raises(
        RuntimeError, match=r"codes must be \[2, 1, 512\].*for a weight \[34, 48\]|codes must be \[2, 1"
    ):
        call(x, codes[:1], codebook, n)
    with pytest.raises(
        RuntimeError, match=r"codebook must be \[256, 4\] for tiles of 512 bytes, got \[128, 4\]"
    ):
        call(x, codes, codebook[:128], n)
    with pytest.raises(RuntimeError, match="x_scale must be given with int8 x"):
        call(x.to(torch.int8), codes, codebook.to(torch.int8), n)
    with pytest.raises(RuntimeError, match="x_scale must be None where x is bfloat16"):
        call(x, codes, codebook, n, x_scale=scale)
    with pytest.raises(RuntimeError, match="path must be auto, fused or expand, got quick"):
        call(x, codes, codebook, n, path="quick")
    with pytest.raises(
        RuntimeError, match="out_dtype must be float32, float16 or bfloat16 where x is not int8, got int32"
    ):
        call(x, codes, codebook, n, out_dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"bias must be \[33\], got \[32\]"):
        call(x, codes, codebook, n, bias=torch.zeros(32, device=backend.device))
    with pytest.raises(RuntimeError, match=r"x must be \[M, K\] or \[B, S, K\], got \[64\]"):
        call(x[0], codes, codebook, n)
    with pytest.raises(RuntimeError, match="there must be 1 to 65536 input channels, got 65552"):
        call(x[:, :1].repeat(1, 65552), codes, codebook, n)


def test_cuda_refuses(backend):
    if not backend.is_cuda_code:
        pytest.skip("the CPU takes these")
    inputs = cases.make_linear(cases.LinearCase("bad", (3,), n=33, k=72), 4, torch.bfloat16).to(backend.device)
    with pytest.raises(RuntimeError, match="channels of x must be a multiple of 16 on CUDA, got 72; pad x"):
        backend.ops.vq_linear(*inputs.args)
    inputs = cases.make_linear(cases.LinearCase("bad", (3,), n=33, k=64), 4, torch.float32).to(backend.device)
    with pytest.raises(RuntimeError, match="x must be int8, float16 or bfloat16 on CUDA, got float32"):
        backend.ops.vq_linear(*inputs.args)


@pytest.mark.parametrize("int8", [False, True], ids=["halves", "int8"])
def test_the_choice_of_a_path_says_why(int8):
    """Few rows are looked up, many expanded; the switch is where expanding becomes the cheaper one."""
    chosen = [_C.vq_path(m, 1536, 1536, int8=int8) for m in (1, 16, 17, 100, 1000, 10**5)]
    assert [c["path"] for c in chosen][-1] == "expand" and chosen[2]["path"] == "fused"
    assert chosen[0]["path"] == ("fused" if int8 else "rows")
    for choice in chosen:
        assert (choice["path"] == "expand") == (choice["expand_cost"] < choice["fused_cost"])
        assert choice["path"] in choice["text"] and "estimates" in choice["text"]
    assert _C.vq_path(10**5, 1536, 1536, int8=int8, path="fused")["path"] == "fused"
    assert "as asked" in _C.vq_path(4, 1536, 1536, int8=int8, path="expand")["text"]


def test_the_path_knows_the_kernel_for_90():
    """wgmma looks words up at a smaller share of the product, so a weight is expanded later; few rows are left to the
    kernel for 8.0, and floats have that one alone."""
    h200 = {"compute_capability": 90, "sm90": True}
    rows = (16, 63, 64, 1000, 10**5)
    chosen = [_C.vq_path(m, 5120, 5120, int8=True, **h200) for m in rows]
    assert [c["kernel"] for c in chosen] == [80, 80, 90, 90, 90]
    assert [c["path"] for c in chosen] == ["fused"] * 4 + ["expand"]
    assert "by the sm80 kernel: sm80 would take 0.32 of sm90's time" in chosen[0]["text"]
    older = _C.vq_path(1000, 5120, 5120, int8=True, compute_capability=90)
    assert (older["kernel"], older["path"]) == (80, "expand")
    halves = [_C.vq_path(m, 5120, 5120, **h200) for m in (1, 1000)]
    assert [(c["kernel"], c["path"]) for c in halves] == [(80, "rows"), (None, "expand")]


# --- torch --------------------------------------------------------------------------------------------------


@by_dim
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_opcheck(dim, dtype):
    vectors, codebook = torch.randn(10, 4), torch.randn(16, 4)
    torch.library.opcheck(torch.ops.vdit.vq_assign, (vectors, codebook, 2))
    inputs = cases.make_linear(cases.epilogues[5], dim, dtype)
    torch.library.opcheck(torch.ops.vdit.vq_linear, inputs.args, inputs.kwargs)
    torch.library.opcheck(
        torch.ops.vdit.vq_dequantize, (inputs.codes, inputs.codebook, inputs.out_features, 128)
    )


def test_backward_says_no():
    inputs = cases.make_linear(cases.epilogues[0], 4, torch.float32)
    bias = inputs.kwargs["bias"].requires_grad_()
    out = ops.vq_linear(*inputs.args, bias=bias)
    with pytest.raises(RuntimeError, match="vdit::vq_linear: it has no backward yet"):
        out.sum().backward()
