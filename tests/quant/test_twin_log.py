"""Twin-log quantization: what section 9 of LRQ-DiT's specification asks of it, by line, then modes and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases.weights import KINDS, snr, uniform_min_max, uniform_mse_clip, weight_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from vdit_ext import ops
from vdit_ext.quant import twin_log
from vdit_ext.quant.twin_log import TwinLog, fit, pack_planes, unpack_planes

BITS = (3, 4)


@pytest.fixture(scope="module", params=[(kind, bits) for kind in KINDS for bits in BITS], ids=str)
def fitted(request) -> tuple[torch.Tensor, TwinLog]:
    kind, bits = request.param
    weight = weight_rows(kind, 32)
    return weight, fit(weight, bits)


def sides_of(weight: torch.Tensor, form: TwinLog):
    """For the entries of each sign: magnitudes, their codes c, and shift, low, step and table ``[levels]`` of each."""
    c = (form.codes & (1 << form.sign_shift) - 1).long()
    row = torch.arange(len(weight))[:, None].expand_as(weight)
    for side, (member, table) in enumerate([(weight > 0, form.positive), (weight < 0, form.negative)]):
        grids = (grid[row[member], side] for grid in (form.shift, form.low, form.step))
        yield weight[member].abs().double(), c[member], *grids, table[row[member]].double()


# ---------------------------------------------------------------------------------------------------------
# Section 9
# ---------------------------------------------------------------------------------------------------------


def test_lrq_dit_09_01_exactly_b_bits(fitted):
    """Codes use exactly b bits."""
    weight, form = fitted
    assert form.codes.dtype == torch.uint8 and torch.equal(form.codes.unique(), torch.arange(2**form.bits))
    assert torch.equal((form.codes >> form.bits - 1).bool(), weight < 0)
    assert form.table().shape == (len(weight), 2**form.bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(32, 32), (1, 1), (33, 70), (64, 128)])
def test_lrq_dit_09_01_packing_round_trip(bits, shape):
    """Pack/unpack identity, both layouts."""
    codes = torch.randint(2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tiles = ops.pack_log4(codes)
    assert tiles.shape == (-(-shape[0] // 32), -(-shape[1] // 32), 512)
    assert torch.equal(ops.unpack_log4(tiles, *shape), codes)
    if bits == 3:
        planes = pack_planes(codes)
        assert planes.shape == (shape[0], -(-shape[1] // 32), 3) and planes.dtype == torch.int32
        assert torch.equal(unpack_planes(planes, shape[1]), codes)


def test_lrq_dit_09_01_planes_at_all_positions():
    """3-bit plane round trip for all 8 codes at all positions: each code alone among zeros, and among sevens."""
    place = torch.arange(32)
    for code in range(8):
        for other in (0, 7):
            codes = torch.full((32, 32), other, dtype=torch.uint8)
            codes[place, place] = code
            planes = pack_planes(codes)
            assert torch.equal(unpack_planes(planes, 32), codes)
            words = planes[:, 0].long() & 0xFFFFFFFF
            low = words[place, place // 16] >> 2 * (place % 16) & 3
            high = words[:, 2] >> place & 1
            assert (low + 4 * high == code).all(), "the layout that the docstring gives"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("power", [-20, -3, 1, 40])
def test_lrq_dit_09_02_scale_equivariance(bits, power):
    """Codes of tlq(2^j W) equal those of tlq(W); tables scale by 2^j."""
    weight = weight_rows("student t4", 16)
    form, scaled = fit(weight, bits), fit(weight * 2.0**power, bits)
    assert torch.equal(form.codes, scaled.codes)
    assert torch.equal(form.table(), scaled.table())
    for name in ("positive", "negative", "sigma"):
        torch.testing.assert_close(
            getattr(scaled, name), getattr(form, name) * 2.0**power, rtol=1e-6, atol=1e-9 * 2.0**power
        )


@pytest.mark.parametrize("bits", BITS)
def test_lrq_dit_09_02_sign_symmetry(bits):
    """tlq(-W) swaps tables and flips sign bits."""
    weight = weight_rows("laplace", 16)
    form, mirrored = fit(weight, bits), fit(-weight, bits)
    assert torch.equal(mirrored.codes, form.codes ^ 1 << bits - 1)
    assert torch.equal(mirrored.positive, form.negative) and torch.equal(mirrored.negative, form.positive)


def test_lrq_dit_09_03_magnitudes_increase(fitted):
    """Magnitudes strictly increase with c and are at least 0; log spacing of magnitude + shift is constant to 1e-6."""
    _, form = fitted
    for side, table in enumerate([form.positive, form.negative]):
        assert (table >= 0).all() and (table.diff(dim=1) > 0).all()
        inside = table[:, 0] > 0  # a grid that begins below 0 is clamped there
        spacing = (table.double() + form.shift[:, side, None]).log2().diff(dim=1)
        assert (spacing - form.step[:, side, None])[inside].abs().max() < 1e-6
        assert (spacing - form.step[:, side, None])[:, 1:].abs().max() < 1e-6


def test_lrq_dit_09_04_nearest_in_the_log_domain(fitted):
    """The nearest grid point in the log domain; error at most 2^(step/2) - 1 of (|w| + shift) inside [lo, hi]."""
    weight, form = fitted
    levels = torch.arange(2 ** (form.bits - 1), dtype=torch.float64)
    for magnitude, c, shift, low, step, table in sides_of(weight, form):
        log = (magnitude + shift).log2()
        distance = (log[:, None] - low[:, None] - step[:, None] * levels).abs()
        chosen = distance.gather(1, c[:, None])[:, 0]
        assert (chosen <= distance.amin(1) + 1e-12).all()
        inside = (log >= low) & (log <= low + step * levels[-1])
        error = (table.gather(1, c[:, None])[:, 0] - magnitude).abs()
        bound = ((step / 2).exp2() - 1) * (magnitude + shift)
        assert inside.float().mean() > 0.5 and (error <= bound * (1 + 1e-6))[inside].all()


@pytest.mark.parametrize("kind, floors", [("gauss .03", (14.2, 19.9)), ("gauss .3", (14.2, 19.9))])
def test_lrq_dit_09_05_gaussian_floor(kind, floors):
    """SNR of Gaussian rows at least 14.2/19.9 dB and at least 2.0 dB above uniform min-max."""
    weight = weight_rows(kind)
    for bits, floor in zip(BITS, floors, strict=True):
        got = snr(weight, fit(weight, bits).dequantize())
        assert got >= floor and got >= snr(weight, uniform_min_max(weight, bits)) + 2.0


@pytest.mark.parametrize("bits", BITS)
def test_lrq_dit_09_05_heavy_tails(bits):
    """Student t4: at least 5.0 dB above min-max."""
    weight = weight_rows("student t4")
    assert snr(weight, fit(weight, bits).dequantize()) >= snr(weight, uniform_min_max(weight, bits)) + 5.0


def test_lrq_dit_09_05_never_below_clipped_uniform(fitted):
    """Never below MSE-clipped uniform by more than 0.1 dB."""
    weight, form = fitted
    assert snr(weight, form.dequantize()) >= snr(weight, uniform_mse_clip(weight, form.bits)) - 0.1


@pytest.mark.parametrize("kind", ["gauss .03", "gauss .3"])
def test_lrq_dit_09_05_paper_mode_is_below_uniform(kind):
    """`paper` mode on Gaussian 3-bit must be below uniform."""
    weight = weight_rows(kind, 32)
    assert snr(weight, fit(weight, 3, "paper").dequantize()) < snr(weight, uniform_min_max(weight, 3))


def test_lrq_dit_09_06_int8_tables(fitted):
    """int8-table dequantization within 0.1 dB of fp32 tables."""
    weight, form = fitted
    assert abs(snr(weight, form.dequantize_int8()) - snr(weight, form.dequantize())) < 0.1
    assert torch.equal(form.table().abs().amax(1), torch.full((len(weight),), 127, dtype=torch.int8))


def byte_permute(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """What PRMT does: byte i of the result is the byte of {high, low} that nibble i names, or, with the nibble's
    top bit set, that byte's sign in all bits."""
    pool = np.stack([word >> 8 * i & 0xFF for word in (low, high) for i in range(4)], -1)
    result = np.zeros_like(selector)
    for i in range(4):
        nibble = selector >> 4 * i & 0xF
        byte = np.take_along_axis(pool, (nibble & 7)[..., None], -1)[..., 0]
        byte = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        result |= byte << 8 * i
    return result


