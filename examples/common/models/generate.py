"""Text generation with a language model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer


def generate(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    length: int = 60,
    temperature: float = 0.7,
    seed: int = 0,
) -> str:
    """The prompt and `length` sampled tokens; at temperature 0, the most likely ones."""
    ids = tokenizer.encode(prompt).ids
    tokens = jnp.zeros((1, len(ids) + length), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids))
    key = jax.random.key(seed)
    tokens = _continue(model, tokens, jnp.int32(len(ids)), key, temperature=temperature)
    return tokenizer.decode(tokens[0].tolist())


@functools.partial(nnx.jit, static_argnames="temperature")
def _continue(
    model: Any, tokens: jax.Array, start: jax.Array, key: jax.Array, *, temperature: float
) -> jax.Array:
    """Fills `tokens` `(1, length)` from position `start` on.

    Each token needs a forward pass of the whole buffer; a causal model ignores the tokens that
    follow. At this length a key-value cache would save seconds and cost a page of code.
    """

    def add(position: jax.Array, tokens: jax.Array) -> jax.Array:
        logits = model.head(model.hidden(tokens)[:, position - 1])
        if temperature == 0:
            token = logits.argmax(axis=-1)
        else:
            draw = jax.random.fold_in(key, position)
            token = jax.random.categorical(draw, logits / temperature)
        return tokens.at[:, position].set(token.astype(tokens.dtype))

    return jax.lax.fori_loop(start, tokens.shape[1], add, tokens)
