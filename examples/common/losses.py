"""The loss of a language model, computed in chunks of tokens so that logits are never whole."""

from typing import Any

import jax
import jax.numpy as jnp

CHUNK = 256
"""Tokens whose logits are held at a time."""


def token_losses(
    model: Any,
    tokens: jax.Array,
    targets: jax.Array,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    chunk: int = CHUNK,
) -> jax.Array:
    """The cross-entropy of each token in nats.

    Args:
        model: with `hidden`, from ids to the last hidden states, and `head`, from these to logits,
            as `models.llama.Llama` has.
        tokens: ids, int32 `(n, length)`.
        targets: the id that follows each token, int32 `(n, length)`. Any id will do where the loss
            is not used: multiply the losses by weights `(n, length)` for a masked loss.
        positions: the position of each token in its sequence, int32 `(n, length)`; None for
            0, 1, 2, ... in each row.
        segments: the sequence of each token, int32 `(n, length)`, for rows with several sequences:
            a token attends only to its own segment. None if each row is one sequence.
        chunk: tokens whose logits are held at a time.

    Returns:
        At least float32, `(n, length)`.
    """
    hidden = model.hidden(tokens, positions=positions, segments=segments)
    rows, length, width = hidden.shape
    # The length is divided, not the rows, because a mesh divides the rows.
    size = min(length, max(1, chunk // rows))
    count = -(-length // size)
    padding = count * size - length
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    hidden = hidden.reshape(rows, count, size, width).swapaxes(0, 1)
    targets = targets.reshape(rows, count, size).swapaxes(0, 1)

    @jax.checkpoint
    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, targets = chunk
        return cross_entropy(model.head(hidden), targets)

    losses = jax.lax.map(of_chunk, (hidden, targets))
    return losses.swapaxes(0, 1).reshape(rows, -1)[:, :length]


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The cross-entropy of each token: logits `(..., vocabulary)` and ids `(...)` to `(...)`."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # Not an index, which would gather a vocabulary that is sharded over devices.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.where(is_target, logits, 0).sum(-1)
