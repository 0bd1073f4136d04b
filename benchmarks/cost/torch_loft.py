"""Algorithm 1 of the paper typed line by line in PyTorch, without optimization.

Only the errata are corrected: the scaled gradient as in block 2, epsilon outside the square root,
and the zero-initialized factor first. There is no orthonormal basis, no packing and no blocking:
the state holds ``m x r^2`` cross terms, ``C (x) C`` is formed whole, and the ``m x n`` update is
computed in one piece, pair after pair.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class FactorState:
    """The factor at the last step, and its moments in the coordinates of the partner."""

    def __init__(self, factor: Tensor):
        rows, rank = factor.shape
        self.before = factor.clone()
        self.first = factor.new_zeros(rows, rank)
        self.cross = factor.new_zeros(rows, rank * rank)


def rows_squared(x: Tensor) -> Tensor:
    """The outer product of each row with itself, ``(m, r^2)``: the paper's bullet product."""
    return (x[:, :, None] * x[:, None, :]).flatten(1)


class TorchLoft:
    """LoFT-AdamW on pairs ``(U, V)`` of tall matrices, ``W = W_0 + U V^T``.

    Args:
      pairs: the factors, updated in place. ``V`` is updated first.
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
        self.states = [(FactorState(u), FactorState(v)) for u, v in self.pairs]
        self.learning_rate, self.betas = learning_rate, (b1, b2)
        self.eps, self.weight_decay = eps, weight_decay
        self.count = 0

    @property
    def state_bytes(self) -> int:
        """The size of the state."""
        states = [state for pair in self.states for state in pair]
        return sum(x.before.nbytes + x.first.nbytes + x.cross.nbytes for x in states)

    @torch.no_grad()
    def step(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Updates one factor of each pair, given the gradients of ``U`` and ``V``."""
        self.count += 1
        active = self.count % 2  # 1: V
        for pair, states, of_pair in zip(self.pairs, self.states, gradients, strict=True):
            inverses = [torch.linalg.inv(x.T @ x) for x in pair]
            for k in (0, 1):
                partner, inverse = pair[1 - k], inverses[1 - k]
                self._advance(states[k], of_pair[k], partner, states[1 - k].before, inverse)
            for state, factor in zip(states, pair, strict=True):
                state.before.copy_(factor)
            self._update(pair[active], states[active], pair[1 - active], inverses[1 - active])

    def _advance(
        self, state: FactorState, gradient: Tensor, partner: Tensor, before: Tensor, inverse: Tensor
    ) -> None:
        """Lines 7 to 12."""
        b1, b2 = self.betas
        calibration = (before.T @ partner) @ inverse
        scaled = gradient @ inverse
        state.first = b1 * state.first @ calibration + (1 - b1) * scaled
        both = torch.kron(calibration, calibration)
        state.cross = b2 * state.cross @ both + (1 - b2) * rows_squared(scaled)

    def _update(self, factor: Tensor, state: FactorState, partner: Tensor, inverse: Tensor) -> None:
        """Lines 14 to 18."""
        b1, b2 = self.betas
        first = state.first @ partner.T / (1 - b1**self.count)
        # Rounding can make a second moment negative.
        second = (state.cross @ rows_squared(partner).T / (1 - b2**self.count)).clamp(min=0)
        direction = first / (second.sqrt() + self.eps) @ partner @ inverse
        factor.mul_(1 - self.learning_rate * self.weight_decay)
        factor.sub_(self.learning_rate * direction)


def tall_pairs(params: Any) -> list[tuple[Tensor, Tensor]]:
    """Copies of a tree's factors as PyTorch tensors: ``a``, and the transpose of ``b``."""
    import numpy as np

    copy = lambda x: torch.from_numpy(np.array(x))
    return [
        (copy(pair["lora_a"]), copy(pair["lora_b"].T))
        for _, layer in sorted(params.items())  # in JAX's order, which is sorted
        for _, pair in sorted(layer.items())
    ]
