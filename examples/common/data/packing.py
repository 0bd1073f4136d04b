"""Sequence packing: several short sequences share a row of a batch, so that little is padding.

A token attends only to the tokens of its own sequence, and its position counts from the beginning
of its sequence. The loss and its gradient are therefore those of the unpacked sequences.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..losses import token_losses
from .answers import Tokens

FILLED = 0.9
"""The filled part of a row below which `pack` looks for more sequences to move into it."""


def pack(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Distributes sequences over few rows: best fit in decreasing length.

    The longest sequence is placed first, each into the row with the least room that is enough.
    This leaves at most a few rows partly empty. Sequences from full rows are then moved into them,
    so that, where lengths allow it, every row is filled to 90 %.

    Args:
        lengths: of the sequences, each between 1 and `capacity`.
        capacity: of a row.
        seed: orders sequences of equal length.

    Returns:
        The places of the sequences in each row. Each sequence is in one row.

    Example:
        >>> pack([3, 5, 4, 2], capacity=8, seed=0)
        [[1, 0], [2, 3]]
    """
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room they have
    rooms = 0  # bit k is set if a row has room k
    for place in sorted(shuffled.tolist(), key=lambda place: -lengths[place]):
        length = lengths[place]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            rooms ^= 0 if with_room[room] else 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(place)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    _level(rows, lengths, capacity)
    return rows


def _level(rows: list[list[int]], lengths: Sequence[int], capacity: int) -> None:
    """Moves sequences from full rows into rows that are filled to less than 90 %, in place."""
    filled = [sum(lengths[place] for place in row) for row in rows]
    least = FILLED * capacity
    givers = [row for row in range(len(rows)) if filled[row] > least]
    for poor in range(len(rows)):
        for rich in givers:
            if filled[poor] >= least:
                break
            for place in reversed(rows[rich]):  # the shortest first
                length = lengths[place]
                if filled[rich] - length < least or filled[poor] + length > capacity:
                    break
                rows[rich].remove(place)
                rows[poor].append(place)
                filled[rich] -= length
                filled[poor] += length
                if filled[poor] >= least:
                    break


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
    arrays = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segments")}
    arrays["positions"] = np.zeros(shape, np.int32)
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
    """The part of a batch that is padding."""
    return float((batch["segments"] == 0).mean())


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


def weighted_loss(model: Any, batch: Any) -> jax.Array:
    """Losses `(rows,)` whose mean is the mean loss of the batch's trained tokens.

    Each trained token of a batch has the same weight, whichever row it is in.
    """
    outputs = weighted_nats(model, batch)
    return outputs["nats"] * (len(outputs["nats"]) / jnp.maximum(outputs["weight"].sum(), 1))
