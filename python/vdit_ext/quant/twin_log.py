"""Twin-log quantization: one uniform grid in log magnitude for each sign of each row.

Source: LRQ-DiT, arXiv 2508.03485. A weight of row n is stored as its sign and a magnitude code c, which
together take exactly ``bits`` bits, and stands for

    magnitude(c) = 2^(low + c * step) - shift

with a grid (low, step, shift) for each row and sign. The shift bends the logarithm towards a straight line
near zero, as mu-law companding does; the published form has none and spends its codes on magnitudes that do not
matter. A row has at most 8 magnitudes a sign, so they are tabulated: products read tables and never see the
formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops

BITS = (3, 4)
MODES = ("corrected", "paper", "released")

# Shifts as shares of the row's largest magnitude, and the quantiles of one sign's magnitudes at which its grid
# may end and begin.
SHIFTS = {"small": (0.05, 0.1, 0.2, 0.4, 0.8), "full": (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.5, 4.0)}
UPPER = (1.0, 0.995, 0.98)
LOWER = (0.0, 0.1, 0.25)

# Of the authors' code: shifts are absolute there, and one shift serves a whole layer.
RELEASED_SHIFTS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
RELEASED_UPPER = (0.98, 0.99, 0.999, 0.9999, 0.99999)

# Rows are fitted in chunks whose temporaries stay below this many bytes.
_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class TwinLog:
    """A matrix in twin-log form, before packing.

    Attributes:
        bits: 3 or 4.
        mode: "corrected", "paper" or "released".
        codes: uint8 ``[O, C]``, ``sign << sign_shift | c`` with sign 1 for negative weights.
        positive, negative: fp32 ``[O, levels]``, the magnitudes of c = 0, 1, ... for either sign. In corrected
            and paper mode there are ``2^(bits-1)`` of them, which increase with c unless the row has a single
            magnitude of that sign. A sign that no weight of a row has gets zeros.
        shift, low, step: fp64 ``[O, 2]``, the grids of the positive and the negative side.
    """

    bits: int
    mode: str
    codes: Tensor
    positive: Tensor
    negative: Tensor
    shift: Tensor
    low: Tensor
    step: Tensor

    @property
    def sign_shift(self) -> int:
        """Where a code's sign bit is: ``bits - 1``, but one higher for the released codes, which do not fit."""
        return self.bits if self.mode == "released" else self.bits - 1

    @property
    def sigma(self) -> Tensor:
        """fp32 ``[O]``: the step of the int8 tables, largest magnitude / 127; 0 for a row of zeros."""
        return torch.maximum(self.positive.amax(1), self.negative.amax(1)) / 127

    def table(self) -> Tensor:
        """int8 ``[O, 2^bits]``, the signed multiple of ``sigma`` that each code stands for.

        Raises:
            ValueError: in released mode, whose levels do not fit ``bits`` bits.
        """
        if self.mode == "released":
            levels = 2 ** (self.bits - 1)
            raise ValueError(
                f"twin_log: a table needs codes of {self.bits} bits, got the {2 * levels + 2} levels of mode "
                "'released'; use mode 'corrected'"
            )
        # In fp64, because the sigma of a row of denormal weights may round to 0.
        both = torch.cat([self.positive, -self.negative], 1).double()
        largest = both.abs().amax(1, keepdim=True)
        return (both * 127 / torch.where(largest > 0, largest, 1)).round().to(torch.int8)

    def dequantize(self) -> Tensor:
        """fp32 ``[O, C]`` from the fp32 magnitudes."""
        negative = (self.codes >> self.sign_shift).bool()
        c = (self.codes & (1 << self.sign_shift) - 1).long()
        return torch.where(negative, -self.negative.gather(1, c), self.positive.gather(1, c))

    def dequantize_int8(self) -> Tensor:
        """fp32 ``[O, C]`` from the int8 tables, which is what products multiply with."""
        return self.table().gather(1, self.codes.long()) * self.sigma[:, None]


class _Grid(NamedTuple):
    """Grids of some sides (row and sign), fp64 ``[sides]`` each."""

    shift: Tensor
    low: Tensor
    step: Tensor

    def values(self, levels: int) -> Tensor:
        """fp64 ``[sides, levels]``: what the formula says for c = 0, 1, ..."""
        c = torch.arange(levels, dtype=torch.float64, device=self.low.device)
        return (self.low[..., None] + c * self.step[..., None]).exp2() - self.shift[..., None]

    def magnitudes(self, levels: int) -> Tensor:
        """The values, with 0 for those that are 0 but for rounding or that rounding puts below it."""
        values = self.values(levels)
        return torch.where(values < 1e-12 * self.shift[..., None], 0, values)


