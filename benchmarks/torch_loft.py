"""Algorithm 1 of the paper, line by line in PyTorch: what LoFT costs when its equations are typed.

Only its errata are mended (the scaled gradient as in block 2, epsilon outside the square root, the
zero-initialised factor first). No orthonormal basis, no packing, no blocks: ``m x r^2`` cross
terms, ``C (x) C`` formed whole, and the ``m x n`` update in one piece, pair after pair.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Side:
    """State of one factor: its value at the last step and its moments in the partner's frame."""

    def __init__(self, factor: Tensor):
        rows, rank = factor.shape
        self.before = factor.clone()
        self.first = factor.new_zeros(rows, rank)
        self.cross = factor.new_zeros(rows, rank * rank)


def rows_squared(x: Tensor) -> Tensor:
    """The outer product of every row with itself, ``(m, r^2)``: the paper's bullet product."""
    return (x[:, :, None] * x[:, None, :]).flatten(1)


class TorchLoft:
    """LoFT-AdamW on pairs ``(U, V)``, tall matrices with ``W = W_0 + U V^T``.

    Args:
      pairs: the factors, changed in place. ``V`` moves first.
      learning_rate, b1, b2, eps, weight_decay: as in AdamW.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        learning_rate: float,
        b1: float = 0.9,
        b2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        self.pairs = list(pairs)
        self.sides = [(Side(u), Side(v)) for u, v in self.pairs]
        self.learning_rate, self.betas = learning_rate, (b1, b2)
        self.eps, self.weight_decay = eps, weight_decay
        self.count = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Moves one factor of every pair by the gradients of ``U`` and of ``V``."""
        self.count += 1
        moving = self.count % 2  # 1: V
        for pair, sides, of_pair in zip(self.pairs, self.sides, gradients, strict=True):
            inverses = [torch.linalg.inv(x.T @ x) for x in pair]
            for k in (0, 1):
                self._advance(
                    sides[k], of_pair[k], pair[1 - k], sides[1 - k].before, inverses[1 - k]
                )
            for side, factor in zip(sides, pair, strict=True):
                side.before.copy_(factor)
            self._move(pair[moving], sides[moving], pair[1 - moving], inverses[1 - moving])

    def _advance(
        self, side: Side, gradient: Tensor, partner: Tensor, before: Tensor, inverse: Tensor
    ) -> None:
        """Lines 7 to 12."""
        b1, b2 = self.betas
        calibration = (before.T @ partner) @ inverse
        scaled = gradient @ inverse
        side.first = b1 * side.first @ calibration + (1 - b1) * scaled
        both = torch.kron(calibration, calibration)
        side.cross = b2 * side.cross @ both + (1 - b2) * rows_squared(scaled)

    def _move(self, factor: Tensor, side: Side, partner: Tensor, inverse: Tensor) -> None:
        """Lines 14 to 18."""
        b1, b2 = self.betas
        first = side.first @ partner.T / (1 - b1**self.count)
        # Rounding can make a second moment negative.
        second = (side.cross @ rows_squared(partner).T / (1 - b2**self.count)).clamp(min=0)
        direction = first / (second.sqrt() + self.eps) @ partner @ inverse
        factor.mul_(1 - self.learning_rate * self.weight_decay)
        factor.sub_(self.learning_rate * direction)


def tall_pairs(params: Any) -> list[tuple[Tensor, Tensor]]:
    """Copies of a tree's factors, ``a`` and the transpose of ``b``, as PyTorch's tensors."""
    import numpy as np

    copy = lambda x: torch.from_numpy(np.array(x))
    return [
        (copy(pair["lora_a"]), copy(pair["lora_b"].T))
        for _, layer in sorted(params.items())  # in JAX's order, which sorts
        for _, pair in sorted(layer.items())
    ]
