"""Text generation with a language model: greedy or sampled, in batches, with a cache."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

_MULTIPLE = 32
"""Prompts are padded to a multiple of this many tokens, so that few lengths are compiled."""


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
    (found,) = complete(model, [ids], length=length, temperature=temperature, seed=seed)
    return tokenizer.decode([*ids, *found])


def complete(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    length: int,
    stop: Sequence[int] = (),
    batch_size: int = 16,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continues prompts.

    Args:
        model: with `cache`, `extend` and `head`, as `llama.Llama` has.
        prompts: ids, at least one each.
        length: the most tokens to generate for a prompt.
        stop: ids that end a text; they are not part of the result.
        batch_size: prompts that are continued at a time.
        temperature: 0 takes the most likely token; otherwise tokens are drawn.
        top_p: tokens are drawn from the most likely ones whose probabilities add up to this.
        seed: of the drawn tokens.

    Returns:
        The ids that follow each prompt, without the prompt.
    """
    if not all(prompts):
        raise ValueError("a prompt has no tokens: begin it with the model's bos token")
    # Prompts of similar length share a batch.
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    found: list[list[int]] = [[] for _ in prompts]
    for begin in range(0, len(order), batch_size):
        places = order[begin : begin + batch_size]
        width = -(-len(prompts[places[-1]]) // _MULTIPLE) * _MULTIPLE
        # The last batch has other prompts again, so that all batches have one size.
        filled = (places * batch_size)[: min(batch_size, len(prompts))]
        tokens = np.zeros((len(filled), width), np.int32)
        for row, place in enumerate(filled):
            tokens[row, width - len(prompts[place]) :] = prompts[place]
        first = np.array([width - len(prompts[place]) for place in filled], np.int32)
        key = jax.random.fold_in(jax.random.key(seed), begin)
        stops = np.array(stop, np.int32)
        made = _complete(
            model,
            jnp.asarray(tokens),
            jnp.asarray(first),
            jnp.asarray(stops),
            key,
            length=length,
            temperature=temperature,
            top_p=top_p,
        )
        for place, row in zip(places, np.asarray(made), strict=False):
            ends = np.flatnonzero(np.isin(row, stops))
            found[place] = row[: ends[0] if len(ends) else length].tolist()
    return found


@functools.partial(nnx.jit, static_argnames=("length", "temperature", "top_p"))
def _complete(
    model: Any,
    tokens: jax.Array,
    first: jax.Array,
    stop: jax.Array,
    key: jax.Array,
    *,
    length: int,
    temperature: float,
    top_p: float,
) -> jax.Array:
    """The ids that follow `tokens` `(batch, width)`, whose sequences begin at `first`."""
    rows, width = tokens.shape

    def next_logits(tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        hidden, cache = model.extend(tokens, cache)
        return model.head(hidden[:, -1]).astype(jnp.float32), cache

    def unfinished(carry: Any) -> jax.Array:
        step, _, done, _, _ = carry
        return (step < length) & ~done.all()

    def add(carry: Any) -> Any:
        step, made, done, logits, cache = carry
        token = _choose(logits, jax.random.fold_in(key, step), temperature, top_p)
        made = made.at[:, step].set(token)
        logits, cache = next_logits(token[:, None], cache)
        return step + 1, made, done | jnp.isin(token, stop), logits, cache

    logits, cache = next_logits(tokens, model.cache(first, width + length))
    made = jnp.zeros((rows, length), jnp.int32)
    start = (jnp.int32(0), made, jnp.zeros(rows, bool), logits, cache)
    return jax.lax.while_loop(unfinished, add, start)[1]


def _choose(logits: jax.Array, key: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """A token for each row of logits `(batch, vocabulary)`, int32 `(batch,)`."""
    if temperature == 0:
        return logits.argmax(axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_p < 1:
        falling = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(falling), axis=-1) - jax.nn.softmax(falling)
        least = jnp.where(before < top_p, falling, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)
