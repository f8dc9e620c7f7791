"""rms_norm_rope against its definition and against the models that it stands in for, on every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import rope as cases
from cases.attention import as_it_lies
from cases.rows import FLOAT_IDS, FLOATS
from torch import nn

from vdit_ext import ops
from vdit_ext.ops import attention as defs
from vdit_ext.testing import assert_close, generator

# Half a unit in the last place, as a share of the value: what one rounding may change.
HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def on(backend, values):
    return [as_it_lies(v, backend.device) if isinstance(v, torch.Tensor) else v for v in values]


def call(backend, inputs: cases.NormRopeInputs):
    kwargs = dict(zip(inputs.kwargs, on(backend, inputs.kwargs.values()), strict=True))
    return backend.ops.rms_norm_rope(*on(backend, inputs.args), **kwargs)


@pytest.mark.parametrize("dtype", FLOATS, ids=FLOAT_IDS)
@pytest.mark.parametrize("case", cases.every, ids=str)
def test_definition_within_one_rounding(backend, case, dtype):
    inputs = cases.make_norm_rope(case, dtype)
    out = call(backend, inputs)
    assert out.dtype == dtype
    by_token = inputs.x.stride(1) < inputs.x.stride(2)  # one token or head: either order is the same
    assert (out.transpose(1, 2) if by_token else out).is_contiguous()
    exact = replace(inputs, x=inputs.x.double())
    expected = defs.rms_norm_rope_naive(*exact.args, **exact.kwargs)
    # fp32 sums, products and the square root: some units of fp32 of the largest value that takes part.
    arithmetic = 1e-6 * float(expected.abs().max())
    error = (out.cpu().double() - expected).abs()
    assert (error <= HALF_ULP[dtype] * expected.abs() * 1.001 + arithmetic).all(), float(error.max())
    assert torch.equal(call(backend, inputs), out), "equal inputs give equal bits"


@pytest.mark.parametrize("dtype", FLOATS, ids=FLOAT_IDS)
@pytest.mark.parametrize("case", cases.permuted, ids=str)
def test_an_index_only_moves_rows(backend, case, dtype):
    inputs = cases.make_norm_rope(case, dtype)
    out = call(backend, inputs).cpu()
    index = inputs.kwargs.pop("index")
    assert torch.equal(out, defs.permute_rows_naive(call(backend, inputs).cpu(), index))


@pytest.mark.parametrize("interleaved", [True, False])
def test_one_value_a_pair_equals_one_a_channel(backend, interleaved):
    case = cases.NormRopeCase("half", half_tables=True, interleaved=interleaved)
    inputs = cases.make_norm_rope(case, torch.bfloat16)
    wide = [defs._pairs(t, t, interleaved) for t in (inputs.cos, inputs.sin)]
    assert torch.equal(call(backend, inputs), call(backend, replace(inputs, cos=wide[0], sin=wide[1])))


@pytest.mark.parametrize("first", [True, False], ids=["text_first", "text_last"])
def test_text_is_normed_but_not_rotated(backend, first):
    case = cases.NormRopeCase("text", text=7, text_first=first)
    inputs = cases.make_norm_rope(case, torch.float32)
    out = call(backend, inputs)
    plain = call(backend, cases.NormRopeInputs(inputs.x, inputs.weight, None, None))
    text = slice(0, 7) if first else slice(12, 19)
    assert torch.equal(out[:, :, text], plain[:, :, text])
    video = slice(7, 19) if first else slice(0, 12)
    assert (out[:, :, video] != plain[:, :, video]).any(-1).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("index", [None, "h"])
def test_nan_stays_in_its_token(backend, value, across, index):
    case = cases.NormRopeCase("nan", heads=5, across_heads=across, index=index, weight="all")
    inputs = cases.make_norm_rope(case, torch.bfloat16)
    clean = call(backend, inputs).cpu()
    inputs.x[0, 2, 11, 3] = value
    out = call(backend, inputs).cpu()
    expected = defs.rms_norm_rope_naive(*inputs.args, **inputs.kwargs)
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any()
    hit = torch.zeros(1, 5, 19, 1, dtype=torch.bool)
    hit[0, :, 11] = torch.tensor([across or head == 2 for head in range(5)])[:, None]
    if index is not None:
        hit = defs.permute_rows_naive(hit, inputs.kwargs["index"])
    assert torch.equal(out.masked_fill(hit, 0), clean.masked_fill(hit, 0)), "the other rows are untouched"


def test_rows_of_zeros_stay_zero(backend):
    inputs = cases.make_norm_rope(cases.NormRopeCase("zeros"), torch.float16)
    inputs.x[:, :, 4] = 0
    assert (call(backend, inputs)[:, :, 4] == 0).all()


def test_empty(backend):
    for shape in ((0, 2, 3, 64), (1, 2, 0, 64), (1, 0, 3, 64)):
        x = torch.zeros(shape, device=backend.device)
        index = torch.arange(shape[2], dtype=torch.int32, device=backend.device)[None, None]
        assert backend.ops.rms_norm_rope(x, torch.ones(64, device=backend.device), index=index).shape == shape
    inputs = cases.make_norm_rope(cases.NormRopeCase("no_rows", text=19), torch.float32)
    assert inputs.cos.numel() == 0
    assert torch.equal(call(backend, inputs), call(backend, replace(inputs, cos=None, sin=None)))


def test_refuses(backend):
    inputs = cases.make_norm_rope(cases.NormRopeCase("errors", index=""), torch.bfloat16)
    x, weight, cos, sin = on(backend, inputs.args)
    (index,) = on(backend, [inputs.kwargs["index"]])
    for args, kwargs, sentence in (
        ((x[..., :12],), {}, "head_dim must be a multiple of 8 up to 256, got 12"),
        ((x.double(),), {}, "x must be float32, float16 or bfloat16, got float64"),
        ((x, weight[:60]), {}, r"weight must be \[64\] or \[192\], got \[60\]"),
        ((x, weight.half()), {}, "weight must be float32 or bfloat16 like x, got float16"),
        ((x, weight.repeat(2)[::2]), {}, "weight must be contiguous, got stride 2"),
        ((x, weight), {"eps": None}, "weight must be None where eps is None"),
        ((x, weight), {"eps": -1.0}, "eps must be at least 0, or None for no norm, got -1"),
        ((x, weight, cos), {}, "cos and sin must both be given or both be None, got cos alone"),
        ((x, weight, cos[0], sin[0]), {}, r"cos must be \[1 or 1, 3 or 1, R, 64 or 32\], got \[1, 19, 64\]"),
        ((x, weight, cos, sin[:, :, :5]), {}, "cos and sin must have one shape and dtype"),
        ((x, weight, cos, sin.bfloat16()), {}, "cos and sin must have one shape and dtype"),
        ((x, weight, cos.half(), sin.half()), {}, "cos must be float32 or bfloat16 like x, got float16"),
        ((x, weight, cos, sin), {"rope_start": 1}, "19 rows of cos and sin must lie inside the 19 tokens"),
        ((x, weight, cos, sin), {"rope_start": -1}, "must lie inside the 19 tokens, got rope_start -1"),
        ((x,), {"index": index[..., :9]}, "index must have one entry for each of the 19 tokens, got 9"),
        ((x,), {"index": index.long()}, "index must be int32, got int64"),
        ((x,), {"index": index.expand(1, 2, 19)}, r"index must begin with \[1 or 1, 3 or 1\]"),
    ):
        with pytest.raises(RuntimeError, match=f"rms_norm_rope: .*{sentence}"):
            backend.ops.rms_norm_rope(*args, **kwargs)
    if backend.name == "cuda":
        return
    with pytest.raises(RuntimeError, match="rms_norm_rope: index must be a permutation, got 3 twice"):
        backend.ops.rms_norm_rope(x, index=torch.full_like(index, 3))
    with pytest.raises(RuntimeError, match=r"rms_norm_rope: index must be in 0..18, got 1?\d\d at position"):
        backend.ops.rms_norm_rope(x, index=index + 19)


@pytest.mark.parametrize("lead", [(1, 1), (1, 3)], ids=["shared", "per_head"])
def test_unchecked_indices_harm_no_other_row(backend, lead):
    if backend.name != "cuda":
        pytest.skip("what indices hold is checked here")
    inputs = cases.make_norm_rope(cases.NormRopeCase("bad"), torch.bfloat16)
    index = torch.arange(19, dtype=torch.int32).expand(*lead, 19).clone()
    clean = call(backend, replace(inputs, kwargs=inputs.kwargs | {"index": index}))
    index[..., 5], index[..., 6] = -7, 2**30
    out = call(backend, replace(inputs, kwargs=inputs.kwargs | {"index": index}))
    others = [i for i in range(19) if i not in (5, 6)]
    assert torch.equal(out[:, :, others], clean[:, :, others])


# --- registration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [cases.models[1], cases.permuted[0], cases.permuted[3]], ids=str)
def test_opcheck(case):
    inputs = cases.make_norm_rope(case, torch.bfloat16)
    torch.library.opcheck(torch.ops.vdit.rms_norm_rope.default, inputs.args, inputs.kwargs)


@pytest.mark.parametrize("asks", ["x", "weight", "cos"])
def test_gradients_are_refused_whoever_asks(asks):
    inputs = cases.make_norm_rope(cases.NormRopeCase("gradients"), torch.float32)
    named = dict(zip(("x", "weight", "cos", "sin"), inputs.args, strict=True))
    named[asks].requires_grad_()
    out = torch.ops.vdit.rms_norm_rope(**named)
    assert out.requires_grad
    with pytest.raises(RuntimeError, match="rms_norm_rope: it has no backward yet"):
        out.sum().backward()
    with torch.no_grad():
        assert torch.equal(torch.ops.vdit.rms_norm_rope(**named), out)


# --- against the models -------------------------------------------------------------------------------------


def angles(tokens: int, dim: int, seed: int = 3):
    """cos and sin ``[S, D]``, every value twice, as diffusers' ``get_1d_rotary_pos_embed`` gives them."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    return get_1d_rotary_pos_embed(dim, torch.rand(tokens, generator=generator(seed)) * 90, use_real=True)