def fit(weight: Tensor, bits: int, mode: str = "corrected", grid: str = "small") -> TwinLog:
    """The twin-log form of a matrix.

    Every weight takes the code that is nearest in the shifted logarithm. A weight of 0 takes code 0 of the sign
    whose lowest magnitude is smaller.

    Args:
        weight: ``[O, C]`` of any floating dtype, finite.
        bits: 3 or 4, the sign included.
        mode: "corrected" finds shift and ends of the grid for each row and sign by squared error, so that
            scaling a row by a power of two leaves its codes alone. "paper" is the published formula: no shift,
            a grid from the least to the largest magnitude. "released" is what the authors' code computes: an
            absolute shift and a pair of quantiles for the whole matrix, quantiles taken over a row in which the
            other sign's entries count as log magnitude 0, and two levels more than ``bits`` bits hold. The last
            two are there to compare with; both lose to plain rounding on small Gaussian weights.
        grid: "small" tries 45 grids for each side, "full" 81, and a third more in rows with zeros; for mode
            "corrected" only.

    Raises:
        ValueError: one sentence with what was expected and what came.
    """
    _check(weight, bits, mode, grid)
    weight = weight.detach()
    if mode == "released":
        return _fit_released(weight, bits)
    parts = [_fit_rows(rows, bits, mode, grid) for rows in _chunks(weight)]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return TwinLog(bits, mode, *columns)


