"""Which parts of a model get 8 bits when there is room for some: an exact knapsack, and budgets by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """Something whose precision can be raised: a block's layers of one kind, in one part of the steps.

    Attributes:
        key: (interval, name of the unit).
        group: units of one group are weighed by one metric and share a budget.
        cost: extra bits that raising takes, a whole number.
        gain: loss in the group's metric that raising spares; at least 0.
    """

    key: tuple[int, str]
    group: str
    cost: int
    gain: float


def knapsack(costs: Sequence[int], gains: Sequence[float], budget: int) -> list[int]:
    """Indices of the items with the largest total gain whose costs add up to at most ``budget``; exact.

    Walks over the undominated (cost, gain) pairs (Nemhauser and Ullmann), of which there are few where many
    costs are alike, as those of a transformer's blocks are. Of equal gains the cheaper choice wins, then the
    one with earlier items. The gain of the choice never falls as the budget grows.

    Raises:
        ValueError: a negative or fractional cost, a gain that is negative or NaN.
    """
    for cost, gain in zip(costs, gains, strict=True):
        if cost != int(cost) or cost < 0 or not gain >= 0:
            raise ValueError(
                "vdit_ext.quant: costs must be whole numbers and gains numbers, none below 0, got "
                f"{cost} and {gain}"
            )
    # Undominated states by rising cost and gain: (cost, gain, items as a linked list, last first).
    states: list[tuple[int, float, tuple | None]] = [(0, 0.0, None)]
    for index, (cost, gain) in enumerate(zip(costs, gains, strict=True)):
        if gain == 0:
            continue
        taken = [(c + cost, g + gain, (index, items)) for c, g, items in states if c + cost <= budget]
        states = _undominated(states, taken)
    chosen, items = [], states[-1][2]
    while items is not None:
        chosen.append(items[0])
        items = items[1]
    return chosen[::-1]


def _undominated(first: list, second: list) -> list:
    """The states that no other one beats by both cost and gain; of equal ones that of ``first``."""
    merged = sorted(
        [*((s, 0) for s in first), *((s, 1) for s in second)], key=lambda p: (p[0][0], -p[0][1], p[1])
    )
    kept: list = []
    for state, _ in merged:
        if not kept or state[1] > kept[-1][1]:
            kept.append(state)
    return kept


def split_budget(budget: int, shares: Mapping[str, float], limits: Mapping[str, int]) -> dict[str, int]:
    """Divide a budget among groups in proportion to ``shares``, none above its limit; what a full group cannot
    use goes to the others.

    Returns:
        Whole numbers by group, whose sum is at most ``budget``. Each grows with ``budget``.
    """
    found = dict.fromkeys(shares, 0)
    # The largest level t with sum(min(limit, t * share)) <= budget: fill groups in the order they become full.
    order = sorted((g for g in shares if shares[g] > 0), key=lambda g: limits[g] / shares[g])
    left, weight = budget, sum(shares[g] for g in order)
    for place, group in enumerate(order):
        level = left / weight
        if limits[group] <= level * shares[group]:
            found[group] = limits[group]
            left -= limits[group]
            weight -= shares[group]
            continue
        for other in order[place:]:
            found[other] = min(limits[other], int(level * shares[other]))
        break
    return found


def choose(
    units: Sequence[Unit], budget: int, shares: Mapping[str, float] | None = None
) -> set[tuple[int, str]]:
    """Keys of the units to raise: a knapsack in each group, under the group's part of the budget.

    Args:
        units: what there is to raise.
        budget: extra bits in all.
        shares: how to divide the budget among groups, such as each group's output error at the low precision;
            None solves one knapsack over all units, whose gains must then be of one kind.

    Returns:
        Keys whose costs add up to at most ``budget``.

    Raises:
        ValueError: a negative budget, or a group without a share.
    """
    if budget < 0:
        raise ValueError(f"vdit_ext.quant: a budget must be at least 0, got {budget}")
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault("" if shares is None else unit.group, []).append(unit)
    if shares is None:
        parts = {"": budget}
    else:
        if missing := sorted(groups.keys() - shares.keys()):
            raise ValueError(f"vdit_ext.quant: every group must have a share, {missing[0]} has none")
        limits = {group: sum(unit.cost for unit in members) for group, members in groups.items()}
        parts = split_budget(budget, {group: shares[group] for group in groups}, limits)
    chosen: set[tuple[int, str]] = set()
    for group, members in groups.items():
        picked = knapsack([u.cost for u in members], [u.gain for u in members], parts[group])
        chosen |= {members[i].key for i in picked}
    return chosen