def assert_rounding_only(got, upstream, exact, dtype, roundings: int):
    """Both lie around the exact value: ours within one rounding, upstream within its several."""
    bound = (HALF_ULP[dtype] * 1.5 + 1e-6) * float(exact.abs().max())
    assert float((got.double() - exact).abs().max()) <= bound
    assert float((upstream.double() - exact).abs().max()) <= roundings * bound
    assert float((got.double() - upstream.double()).abs().max()) <= (roundings + 1) * bound


@pytest.mark.parametrize("dtype", FLOATS, ids=FLOAT_IDS)
def test_wan_form(backend, dtype, monkeypatch):
    """What WanAttnProcessor hands to attention, taken where it does so."""
    pytest.importorskip("diffusers")
    from diffusers.models.transformers import transformer_wan as wan

    torch.manual_seed(0)
    attn = wan.WanAttention(dim=256, heads=4, dim_head=64, eps=1e-6, processor=wan.WanAttnProcessor()).to(dtype)
    nn.init.normal_(attn.norm_q.weight, 1.0, 0.3)
    handed = []
    monkeypatch.setattr(
        wan, "dispatch_attention_fn", lambda q, k, v, **kwargs: handed.append((q, k)) or torch.zeros_like(q)
    )
    hidden = torch.randn(2, 30, 256, generator=generator(1)).to(dtype)
    rope = wan.WanRotaryPosEmbed(64, (1, 2, 2), 32)(torch.zeros(2, 4, 3, 4, 10))
    with torch.no_grad():
        attn(hidden, rotary_emb=rope)
        x = attn.to_q(hidden).unflatten(2, (4, -1)).transpose(1, 2)
        args = x, attn.norm_q.weight.detach(), *(t.transpose(1, 2) for t in rope)
        out = backend.ops.rms_norm_rope(*on(backend, args), across_heads=True, eps=attn.norm_q.eps)
        exact = defs.rms_norm_rope_naive(x.double(), *args[1:], across_heads=True, eps=attn.norm_q.eps)
    # The norm rounds twice, the rotation three times.
    assert_rounding_only(out.cpu(), handed[0][0].transpose(1, 2), exact, dtype, 5)


