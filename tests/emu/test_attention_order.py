"""The order of work of block_sparse_attention on compute capability 9.0: every row once, pairs, longest first."""

from __future__ import annotations

from pathlib import Path

import pytest
from emu_programs import ORDERS, built
from emu_toolchain import run_emulated


@pytest.fixture(scope="session")
def program() -> Path:
    return built("order.cu")


def items(program, sizes, lengths, tile, *, length=0, order="forward"):
    """Parts of the items in order: tuples of row0, rows, query block."""
    arguments = (sizes, ",".join(map(str, lengths)), str(tile), str(length))
    done = run_emulated(program, *arguments, order=order)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "next 0", lines[0]
    found = [[tuple(map(int, p)) for p in parts(line)] for line in lines[1:] if line != "none"]
    assert lines[1 + len(found) :] == ["none"] * (len(lines) - 1 - len(found)), "nothing follows the last item"
    return found


def parts(line: str):
    words = line.split()
    return [words[i : i + 3] for i in range(0, len(words), 3)]


def rows_of(found) -> list[int]:
    return sorted(row for item in found for row0, rows, _ in item for row in range(row0, row0 + rows))


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_64_are_paired_with_their_neighbours(program, order):
    found = items(program, "uniform:64:300", [5, 9, 3, 3, 7], 128, order=order)
    assert rows_of(found) == list(range(300))
    pairs = {tuple(part[2] for part in item) for item in found}
    assert pairs == {(0, 1), (2, 3), (4,)}


def test_blocks_of_whole_tiles_are_not_paired(program):
    found = items(program, "uniform:128:500", [5, 9, 3, 7], 128)
    assert rows_of(found) == list(range(500)) and all(len(item) == 1 for item in found)
    assert [item[0][2] for item in found] == [1, 3, 0, 2], "the longest list comes first"


@pytest.mark.parametrize("tile", [128, 192])
@pytest.mark.parametrize("order", ORDERS)
def test_what_is_left_of_clusters_is_paired_by_list_length(program, tile, order):
    sizes = [tile, tile + 64, 0, 3, tile + 65, 64, 2 * tile + 1, 60]
    offsets = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    lengths = [40, 12, 40, 20, 33, 39, 11, 21]
    found = items(program, ",".join(map(str, offsets)), lengths, tile, length=offsets[-1], order=order)
    assert rows_of(found) == list(range(offsets[-1]))
    pairs = [tuple(part[2] for part in item) for item in found if len(item) == 2]
    # Tiles of at most 64 rows, the longest lists first: blocks 5 (39), 7 (21), 3 (20), 1 (12), 6 (11).
    assert sorted(pairs) == [(3, 1), (5, 7)]
    assert [(offsets[7] - 1, 1, 6)] in found, "one tile is left over"
    longest = [max(lengths[part[2]] for part in item) for item in found]
    assert all(before + 40 / 256 + 1 > after for before, after in zip(longest, longest[1:], strict=False))


def test_a_list_with_a_block_twice_is_left_alone(program):
    found = items(program, "uniform:64:256", [5, "5d", 5, 5], 128)
    assert {tuple(part[2] for part in item) for item in found} == {(0, 2), (1,), (3,)}


def test_a_length_that_no_list_has_is_left_alone(program):
    found = items(program, "uniform:64:256", [41, 5, -1, 5], 128)
    assert {tuple(part[2] for part in item) for item in found} == {(1, 3), (0,), (2,)}


@pytest.mark.parametrize("order", ORDERS)
def test_many_blocks_are_paired_the_same_in_every_order(program, order):
    """More blocks than the thread block has threads, with many equal lengths: a stable sort is needed."""
    sizes = [(i * 37) % 65 for i in range(700)]
    offsets = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    lengths = [(i * 11) % 7 for i in range(700)]
    found = items(program, ",".join(map(str, offsets)), lengths, 128, length=offsets[-1], order=order)
    assert rows_of(found) == list(range(offsets[-1]))
    full = [i for i in range(700) if sizes[i] > 0]
    ranked = sorted(full, key=lambda i: -lengths[i])  # stable
    expected = {tuple(ranked[i : i + 2]) for i in range(0, len(ranked), 2)}
    assert {tuple(part[2] for part in item) for item in found} == expected


def test_rows_past_the_last_offset_are_items_of_no_block(program):
    found = items(program, "0,64,100", [5, 5], 128, length=300)
    assert rows_of(found) == list(range(300))
    assert {part[2] for item in found for part in item} == {0, 1, 2}
