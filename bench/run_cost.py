"""What the ways to bring unaligned clusters into shared memory cost, counted exactly on random plans.

    python bench/run_cost.py [--markdown FILE]

block_sparse_attention for compute capability 9.0 packs the listed clusters into windows of keys. This counts,
for the cluster counts of SVG2's scripts and clusters of uneven sizes (lognormal), what each way would issue for
one window of keys; values cost the same again. Nothing is timed here: on a GPU, ``VDIT_ATTENTION_RUNS=overlap``
against the default compares the first two.

    binary    one TMA box for each 1 in the binary form of a run's length (the default)
    overlap   the same, but one box of 8 rows that ends with the run for what is left above whole eights
    atoms     runs rounded up to whole 8-row swizzle atoms and masked: fewer boxes, but wasted columns
    gather    16 bytes a thread (cp.async), as kernels without TMA for ragged clusters do

A second table counts the query rows that thread blocks are busy for, over those there are: a tile of the whole
block's rows for every cluster's rest, or rests of at most 64 rows paired.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

# tokens, head size, query and key clusters, keys a window, query rows a tile
SHAPES = {
    "HunyuanVideo 720p": (119_056, 128, 400, 1000, 128, 128),
    "Wan2.1-14B 720p": (75_600, 128, 300, 1000, 128, 128),
    "CogVideoX1.5": (45_106, 64, 100, 500, 112, 192),
}
DENSITY = 0.25
LISTS = 40
SPREAD = 0.8  # of the logarithm of a cluster's size, as in synthetic.py


def cluster_sizes(tokens: int, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Sizes that add up to all tokens."""
    share = rng.lognormal(0, SPREAD, clusters)
    ends = np.round(share.cumsum() / share.sum() * tokens).astype(int)
    return np.diff(ends, prepend=0)


def runs_of(sizes: np.ndarray, window: int) -> tuple[np.ndarray, int]:
    """Lengths of the runs that listed clusters make, cut where windows end; and how many windows there are."""
    ends = sizes.cumsum()
    windows = -(-int(ends[-1]) // window)
    cuts = np.unique(np.concatenate([[0], ends, np.arange(1, windows) * window]))
    return np.diff(cuts[cuts <= ends[-1]]), windows


def ones(n: np.ndarray) -> np.ndarray:
    return np.array([int(x).bit_count() for x in n])


def count(sizes: np.ndarray, window: int, row_bytes: int) -> dict[str, tuple[float, float]]:
    """Instructions and executed columns of each way, per window."""
    slabs = row_bytes // 128
    runs, windows = runs_of(sizes, window)
    left = runs % 8
    folded = (runs > 8) & (ones(left) > 1)
    overlap = np.where(folded, ones(runs - left) + 1, ones(runs))
    atoms, atom_windows = runs_of(-(-sizes // 8) * 8, window)
    rows = int(sizes.sum())
    return {
        "binary": (ones(runs).sum() * slabs / windows, windows * window / rows),
        "overlap": (overlap.sum() * slabs / windows, windows * window / rows),
        "atoms": (ones(atoms).sum() * slabs / atom_windows, atom_windows * window / rows),
        "gather": (rows * row_bytes / 16 / windows, windows * window / rows),
    }


def table() -> str:
    lines = [
        "| shape | mean key cluster | way | instructions a window of keys | executed / listed columns |",
        "|---|---|---|---|---|",
    ]
    for name, (tokens, head_dim, _, clusters, window, _) in SHAPES.items():
        rng = np.random.default_rng(0)
        found: dict[str, list] = {}
        for _ in range(LISTS):
            sizes = cluster_sizes(tokens, clusters, rng)
            listed = sizes[np.sort(rng.permutation(clusters)[: round(DENSITY * clusters)])]
            for way, figures in count(listed[listed > 0], window, head_dim * 2).items():
                found.setdefault(way, []).append(figures)
        for way, figures in found.items():
            issued, columns = np.mean(figures, 0)
            lines.append(f"| {name} | {tokens / clusters:.0f} | {way} | {issued:.1f} | {columns:.3f} |")
    return "\n".join(lines)


def busy_rows(sizes: np.ndarray, tile: int, *, paired: bool) -> float:
    """Rows that thread blocks are busy for, over the rows there are."""
    left = sizes % tile
    short = (left > 0) & (left <= 64) & paired
    tiles = (sizes // tile).sum() + ((left > 0) & ~short).sum() + -(-short.sum() // 2)
    return tiles * tile / sizes.sum()


def query_table() -> str:
    lines = [
        "| shape | mean query cluster | tile | busy / real rows, alone | 64-row rests paired |",
        "|---|---|---|---|---|",
    ]
    for name, (tokens, _, clusters, _, _, tile) in SHAPES.items():
        rng = np.random.default_rng(0)
        drawn = [cluster_sizes(tokens, clusters, rng) for _ in range(LISTS)]
        alone, paired = (np.mean([busy_rows(s, tile, paired=p) for s in drawn]) for p in (False, True))
        lines.append(f"| {name} | {tokens / clusters:.0f} | {tile} | {alone:.3f} | {paired:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    args = parser.parse_args()
    text = f"{table()}\n\n{query_table()}"
    print(text)
    if args.markdown:
        args.markdown.write_text(
            f"# Bringing ragged clusters into shared memory: counted, not timed\n\n`python bench/run_cost.py`, "
            f"density {DENSITY}, {LISTS} lists a shape. A gather's instructions are those of single threads, "
            f"of which a warp issues 32 at a time; a TMA box is issued by one thread.\n\n{text}\n"
        )


if __name__ == "__main__":
    main()