@pytest.mark.parametrize("dtype", FLOATS, ids=FLOAT_IDS)
def test_hunyuan_form(backend, dtype):
    """Single-stream blocks: video, then text that is not rotated."""
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.normalization import RMSNorm

    norm = RMSNorm(64, eps=1e-6).to(dtype)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    x = torch.randn(2, 30, 3, 64, generator=generator(1)).to(dtype)  # [b, s, h, d]
    tables = angles(24, 64)
    with torch.no_grad():
        y = norm(x)
        upstream = torch.cat([apply_rotary_emb(y[:, :24], tables, sequence_dim=1), y[:, 24:]], 1)
        args = x.transpose(1, 2), norm.weight.detach(), *(t[None, None] for t in tables)
        out = backend.ops.rms_norm_rope(*on(backend, args))
        exact = defs.rms_norm_rope_naive(args[0].double(), *args[1:])
    assert_rounding_only(out.cpu(), upstream.transpose(1, 2), exact, dtype, 4)


@pytest.mark.parametrize("dtype", FLOATS, ids=FLOAT_IDS)
@pytest.mark.parametrize("form", ["cogvideox", "halves", "ltx"])
def test_other_rotary_forms(backend, form, dtype):
    """Rotation alone rounds once upstream too."""
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_ltx import apply_rotary_emb as apply_ltx

    x = torch.randn(2, 3, 30, 64, generator=generator(1)).to(dtype)
    if form == "cogvideox":  # text first
        tables = angles(24, 64)
        upstream = torch.cat([x[:, :, :6], apply_rotary_emb(x[:, :, 6:], tables)], 2)
        tables, kwargs = [t[None, None] for t in tables], {"rope_start": 6}
    elif form == "halves":
        angle = torch.rand(30, 32, generator=generator(2)) * 90
        tables = [torch.cat([t, t], -1) for t in (angle.cos(), angle.sin())]
        upstream = apply_rotary_emb(x, tables, use_real_unbind_dim=-2)
        tables, kwargs = [t[None, None] for t in tables], {"interleaved": False}
    else:  # before the split into heads, so that every head has angles of its own
        flat = [t[None] for t in angles(30, 3 * 64)]
        upstream = apply_ltx(x.transpose(1, 2).flatten(2), flat).unflatten(2, (3, 64)).transpose(1, 2)
        tables, kwargs = [t.unflatten(2, (3, 64)).transpose(1, 2) for t in flat], {}
    out = backend.ops.rms_norm_rope(*on(backend, (x, None, *tables)), eps=None, **kwargs)
    assert_close(out, upstream, tolerance=2 * HALF_ULP[dtype] + 1e-6)


def test_wrapper_names_every_argument():
    inputs = cases.make_norm_rope(cases.permuted[2], torch.bfloat16)
    assert torch.equal(
        ops.rms_norm_rope(*inputs.args, **inputs.kwargs),
        torch.ops.vdit.rms_norm_rope(*inputs.args, **inputs.kwargs),
    )
