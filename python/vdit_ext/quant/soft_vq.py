"""Weights whose codewords are still being chosen: candidates, learnable ratios, and how they harden.

VQ4DiT (arXiv 2408.17131), section 3: every word of a weight is the mean of its nearest codewords, weighted by a
softmax, until one of them holds nearly all of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kmeans_vq import nearest_words

# A logit so far above the others that its softmax is exactly 1 in fp32.
_CERTAIN = 1e4
_NEARLY_ZERO = 1e-5


def first_logits(distances: Tensor, init: str = "inverse_distance") -> Tensor:
    """Logits ``[V, n]`` from the distances of n candidates, nearest first.

    "inverse_distance": ``log(D_n / D_j)``, so that for n = 2 the first ratio is ``D_2 / (D_1 + D_2)``;
    "uniform": every ratio 1 / n (the paper). The released code adds 1e-5 to D_j alone, with which the farther
    of two candidates leads where they are nearly tied; here it is added to both.
    """
    if init == "uniform":
        return torch.zeros_like(distances)
    return torch.log((distances[:, -1:] + _NEARLY_ZERO) / (distances + _NEARLY_ZERO))


def soft_words(codebook: Tensor, candidates: Tensor, logits: Tensor) -> Tensor:
    """Each word as the mean of its candidates, weighted by the softmax of its logits.

    Differentiable in codebook ``[k, d]`` and logits ``[V, n]``, of one floating dtype; candidates int64
    ``[V, n]``. Returns ``[V, d]``. A row of logits that is certain gives its codeword bit for bit.
    """
    return F.embedding_bag(candidates, codebook, mode="sum", per_sample_weights=logits.softmax(-1))


def ratio_loss(logits: Tensor, frozen: Tensor) -> Tensor:
    """``n * mean(r (1 - r))`` over the words that are not frozen; 0 when all are, or when all are one-hot.

    It is greatest where all ratios are equal. logits ``[V, n]``, frozen bool ``[V]``.
    """
    ratios = logits.softmax(-1)
    doubt = (ratios * (1 - ratios)).sum(-1)  # n * mean over the n candidates
    free = (~frozen).sum().clamp_min(1)
    return torch.where(frozen, 0, doubt).sum() / free


class SoftWeight:
    """One weight while its assignments are calibrated.

    Args:
        words: fp32 ``[V, d]``, the weight's words, divided by ``row_scale`` where there is one.
        shape: ``(O, C)`` of the weight.
        codebook: fp32 ``[k, d]``, a leaf tensor that several weights may share; calibration changes it.
        count: candidates a word, n; at most k.
        init: see :func:`first_logits`.
        row_scale: fp32 ``[O]`` or None.

    Attributes:
        candidates int64 ``[V, n]``, nearest first; logits fp32 ``[V, n]``, a leaf tensor; frozen bool ``[V]``;
        hard: whether the weight is ``codebook[chosen]`` now.
    """

    def __init__(
        self,
        words: Tensor,
        shape: tuple[int, int],
        codebook: Tensor,
        count: int = 2,
        init: str = "inverse_distance",
        row_scale: Tensor | None = None,
    ) -> None:
        self.shape, self.codebook, self.row_scale = shape, codebook, row_scale
        self.candidates, distances = nearest_words(words, codebook.detach(), min(count, len(codebook)))
        self.logits = first_logits(distances, init).requires_grad_(True)
        self.frozen = torch.zeros(len(words), dtype=torch.bool, device=words.device)
        self.hard = False

    def weight(self, *, hard: bool = False) -> Tensor:
        """fp32 ``[O, C]``: soft, and differentiable in logits and codebook; or of the likeliest candidates.

        Once :attr:`hard` is set it is hard in any case.
        """
        if hard or self.hard:
            words = F.embedding(self.chosen(), self.codebook)
        else:
            words = soft_words(self.codebook, self.candidates, self.logits)
        weight = words.reshape(self.shape)
        return weight if self.row_scale is None else weight * self.row_scale[:, None]

    def chosen(self) -> Tensor:
        """int64 ``[V]``: the candidate with the largest ratio; the nearest one on a tie."""
        best = self.logits.detach().argmax(-1, keepdim=True)
        return self.candidates.gather(1, best)[:, 0]

    @torch.no_grad()
    def freeze(self, above: float = 0.99) -> None:
        """Fix for good the words of which one ratio is above this."""
        self.frozen |= self.logits.softmax(-1).amax(-1) > above
        self._fix()

    @torch.no_grad()
    def harden(self) -> None:
        """Give every word to its likeliest candidate, from now on."""
        self.frozen.fill_(True)
        self._fix()
        self.hard = True

    def _fix(self) -> None:
        certain = F.one_hot(self.logits.argmax(-1), self.logits.shape[1]) * _CERTAIN
        self.logits.copy_(torch.where(self.frozen[:, None], certain.to(self.logits.dtype), self.logits))

    @property
    def frozen_share(self) -> float:
        """0 to 1: words whose choice is made."""
        return float(self.frozen.double().mean())