def _check(weight: Tensor, bits: int, mode: str, grid: str) -> None:
    if bits not in BITS:
        raise ValueError(f"twin_log: bits must be 3 or 4, got {bits}")
    if mode not in MODES:
        raise ValueError(f"twin_log: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if grid not in SHIFTS:
        raise ValueError(f"twin_log: grid must be one of {', '.join(SHIFTS)}, got {grid!r}")
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise ValueError(
            f"twin_log: weight must be a floating-point matrix that is not empty, got {list(weight.shape)} "
            f"{weight.dtype}"
        )
    bad = (~weight.isfinite()).any(1)
    if bad.any():
        raise ValueError(
            f"twin_log: weight must be finite, got NaN or Inf in {int(bad.sum())} of {len(bad)} rows, first in "
            f"row {int(bad.nonzero()[0])}; repair the checkpoint"
        )


def _chunks(weight: Tensor) -> Iterator[Tensor]:
    """Groups of rows in fp32; their temporaries are about ten fp64 tensors of both signs' size."""
    rows = max(1, _CHUNK_BYTES // (weight.shape[1] * 160))
    for part in weight.split(rows):
        yield part.float()


def _fit_rows(weight: Tensor, bits: int, mode: str, grid: str) -> tuple[Tensor, ...]:
    """Codes, positive and negative magnitudes, shift, low and step of some rows, as TwinLog holds them."""
    levels = 2 ** (bits - 1)
    if mode == "paper":
        found = _published_grid(_sides(weight.double()), levels)
    else:
        # In units of the row's largest magnitude: dividing by it makes the search blind to powers of two.
        largest = weight.abs().amax(1, keepdim=True).double()
        largest = torch.where(largest > 0, largest, 1)
        zeros = (weight == 0).sum(1)
        found = _search(_sides(weight.double() / largest), zeros, levels, grid)
        scale = largest.expand(-1, 2).reshape(-1)
        found = _Grid(found.shift * scale, found.low + scale.log2(), found.step)
    magnitudes = found.magnitudes(levels).view(-1, 2, levels)
    present = torch.stack([(weight > 0).any(1), (weight < 0).any(1)], 1)
    magnitudes = magnitudes * present[..., None]
    grids = [part.view(-1, 2) for part in found]
    codes = _assign(weight, magnitudes[..., 0], grids, levels)
    tables = magnitudes.float()
    return codes, tables[:, 0].contiguous(), tables[:, 1].contiguous(), *grids


def _assign(weight: Tensor, lowest: Tensor, grids: list[Tensor], levels: int) -> Tensor:
    """uint8 codes ``[R, C]``; ``lowest``, the magnitudes of code 0, and the parts of grids are ``[R, 2]``."""
    zeros_are_negative = (lowest[:, 1] < lowest[:, 0])[:, None]
    negative = (weight < 0) | ((weight == 0) & zeros_are_negative)
    c = _places(weight, negative, *grids).clamp_(0, levels - 1)
    return (c + levels * negative).to(torch.uint8)


def _places(weight: Tensor, negative: Tensor, shift: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """fp64 ``[R, C]``: the whole number of steps nearest to each weight's shifted log magnitude, from -inf."""

    def of_side(x: Tensor) -> Tensor:
        return torch.where(negative, x[:, 1:], x[:, :1])

    step = torch.where(step > 0, step, 1)  # a side with a single magnitude has no step
    log = (weight.double().abs() + of_side(shift)).log2()
    return log.sub_(of_side(low)).div_(of_side(step)).round_()


class _Sides(NamedTuple):
    """Magnitudes by row and sign, sides 2 r and 2 r + 1 being the positive and negative entries of row r.

    ordered: fp64 ``[sides, C]``, ascending, then +inf in place of entries of the other sign and zeros.
    counts: int64 ``[sides]``, how many there are; 1 for an empty side, whose entry is then 1.
    """

    ordered: Tensor
    counts: Tensor

    def quantile(self, shares: tuple[float, ...]) -> Tensor:
        """fp64 ``[sides, len(shares)]``: the entry nearest to each share of the way."""
        share = torch.tensor(shares, dtype=torch.float64, device=self.ordered.device)
        return self.ordered.gather(1, (share * (self.counts[:, None] - 1)).round().long())


def _sides(weight: Tensor) -> _Sides:
    return _one_side(torch.stack([weight, -weight], 1).flatten(0, 1))


def _one_side(signed: Tensor) -> _Sides:
    """The positive entries of each row."""
    ordered = torch.where(signed > 0, signed, torch.inf).sort(1).values
    counts = ordered.isfinite().sum(1)
    ordered[:, 0] = torch.where(counts > 0, ordered[:, 0], 1)
    return _Sides(ordered, counts.clamp(min=1))


def _published_grid(sides: _Sides, levels: int) -> _Grid:
    low, high = sides.quantile((0.0, 1.0)).log2().unbind(1)
    return _Grid(torch.zeros_like(low), low, (high - low) / (levels - 1))


def _search(sides: _Sides, zeros: Tensor, levels: int, grid: str) -> _Grid:
    """The grid of least squared error for each side; ``zeros`` int64 ``[R]`` counts the weights that are 0.

    Zeros become the lower of the two lowest magnitudes m, so a pair of grids errs by
    ``e+ + e- + zeros * min(m+, m-)^2``, and the best pair is the better of two: the best + grid with the zeros
    and the best - grid without them, or the reverse. In rows that have zeros, grids that begin at 0 are tried
    too.
    """
    prefix = _Prefix.of(sides)
    extra = zeros.repeat_interleave(2)[:, None]
    lower, upper = sides.quantile(LOWER), sides.quantile(UPPER)
    if extra.any():
        lower = torch.cat([torch.where(extra > 0, 0, lower[:, :1]), lower], 1)
    best = _Best.none(sides), _Best.none(sides)  # without and with the zeros
    for shift in SHIFTS[grid]:
        low, high = torch.broadcast_tensors((lower + shift).log2()[:, :, None], (upper + shift).log2()[:, None])
        low, high = low.flatten(1), high.flatten(1)
        # Where entries are few, the upper quantile may be below the lower one.
        step = ((high - low) / (levels - 1)).clamp(min=0)
        candidates = _Grid(torch.full_like(low, shift), low, step)
        magnitudes = candidates.magnitudes(levels)
        error = prefix.error(candidates, magnitudes)
        with_zeros = error + extra * magnitudes[..., 0].square()
        best = best[0].improved(error, candidates), best[1].improved(with_zeros, candidates)
    return _join(*best)


def _join(without: _Best, with_zeros: _Best) -> _Grid:
    """Which of a row's two sides cares for its zeros."""
    cost = (with_zeros.error - without.error).view(-1, 2)
    cares = torch.stack([cost[:, 0] <= cost[:, 1], cost[:, 1] < cost[:, 0]], 1).flatten()
    return _Grid(*(torch.where(cares, a, b) for a, b in zip(with_zeros.grid, without.grid, strict=True)))


class _Best(NamedTuple):
    """The best grid so far of each side and its squared error."""

    error: Tensor
    grid: _Grid

    @classmethod
    def none(cls, sides: _Sides) -> _Best:
        empty = torch.zeros(len(sides.counts), dtype=torch.float64, device=sides.counts.device)
        return cls(torch.full_like(empty, torch.inf), _Grid(empty, empty, empty))

    def improved(self, error: Tensor, candidates: _Grid) -> _Best:
        """With candidates ``[sides, G]``; what came first wins a tie."""
        least, at = error.min(1)
        better = least < self.error
        chosen = (part.gather(1, at[:, None])[:, 0] for part in candidates)
        grid = _Grid(*(torch.where(better, new, old) for new, old in zip(chosen, self.grid, strict=True)))
        return _Best(torch.where(better, least, self.error), grid)


class _Prefix(NamedTuple):
    """Sums over the first i entries of each side, fp64 ``[sides, C+1]``; a grid is priced by a few look-ups."""

    sides: _Sides
    values: Tensor
    squares: Tensor

    @classmethod
    def of(cls, sides: _Sides) -> _Prefix:
        finite = sides.ordered.nan_to_num(posinf=0)
        start = finite.new_zeros(len(finite), 1)
        sums = (torch.cat([start, x.cumsum(1)], 1) for x in (finite, finite.square()))
        return cls(sides, *sums)

    def error(self, candidates: _Grid, magnitudes: Tensor) -> Tensor:
        """Squared error ``[sides, G]`` of grids ``[sides, G]`` with magnitudes ``[sides, G, levels]``."""
        count, groups, levels = magnitudes.shape
        between = _Grid(candidates.shift, candidates.low + candidates.step / 2, candidates.step)
        bounds = between.magnitudes(levels - 1).flatten(1)
        first = torch.searchsorted(self.sides.ordered, bounds).view(count, groups, levels - 1)
        last = self.sides.counts[:, None, None].expand(-1, groups, 1)
        edges = torch.cat([torch.zeros_like(last), torch.minimum(first, last), last], 2)
        members = edges.diff(dim=2)
        values, squares = (
            sums.gather(1, edges.flatten(1)).view_as(edges).diff(dim=2) for sums in (self.values, self.squares)
        )
        return (squares - 2 * magnitudes * values + magnitudes.square() * members).sum(2)


def _fit_released(weight: Tensor, bits: int) -> TwinLog:
    """Code 0 is the exact zero and code q + 1 the level q, of which the negative side has one more."""
    shift, upper = _released_choice(weight, bits)
    levels = 2 ** (bits - 1)
    parts = []
    for rows in _chunks(weight):
        chosen = [_released_grid(_one_side(sign * rows.double()), shift, levels) for sign in (1, -1)]
        sides = [_Grid(*(part[:, at] for part in grid)) for grid, at in zip(chosen, upper, strict=True)]
        grids = [torch.stack(pair, 1) for pair in zip(*sides, strict=True)]
        negative = rows < 0
        c = _places(rows, negative, *grids).clamp_(min=0).minimum(levels - 1.0 + negative)
        codes = torch.where(rows == 0, 0, c + 1) + negative * 2.0**bits
        tables = [torch.nn.functional.pad(side.values(levels + 1), (1, 0)).float() for side in sides]
        parts.append((codes.to(torch.uint8), *tables, *grids))
    return TwinLog(bits, "released", *(torch.cat(column) for column in zip(*parts, strict=True)))


def _released_choice(weight: Tensor, bits: int) -> tuple[float, list[int]]:
    """The shift of least error over the whole matrix, and each sign's index in RELEASED_UPPER.

    The authors try all 325 triples; for a given shift, what one sign errs does not depend on the other's
    quantile, so 130 sums decide the same.
    """
    error = torch.zeros(len(RELEASED_SHIFTS), 2, len(RELEASED_UPPER), dtype=torch.float64)
    levels = 2 ** (bits - 1)
    for rows in _chunks(weight):
        for side, sign in enumerate((1, -1)):
            prefix = _Prefix.of(_one_side(sign * rows.double()))
            used = (sign * rows > 0).any(1)
            for i, shift in enumerate(RELEASED_SHIFTS):
                grids = _released_grid(prefix.sides, shift, levels)
                errors = prefix.error(grids, grids.values(levels + side))
                error[i, side] += errors[used].sum(0).cpu()
    least = error.min(2)
    best = int(least.values.sum(1).argmin())
    return RELEASED_SHIFTS[best], least.indices[best].tolist()


def _released_grid(side: _Sides, shift: float, levels: int) -> _Grid:
    """Grids ``[R, 5]`` of one sign, one for each of RELEASED_UPPER; all end at the least magnitude.

    Entries of the other sign take part in the order with a log magnitude of 0.
    """
    width = side.ordered.shape[1]
    others = (width - side.counts)[:, None]
    log = (side.ordered + shift).log2()
    below = (log < 0).sum(1, keepdim=True)
    at = torch.tensor([round(upper * (width - 1)) for upper in RELEASED_UPPER], device=log.device)
    own = log.gather(1, torch.where(at < below, at, at - others).clamp(0, width - 1))
    high = torch.where((at >= below) & (at < below + others), 0, own)
    low = torch.where(others > 0, log[:, :1].clamp(max=0), log[:, :1]).expand_as(high)
    step = (high - low) / levels
    spacing = torch.where(step > 0, step, 1)
    origin = torch.where(step > 0, (low / spacing).round() * spacing, low)
    return _Grid(torch.full_like(low, shift), origin, step)


def pack_planes(codes: Tensor) -> Tensor:
    """Three-bit codes as a plane of two bits and one of one bit, for files: three bits a weight.

    Args:
        codes: uint8 ``[N, K]``, 0 to 7.

    Returns:
        int32 ``[N, ceil(K/32), 3]``. Weight i of a group of 32 has its low two bits from bit ``2 (i % 16)`` on
        in word ``i / 16`` and its high bit in bit i of word 2. What lies past K is 0.

    Raises:
        ValueError: one sentence, for another dtype or shape and for codes above 7.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2 or (codes.numel() and int(codes.max()) > 7):
        raise ValueError(
            f"pack_planes: codes must be a uint8 matrix of 0 to 7, got {list(codes.shape)} {codes.dtype}"
            + (f" up to {int(codes.max())}" if codes.numel() else "")
        )
    rows, count = codes.shape
    groups = torch.nn.functional.pad(codes, (0, -count % 32)).view(rows, -1, 32)
    low = _bytes_of(groups & 3, 2)
    high = _bytes_of(groups >> 2, 1)
    return torch.cat([low, high], 2).view(torch.int32)


def _bytes_of(values: Tensor, width: int) -> Tensor:
    """``[..., n]`` numbers of ``width`` bits as bytes ``[..., n * width / 8]``, first number lowest."""
    lanes = values.unflatten(-1, (-1, 8 // width))
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=values.device)
    return (lanes << shifts).sum(-1, dtype=torch.uint8)


def unpack_planes(planes: Tensor, in_features: int) -> Tensor:
    """uint8 codes ``[N, in_features]``, the exact inverse of :func:`pack_planes`.

    Raises:
        ValueError: one sentence, where ``planes`` is not int32 ``[N, ceil(in_features/32), 3]``.
    """
    groups = -(-in_features // 32)
    if planes.dtype != torch.int32 or planes.dim() != 3 or tuple(planes.shape[1:]) != (groups, 3):
        raise ValueError(
            f"unpack_planes: planes for {in_features} columns must be int32 [N, {groups}, 3], got "
            f"{list(planes.shape)} {planes.dtype}"
        )
    data = planes.contiguous().view(torch.uint8)
    low, high = _values_of(data[..., :8], 2), _values_of(data[..., 8:], 1)
    return (low | high << 2).flatten(1)[:, :in_features].contiguous()


def _values_of(data: Tensor, width: int) -> Tensor:
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=data.device)
    return ((data[..., None] >> shifts) & (1 << width) - 1).flatten(-2)


def compact_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors as a file may keep them: three bits a weight where the layer has three-bit codes.

    Products read such codes from tiles of four bits each.

    Args:
        config: of the layer (:meth:`vdit_ext.quant.QuantLayer.config`).
        tensors: of the layer, by name.

    Returns:
        The tensors, with "planes" (:func:`pack_planes`) in place of "tiles" for three-bit twin-log layers.
    """
    found = dict(tensors)
    if config["format"] == "twin_log" and config["bits"] == 3:
        codes = ops.unpack_log4(found.pop("tiles"), config["out_features"], config["in_features"])
        found["planes"] = pack_planes(codes)
    return found


def expanded_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The exact inverse of :func:`compact_tensors`; tensors without "planes" stay as they are.

    Raises:
        ValueError: one sentence, for planes of another shape or dtype than the config asks for.
    """
    found = dict(tensors)
    if "planes" in found:
        found["tiles"] = ops.pack_log4(unpack_planes(found.pop("planes"), config["in_features"]))
    return found
