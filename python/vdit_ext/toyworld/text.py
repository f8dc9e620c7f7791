"""A fixed text encoder: each token is a word code next to a place code, nothing is learned.

The transformer's own text projection learns what the words mean; a fixed code keeps the
conditioning exact and costs no weights.
"""

import torch

from .captions import caption, parse

MAX_TOKENS = 12
WORD_SLOTS = 84  # room for the words of later worlds
TEXT_DIM = WORD_SLOTS + MAX_TOKENS
# Order is part of the weights: append new words at the end.
# fmt: off
VOCABULARY = [
    "a", "over",
    "red", "green", "blue", "yellow", "white", "purple",
    "disc", "square", "triangle", "ring",
    "bounces", "slides", "left", "right", "rises", "falls",
    "grey", "brown", "pink",
    "stripes", "checks", "dots", "plain",
]
# fmt: on
_WORD_SIZE, _PLACE_SIZE = 4.0, 2.0  # a token's code has norm about 4.5 against 96 dimensions


def encode(prompts: list[str]) -> torch.Tensor:
    """Prompts to float32 [b, 12, 96]; "" is the null prompt that guidance leans away from.

    Prompts are read by the grammar first, so that every way to say a thing gives one code.
    Raises ValueError, as `captions.parse` does, for a prompt outside the grammar.
    """
    codes = torch.zeros(len(prompts), MAX_TOKENS, TEXT_DIM)
    codes[:, :, WORD_SLOTS:] = _PLACE_SIZE * torch.eye(MAX_TOKENS)
    for row, prompt in enumerate(prompts):
        words = caption(parse(prompt)).split() if prompt else []
        for place, word in enumerate(words):
            codes[row, place, VOCABULARY.index(word)] = _WORD_SIZE
    return codes
