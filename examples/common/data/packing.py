"""Sequence packing: several short sequences share a row of a batch, so that little is padding.

A token attends only to the tokens of its own sequence, and its position counts from the beginning
of its sequence. The loss and its gradient are therefore those of the unpacked sequences.
"""

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .. import batches
from ..losses import token_losses
from .answers import Tokens

FILLED = 0.9
"""`pack` repeats sequences in rows that are filled to less than this fraction."""


def pack(
    lengths: Sequence[int], capacity: int, seed: int, *, repeat: bool = False
) -> list[list[int]]:
    """Distributes sequences over few rows.

    Each row begins with the longest sequence that is left, and is filled as far as the others
    allow, with long ones if they suffice: short ones fill the rows to come.

    Args:
        lengths: of the sequences, each between 1 and `capacity`.
        capacity: of a row.
        seed: orders sequences of equal length.
        repeat: whether rows that are filled to less than 90 %, often only the last, are filled
            with sequences of other rows. An epoch of training then has a few sequences twice.

    Returns:
        The places of the sequences in each row. Each sequence is in one row, apart from those
        that are repeated.

    Example:
        >>> pack([3, 5, 4, 2], capacity=8, seed=0)
        [[1, 0], [2, 3]]
    """
    left: dict[int, list[int]] = {}
    for place in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        left.setdefault(lengths[place], []).append(place)
    rising = sorted(left)
    rows = []
    while rising:
        longest = rising[-1]
        chosen = [longest, *_fill(capacity - longest, longest, rising, left)]
        rows.append([left[length].pop() for length in chosen])
        rising = [length for length in rising if left[length]]
    if repeat:
        _repeat(rows, lengths, capacity)
    return rows


def _fill(
    room: int, used: int, rising: Sequence[int], left: Mapping[int, Sequence[int]]
) -> list[int]:
    """The lengths whose sum is the largest that is at most `room`.

    Bit k of `sums` is set if some of the lengths so far add up to k, as in the usual solution of
    the subset-sum problem.

    Args:
        room: tokens.
        used: a length of which one sequence is not available.
        rising: the lengths, sorted.
        left: the sequences of each length.
    """
    within = (1 << (room + 1)) - 1
    sums, steps = 1, []
    for length in reversed(rising):
        for _ in range(min(len(left[length]) - (length == used), room // length)):
            if sums >> room:  # the row can be full
                break
            steps.append((length, sums))
            sums |= (sums << length) & within
    total, chosen = sums.bit_length() - 1, []
    for length, before in reversed(steps):
        if not before >> total & 1:  # no sum without it
            chosen.append(length)
            total -= length
    return chosen


def _repeat(rows: list[list[int]], lengths: Sequence[int], capacity: int) -> None:
    """Adds sequences of other rows to rows that are filled to less than 90 %, in place."""
    places = sorted(range(len(lengths)), key=lambda place: lengths[place])
    rising = [lengths[place] for place in places]
    for row in rows:
        room = capacity - sum(lengths[place] for place in row)
        at = bisect.bisect_right(rising, room) - 1  # the longest that fits
        while room > (1 - FILLED) * capacity and at >= 0:
            if places[at] not in row:
                row.append(places[at])
                room -= rising[at]
            at = min(at - 1, bisect.bisect_right(rising, room) - 1)


def arrange(
    sequences: Sequence[Tokens], rows: Sequence[Sequence[int]], length: int
) -> dict[str, np.ndarray]:
    """The arrays of packed sequences; a sequence of n + 1 tokens is n predictions.

    Args:
        sequences: at most `length` + 1 tokens each.
        rows: the places of the sequences in each row.
        length: predictions in a row.

    Returns:
        Arrays `(rows, length)`: `tokens` and `targets`, int32 ids; `weights`, float32, 1 for a
        prediction that is trained; `segments`, int32, the number of the sequence in its row from
        1, 0 for padding; `positions`, int32, from 0 in each sequence.
    """
    shape = (len(rows), length)
    names = ("tokens", "targets", "segments", "positions")
    arrays: dict[str, np.ndarray] = {name: np.zeros(shape, np.int32) for name in names}
    arrays["weights"] = np.zeros(shape, np.float32)
    for row, places in enumerate(rows):
        begin = 0
        for segment, place in enumerate(places, start=1):
            one = sequences[place]
            end = begin + len(one.ids) - 1
            arrays["tokens"][row, begin:end] = one.ids[:-1]
            arrays["targets"][row, begin:end] = one.ids[1:]
            arrays["weights"][row, begin:end] = one.trained[1:]
            arrays["segments"][row, begin:end] = segment
            arrays["positions"][row, begin:end] = np.arange(end - begin)
            begin = end
    return arrays


def padding(batch: dict[str, np.ndarray]) -> float:
    """The fraction of a batch that is padding."""
    return float((batch["segments"] == 0).mean())


def worst_padding(rows: dict[str, np.ndarray], batch_size: int, seed: int) -> float:
    """The largest fraction of padding in a batch of the first epoch."""
    of_rows = (rows["segments"] == 0).mean(axis=1)
    steps = max(1, len(of_rows) // batch_size)
    epoch = batches.batch_at(of_rows, steps * batch_size, seed, 0)
    return float(epoch.reshape(steps, batch_size).mean(axis=1).max())


def weighted_nats(model: Any, batch: Any) -> dict[str, jax.Array]:
    """`nats`, the weighted sum of each row's losses, and `weight`, the sum of its weights.

    Args:
        model: a language model.
        batch: as `arrange` returns it.

    Returns:
        Two float arrays `(rows,)`.
    """
    losses = token_losses(
        model,
        batch["tokens"],
        batch["targets"],
        positions=batch["positions"],
        segments=batch["segments"],
    )
    return {
        "nats": (losses * batch["weights"]).sum(axis=-1),
        "weight": batch["weights"].sum(axis=-1),
    }


def weighted_loss(model: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """The summed loss of each row and the number of its trained tokens, for `training.Trainer`.

    Each trained token of a batch then has the same weight, whichever row it is in.
    """
    outputs = weighted_nats(model, batch)
    return outputs["nats"], outputs["weight"]
