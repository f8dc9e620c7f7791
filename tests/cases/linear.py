"""Shared cases of the linear family: what is timed (bench/) is what is checked here."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vdit_ext.ops import linear as defs
from vdit_ext.testing import generator

FORMATS = ("int8", "int4", "nibble_planes", "log4", "log3")
OPS = {
    "int8": "w8a8_linear",
    "int4": "w4a8_linear",
    "nibble_planes": "w4a8_linear",
    "log4": "log4a8_linear",
    "log3": "log4a8_linear",
}


# --- quantize_rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowsCase:
    """One call of quantize_rows.

    Attributes:
        name: what is awkward about it.
        shape: of x, [M, K] or [B, S, K].
        layout: "dense", "sliced" (a view into a fused projection), "unaligned" (rows at odd addresses), "swapped"
            (a [S, B, K] tensor seen as [B, S, K]).
        norm: fp32 weight and bias of the layer norm.
        modulation: None, or which of the leading dimensions its tensors have: "" (one row for all), "b", "s", "bs".
        own_dtype: modulation in x's dtype instead of fp32.
        rows: "normal", "large_mean" (100 standard deviations off, which a naive variance does not survive), "zero"
            (some rows), "one_sign", "tiny" (fp32 magnitudes around 1e-20), "spike" (one channel holds all).
    """

    name: str
    shape: tuple[int, ...] = (7, 96)
    layout: str = "dense"
    prologue: str = "none"
    norm: bool = False
    modulation: str | None = None
    own_dtype: bool = False
    channel_scale: bool = False
    hadamard: int = 0
    signs: bool = False
    bits: int = 8
    eps: float = 1e-6
    rows: str = "normal"

    def __str__(self) -> str:
        return self.name


@dataclass
class RowsInputs:
    """Tensors of a case, ready for the op: ``op(x, **kwargs)``."""

    x: Tensor
    kwargs: dict = field(default_factory=dict)

    @property
    def transform(self) -> dict:
        """The arguments that say what is quantized, without those that say how."""
        return {name: value for name, value in self.kwargs.items() if name != "bits"}


def _make_x(case: RowsCase, gen: torch.Generator, dtype: torch.dtype) -> Tensor:
    *lead, k = case.shape
    if case.layout == "swapped":
        return torch.randn(lead[1], lead[0], k, generator=gen).to(dtype).transpose(0, 1)
    if case.layout == "dense":
        return torch.randn(case.shape, generator=gen).to(dtype)
    slack = 1 if case.layout == "unaligned" else 0
    fused = torch.randn(*lead, 3 * k + slack, generator=gen).to(dtype)
    return fused[..., k + slack : 2 * k + slack]


def _shape_rows(case: RowsCase, x: Tensor) -> None:
    if case.rows == "large_mean":
        x += 100
    elif case.rows == "zero":
        x[..., ::2, :] = 0
    elif case.rows == "one_sign":
        x.abs_()
        x[..., 1::2, :] *= -1
    elif case.rows == "tiny":
        x *= 1e-20
    elif case.rows == "spike":
        x *= 1e-4
        x[..., -1] = 3.0


def make_rows(case: RowsCase, dtype: torch.dtype, seed: int = 0) -> RowsInputs:
    """Inputs of a case on the CPU, the same for every backend."""
    gen = generator(seed)
    x = _make_x(case, gen, dtype)
    _shape_rows(case, x)
    k = case.shape[-1]
    kwargs: dict = {"prologue": case.prologue, "bits": case.bits, "eps": case.eps, "hadamard": case.hadamard}
    if case.norm:
        kwargs["norm_weight"] = 1 + 0.3 * torch.randn(k, generator=gen)
        kwargs["norm_bias"] = 0.2 * torch.randn(k, generator=gen)
    if case.modulation is not None:
        own = dtype if case.own_dtype else torch.float32
        lead = [size if name in case.modulation else 1 for name, size in zip("bs", case.shape, strict=False)]
        if len(case.shape) == 2:
            lead = [case.shape[0] if "s" in case.modulation else 1]
        kwargs["modulation_scale"] = (0.4 * torch.randn(*lead, k, generator=gen)).to(own)
        kwargs["shift"] = (0.4 * torch.randn(*lead, k, generator=gen)).to(own)
    if case.channel_scale:
        kwargs["channel_scale"] = torch.exp(torch.randn(k, generator=gen))
    if case.signs:
        kwargs["signs"] = torch.randint(0, 2, (k,), generator=gen).float() * 2 - 1
    return RowsInputs(x, kwargs)


plain_rows = [
    RowsCase("one_row", (1, 32)),
    RowsCase("ragged", (5, 77)),
    RowsCase("k_one", (3, 1)),
    RowsCase("k_130", (4, 130)),
    RowsCase("batched", (2, 5, 64)),
    RowsCase("sliced", (2, 5, 48), layout="sliced"),
    RowsCase("unaligned", (6, 40), layout="unaligned"),
    RowsCase("swapped", (3, 4, 64), layout="swapped"),
    RowsCase("zero_rows", (6, 33), rows="zero"),
    RowsCase("one_sign", (4, 128), rows="one_sign"),
    RowsCase("spike", (3, 256), rows="spike"),
    RowsCase("four_bits", (5, 64), bits=4),
    RowsCase("two_bits", (5, 64), bits=2),
    RowsCase("six_bits", (5, 50), bits=6),
    RowsCase("scaled", (5, 96), channel_scale=True),
    RowsCase("long", (2, 13824)),
]
transformed_rows = [
    RowsCase("norm", (5, 96), prologue="layer_norm"),
    RowsCase("norm_affine", (5, 77), prologue="layer_norm", norm=True),
    RowsCase("norm_large_mean", (4, 128), prologue="layer_norm", rows="large_mean"),
    RowsCase("norm_modulated", (2, 4, 64), prologue="layer_norm", modulation="b"),
    RowsCase(
        "norm_modulated_tokens", (2, 4, 64), prologue="layer_norm", modulation="bs", norm=True, own_dtype=True
    ),
    RowsCase("norm_modulated_flat", (4, 80), prologue="layer_norm", modulation="s"),
    RowsCase("norm_modulated_once", (2, 3, 48), prologue="layer_norm", modulation="", own_dtype=True, eps=1e-5),
    RowsCase("norm_zero_rows", (4, 64), prologue="layer_norm", rows="zero"),
    RowsCase("gelu", (5, 96), prologue="gelu"),
    RowsCase("gelu_tanh", (5, 77), prologue="gelu_tanh"),
    RowsCase("gelu_one_sign", (4, 64), prologue="gelu", rows="one_sign"),
    RowsCase("hadamard_16", (4, 80), hadamard=16),
    RowsCase("hadamard_32", (4, 96), hadamard=32, signs=True),
    RowsCase("hadamard_64", (3, 192), hadamard=64, channel_scale=True),
    RowsCase("hadamard_128", (4, 256), hadamard=128, signs=True, channel_scale=True),
    RowsCase("hadamard_one_sign", (4, 128), hadamard=128, rows="one_sign"),
    RowsCase("hadamard_spike", (3, 256), hadamard=128, signs=True, rows="spike"),
    RowsCase(
        "vidit_q_block",
        (2, 3, 256),
        prologue="layer_norm",
        modulation="b",
        channel_scale=True,
        hadamard=128,
        signs=True,
        own_dtype=True,
    ),
    RowsCase(
        "vidit_q_ffn", (3, 640), prologue="gelu_tanh", channel_scale=True, hadamard=128, signs=True, bits=6
    ),
    RowsCase("sliced_all", (2, 3, 128), layout="sliced", prologue="layer_norm", norm=True, hadamard=64),
]
every_rows = plain_rows + transformed_rows


# --- linears ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearCase:
    """One product.

    Attributes:
        name: what is awkward about it.
        lead: [M] or [B, S].
        k, n: input and output channels.
        codes: "random" (any int8 of x and any code of the weight), "extreme" (the largest magnitudes there are, of
            one sign, so that sums reach their bounds), "alternating" (extreme, signs in turn), "zero" (of x).
        layout: of x: "dense", "strided" (rows further apart than K), "swapped" (a [S, B, K] tensor).
        zero, bias: whether there are zero points (int8; the 4-bit formats always have them) and a bias.
        gate: None, or which leading dimensions it has: "", "b", "s", "bs".
        residual: None, "dense" or "strided".
    """

    name: str
    lead: tuple[int, ...]
    k: int
    n: int
    codes: str = "random"
    layout: str = "dense"
    zero: bool = False
    bias: bool = False
    gate: str | None = None
    gate_dtype: torch.dtype = torch.float32
    residual: str | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def cuda(self) -> bool:
        """Whether the CUDA kernels take it."""
        return self.k % 16 == 0


@dataclass
class LinearInputs:
    """Tensors of a case, ready for the op of its format: ``op(*args, **kwargs)``."""

    op: str
    args: tuple[Tensor, ...]
    kwargs: dict = field(default_factory=dict)

    @property
    def naive(self):
        return getattr(defs, self.op + "_naive")

    def raw(self) -> LinearInputs:
        """The same product without its epilogue."""
        kept = {k: v for k, v in self.kwargs.items() if k in ("weight_low", "x_sum")}
        return LinearInputs(self.op, self.args, kept | {"out_dtype": torch.int32})


def _draw(shape, low: int, high: int, kind: str, gen: torch.Generator) -> Tensor:
    """Integers in [low, high]."""
    if kind == "random":
        return torch.randint(low, high + 1, shape, generator=gen)
    largest = torch.full(shape, low if -low > high else high)
    if kind == "alternating":
        largest[..., 1::2] = high if -low > high else low
    return largest


def _make_codes(case: LinearCase, gen: torch.Generator) -> Tensor:
    k = case.k
    if case.codes == "zero":
        return torch.zeros(*case.lead, k, dtype=torch.int8)
    if case.layout == "swapped":
        return _draw((case.lead[1], case.lead[0], k), -128, 127, case.codes, gen).to(torch.int8).transpose(0, 1)
    width = k if case.layout == "dense" else (k + 15) // 16 * 16 + 32
    return _draw((*case.lead, width), -128, 127, case.codes, gen).to(torch.int8)[..., :k]


def make_weight_codes(case: LinearCase, format: str, gen: torch.Generator) -> tuple[Tensor, ...]:
    """The weight tensors of a format, drawn: (weight,), (weight, low plane) or (weight, table)."""
    n, k = case.n, case.k
    if format == "int8":
        return (_draw((n, k), -128, 127, case.codes, gen).to(torch.int8),)
    high = _draw((n, k), 0, 7 if format == "log3" else 15, case.codes, gen).to(torch.uint8)
    if format == "int4":
        return (defs.pack_w4(high),)
    if format == "nibble_planes":
        return defs.pack_w4(high), defs.pack_w4(_draw((n, k), 0, 15, case.codes, gen).to(torch.uint8))
    return defs.pack_log4(high), _draw((n, 8 if format == "log3" else 16), -128, 127, case.codes, gen).to(
        torch.int8
    )


def make_linear(
    case: LinearCase, format: str, out_dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> LinearInputs:
    """Inputs of a case on the CPU, the same for every backend."""
    gen = generator(seed)
    n, lead = case.n, case.lead
    x = _make_codes(case, gen)
    weights = make_weight_codes(case, format, gen)
    x_scale = torch.rand(lead, generator=gen) * 0.02 + 0.001
    x_sum = x.sum(-1, dtype=torch.int32)
    scale = torch.rand(n, generator=gen) * 0.02 + 0.001
    zero = -8 * (1 + torch.rand(n, generator=gen))
    kwargs: dict = {"out_dtype": out_dtype}
    if case.bias:
        kwargs["bias"] = torch.randn(n, generator=gen)
    if case.gate is not None:
        dims = [size if name in case.gate else 1 for name, size in zip("bs"[-len(lead) :], lead, strict=True)]
        kwargs["gate"] = torch.randn(*dims, n, generator=gen).to(case.gate_dtype)
    if case.residual is not None:
        wide = torch.randn(*lead, n + (8 if case.residual == "strided" else 0), generator=gen).to(out_dtype)
        kwargs["residual"] = wide[..., :n]
    if format == "int8":
        if case.zero:
            kwargs |= {"x_sum": x_sum, "weight_zero": zero}
        return LinearInputs(OPS[format], (x, x_scale, *weights, scale), kwargs)
    if format in ("int4", "nibble_planes"):
        if format == "nibble_planes":
            kwargs["weight_low"] = weights[1]
            zero = 16 * zero
        return LinearInputs(OPS[format], (x, x_scale, x_sum, weights[0], scale, zero), kwargs)
    return LinearInputs(OPS[format], (x, x_scale, *weights, scale), kwargs)


corner = [
    LinearCase("one", (1,), 16, 1),
    LinearCase("one_row", (1,), 192, 96, bias=True),
    LinearCase("few_rows", (5,), 160, 40),
    LinearCase("seventeen_rows", (17,), 64, 33),
    LinearCase("ragged_n", (19,), 128, 77, bias=True),
    LinearCase("ragged_k", (7,), 208, 64),
    LinearCase("k_16", (130,), 16, 130),
    LinearCase("strided", (9,), 96, 32, layout="strided"),
    LinearCase("two_batches", (2, 11), 64, 48, bias=True, gate="b"),
    LinearCase("swapped", (3, 4), 64, 40, layout="swapped", residual="dense"),
    LinearCase("zero_x", (3,), 64, 32, codes="zero", bias=True),
    LinearCase("alternating", (3,), 256, 33, codes="alternating"),
]
odd_k = [
    LinearCase("k_1", (3,), 1, 5),
    LinearCase("k_7", (3,), 7, 40),
    LinearCase("k_50", (2, 3), 50, 33, bias=True, zero=True),
    LinearCase("k_131", (13,), 131, 65),
]
extreme = [
    LinearCase("k_13824", (2,), 13824, 33, codes="extreme"),
    LinearCase("k_65536", (1,), 65536, 16, codes="extreme"),
]
epilogues = [
    LinearCase("zero", (6,), 64, 40, zero=True),
    LinearCase("bias", (6,), 64, 40, bias=True),
    LinearCase("gate_once", (2, 5), 48, 33, gate=""),
    LinearCase("gate_batch", (2, 5), 48, 33, gate="b", gate_dtype=torch.bfloat16),
    LinearCase("gate_token", (2, 5), 48, 33, gate="s", gate_dtype=torch.float16),
    LinearCase("gate_all", (2, 5), 48, 33, gate="bs"),
    LinearCase("gate_flat", (5,), 48, 33, gate="s"),
    LinearCase("residual", (6,), 64, 40, residual="dense"),
    LinearCase("residual_strided", (2, 3), 64, 40, residual="strided"),
    LinearCase("all", (2, 9), 96, 70, zero=True, bias=True, gate="b", residual="strided"),
    LinearCase("all_flat", (21,), 96, 70, zero=True, bias=True, gate="s", residual="dense"),
]
# Tiles and panels of every kernel, whole and in part.
blocks = [
    LinearCase("tile", (64,), 128, 64),
    LinearCase("tiles", (129,), 272, 161, bias=True, zero=True),
]
every = corner + epilogues + blocks
on_cpu_only = odd_k


# --- sizes to time ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearSize:
    """A linear layer on so many rows, in bf16."""

    name: str
    m: int
    k: int
    n: int

    def __str__(self) -> str:
        return self.name


# What the CPU figures are promised for: the square layers of Wan2.1-1.3B and -14B.
squares = [LinearSize("square_1536", 4096, 1536, 1536), LinearSize("square_5120", 4096, 5120, 5120)]
# Layers at the lengths of whole videos, and one of an image model.
real = [
    LinearSize("hunyuan_linear1", 119056, 3072, 21504),
    LinearSize("hunyuan_linear2", 119056, 15360, 3072),
    LinearSize("wan14b_qkv", 75600, 5120, 5120),
    LinearSize("wan14b_ffn_up", 75600, 5120, 13824),
    LinearSize("wan14b_ffn_down", 75600, 13824, 5120),
    LinearSize("cogvideox_ffn_up", 45106, 3072, 12288),
    LinearSize("dit_xl2_ffn_up", 8192, 1152, 4608),
]
few_rows = [LinearSize(f"wan14b_m{m}", m, 5120, 5120) for m in (1, 16, 128)]
sizes = {size.name: size for size in squares + real + few_rows}
