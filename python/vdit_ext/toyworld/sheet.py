"""Contact sheets: many clips in one picture, a row each."""

import numpy as np


def clip_grid(clips: list[np.ndarray], shown: int = 6, columns: int = 2, gap: int = 4) -> np.ndarray:
    """Clips uint8 [f, h, w, 3], all of one size, to one uint8 picture [height, width, 3].

    shown: frames per clip, evenly spread. Clips run down the first column, then the next.
    """
    rows = []
    for frames in clips:
        index = np.linspace(0, len(frames) - 1, shown).round().astype(int)
        border = ((gap, 0), (gap, 0), (0, 0))
        rows.append(np.concatenate([np.pad(frames[i], border, constant_values=255) for i in index], 1))
    rows += [np.full_like(rows[0], 255)] * (-len(rows) % columns)
    depth = len(rows) // columns
    return np.concatenate([np.concatenate(rows[c * depth : (c + 1) * depth], 0) for c in range(columns)], 1)