def look_up(words: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Codes to int8 values by byte permutes, as the CUDA kernels do it.

    words: int64 ``[...]``, four codes each. table: int8 ``[..., 8 or 16]``. Returns int8 ``[..., 4]``.
    """
    registers = np.moveaxis(np.ascontiguousarray(table).view("<u4").astype(np.int64), -1, 0)
    parts = [np.broadcast_to(part, words.shape) for part in registers]
    got = byte_permute(parts[0], parts[1], words & 0x7777)
    if len(parts) == 4:
        negative = byte_permute(parts[2], parts[3], words & 0x7777)
        got = byte_permute(got, negative, (words & 0x8888) >> 1 | 0x3210)
    return got.astype("<u4")[..., None].view(np.int8)


@pytest.mark.parametrize("bits", BITS)
def test_lrq_dit_09_06_byte_permutes_equal_the_table(bits):
    """The PRMT emulator equals table indexing for all 65,536 four-code words."""
    table = fit(weight_rows("student t4", 1, seed=3), bits).table()[0].numpy()
    words = np.arange(1 << 16)
    codes = words[:, None] >> np.arange(0, 16, 4) & 2**bits - 1
    assert np.array_equal(look_up(words, table), table[codes])


@pytest.mark.parametrize("bits", BITS)
def test_lrq_dit_09_06_packed_words_are_selectors(bits):
    """A 16-bit word of a packed tile holds four adjacent columns of one row, so it selects from that row's table."""
    form = fit(weight_rows("gauss .03", 32, 32), bits)
    words = ops.pack_log4(form.codes)[0, 0].numpy().view("<u2").reshape(32, 8).astype(np.int64)
    lane, h = np.arange(32)[:, None], np.arange(8)[None]
    row, column = 8 * (h // 2) + lane // 4, 16 * (h % 2) + 4 * (lane % 4)
    wanted = form.table().gather(1, form.codes.long()).numpy()
    got = look_up(words, form.table().numpy()[row])
    assert np.array_equal(got, wanted[row[..., None], column[..., None] + np.arange(4)])


SPECIAL = {
    "zeros": torch.zeros(3, 40),
    "only positive": weight_rows("gauss .03", 3, 40).abs(),
    "only negative": -weight_rows("gauss .03", 3, 40).abs(),
    "single value": torch.full((3, 40), 0.7),
    "single negative value": torch.full((3, 40), -0.7),
    "one column": torch.tensor([[0.3], [-2.0], [0.0]]),
    "one entry among zeros": torch.eye(3, 40),
    "denormals": weight_rows("gauss .03", 3, 40) * 1e-38,
    "least denormal": torch.full((3, 40), 1e-45),
    "largest": torch.full((3, 40), 3e38),
    "wide": torch.logspace(-37, 37, 40).expand(3, 40) * torch.tensor([1.0, -1.0]).repeat(20),
    "mixed with zero rows": torch.cat([weight_rows("gauss .03", 2, 40), torch.zeros(1, 40)]),
}


@pytest.mark.parametrize("mode", twin_log.MODES)
@pytest.mark.parametrize("name", SPECIAL)
def test_lrq_dit_09_10_no_nan(name, mode):
    """Zero rows, one-sign rows, single-value rows produce no NaN."""
    weight = SPECIAL[name]
    for bits in BITS:
        form = fit(weight, bits, mode)
        got = form.dequantize()
        assert got.isfinite().all() and form.positive.isfinite().all() and form.negative.isfinite().all()
        if mode != "released":
            assert form.dequantize_int8().isfinite().all()
        if mode == "corrected":
            assert (got[weight == 0] == 0).all() and (got * weight >= 0).all()
        if mode == "corrected" and ("zeros" in name or name.startswith(("single", "one", "least", "largest"))):
            torch.testing.assert_close(got, weight, rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------------------
# Beyond it
# ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=True) | st.just(0.0), min_size=6, max_size=6),
        min_size=1,
        max_size=4,
    ),
    bits=st.sampled_from(BITS),
)
def test_any_row_is_finite_and_no_worse_than_its_largest_entry(rows, bits):
    weight = torch.tensor(rows, dtype=torch.float32)
    form = fit(weight, bits)
    got = form.dequantize()
    assert int(form.codes.max()) < 2**bits
    assert (got.abs() <= weight.abs().amax(1, keepdim=True) * (1 + 1e-6)).all()
    error = (got - weight).double().square().sum(1)
    assert (error <= weight.double().square().sum(1) * (1 + 1e-6)).all()


def brute_force_error(weight: torch.Tensor, bits: int, grid: str) -> float:
    """Least squared error of one row's positive entries over the whole grid of candidates, by going through it."""
    largest = weight.abs().max().double()
    u = (weight[weight > 0].double() / largest).sort().values
    levels, least = 2 ** (bits - 1), float("inf")
    for shift in twin_log.SHIFTS[grid]:
        for upper in twin_log.UPPER:
            for lower in twin_log.LOWER:
                low, high = ((u[round(p * (len(u) - 1))] + shift).log2() for p in (lower, upper))
                step = (high - low) / (levels - 1)
                c = (((u + shift).log2() - low) / step).round().clamp(0, levels - 1)
                value = ((low + c * step).exp2() - shift).clamp(min=0)
                least = min(least, float((value - u).square().sum() * largest**2))
    return least


@pytest.mark.parametrize("grid", twin_log.SHIFTS)
@pytest.mark.parametrize("bits", BITS)
def test_search_finds_the_best_of_its_grid(bits, grid):
    weight = weight_rows("student t4", 3, 200, seed=5)
    got = fit(weight, bits, grid=grid).dequantize()
    for row, value in zip(weight, got, strict=True):
        positive = row > 0
        error = float((row - value)[positive].double().square().sum())
        assert error == pytest.approx(brute_force_error(row, bits, grid), rel=1e-5)


def test_zeros_take_the_smaller_lowest_magnitude():
    weight = weight_rows("gauss .03", 8, 64)
    weight[:, ::7] = 0
    for mode in ("corrected", "paper"):
        form = fit(weight, 4, mode)
        lowest = torch.minimum(form.positive[:, :1], form.negative[:, :1]).expand_as(weight)
        assert torch.equal(form.dequantize()[weight == 0].abs(), lowest[weight == 0])
    assert float(fit(weight, 4).dequantize()[weight == 0].abs().max()) < 1e-3


def test_pruned_rows_keep_their_zeros():
    weight = weight_rows("gauss .03", 16)
    weight[weight.abs() < 0.03] = 0
    for bits in BITS:
        got = fit(weight, bits).dequantize()
        assert (got[weight == 0] == 0).all()
        assert snr(weight, got) >= snr(weight, uniform_mse_clip(weight, bits)) - 0.1


def test_chunks_of_rows_change_nothing(monkeypatch):
    weight = weight_rows("laplace", 20, 96)
    for mode in twin_log.MODES:
        whole = fit(weight, 3, mode)
        with monkeypatch.context() as patch:
            patch.setattr(twin_log, "_CHUNK_BYTES", 3 * 96 * 160)
            parts = fit(weight, 3, mode)
        for name in ("codes", "positive", "negative", "shift", "low", "step"):
            assert torch.equal(getattr(whole, name), getattr(parts, name))


def test_half_precision_weights():
    weight = weight_rows("gauss .03", 4).to(torch.bfloat16)
    assert torch.equal(fit(weight, 4).codes, fit(weight.float(), 4).codes)


def released_by_hand(weight: torch.Tensor, bits: int) -> tuple[float, torch.Tensor]:
    """The least error of the released search and its result, going through all combinations on whole rows."""
    weight, levels, best = weight.double(), 2 ** (bits - 1), (float("inf"), torch.empty(0))
    for shift in twin_log.RELEASED_SHIFTS:
        halves = []
        for sign in (1, -1):
            member = sign * weight > 0
            log = torch.where(member, (weight.abs() + shift).log2(), 0.0)
            tried = []
            for upper in twin_log.RELEASED_UPPER:
                low = log.amin(1, keepdim=True)
                high = log.sort(1).values[:, [round(upper * (weight.shape[1] - 1))]]
                step = (high - low) / levels
                zero = (low / step).round()
                q = ((log / step).round() - zero).clamp(0, levels - (sign > 0))
                value = torch.where(member, sign * (((q + zero) * step).exp2() - shift), 0.0)
                tried.append((float((value - weight)[member].square().sum()), value))
            halves.append(min(tried, key=lambda pair: pair[0]))
        error = halves[0][0] + halves[1][0]
        if error < best[0]:
            best = error, halves[0][1] + halves[1][1]
    return best


@pytest.mark.parametrize("kind", ["gauss .03", "gauss .3", "gauss 2"])
def test_released_mode_is_the_authors_search(kind):
    weight = weight_rows(kind, 6, 300)
    for bits in BITS:
        form = fit(weight, bits, "released")
        got = form.dequantize().double()
        error, wanted = released_by_hand(weight, bits)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
        assert float((got - weight).square().sum()) == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize(
    "kind, bits, wanted",
    [
        ("gauss .03", 3, 6.8),
        ("gauss .03", 4, 13.3),
        ("gauss .3", 3, 14.3),
        ("gauss .3", 4, 19.9),
        ("student t4", 3, 7.1),
        ("student t4", 4, 13.5),
        ("laplace", 3, 7.1),
        ("laplace", 4, 13.5),
    ],
)
def test_released_mode_gives_the_figures_of_the_specification(kind, bits, wanted):
    """Table of section 4.3; the released form depends on the weights' scale, as its two Gaussian rows show."""
    weight = weight_rows(kind)
    assert snr(weight, fit(weight, bits, "released").dequantize()) == pytest.approx(wanted, abs=0.3)


def test_released_codes_do_not_fit():
    form = fit(weight_rows("gauss .03", 4, 64), 3, "released")
    assert form.positive.shape[1] == 6 and int(form.codes.max()) > 7
    with pytest.raises(ValueError, match=r"codes of 3 bits, got the 10 levels of mode 'released'; use mode"):
        form.table()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.ones(2, 3), 5), "bits must be 3 or 4, got 5"),
        ((torch.ones(2, 3), 4, "log"), "mode must be one of corrected, paper, released, got 'log'"),
        ((torch.ones(2, 3), 4, "paper", "huge"), "grid must be one of small, full, got 'huge'"),
        (
            (torch.ones(3), 4),
            r"weight must be a floating-point matrix that is not empty, got \[3\] torch.float32",
        ),
        ((torch.ones(2, 0), 4), r"not empty, got \[2, 0\]"),
        ((torch.ones(2, 3, dtype=torch.int8), 4), "got .* torch.int8"),
        (
            (torch.tensor([[1.0], [float("nan")], [float("inf")]]), 4),
            "got NaN or Inf in 2 of 3 rows, first in row 1; repair the checkpoint",
        ),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=f"^twin_log: .*{message}"):
        fit(*arguments)


def test_bad_planes():
    with pytest.raises(
        ValueError, match=r"codes must be a uint8 matrix of 0 to 7, got \[1, 2\] torch.uint8 up to 8"
    ):
        pack_planes(torch.tensor([[8, 0]], dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"planes for 33 columns must be int32 \[N, 2, 3\], got \[1, 1, 3\]"):
        unpack_planes(torch.zeros(1, 1, 3, dtype=torch.int32), 33)
