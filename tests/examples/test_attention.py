"""Attention in blocks, packed rows, recomputation, and the loss in chunks change no result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from optimizers import hasty_compiler as hasty_compiler

from common import losses
from common.models import attention
from common.models.gpt2 import GPT2, GPT2Config
from common.models.llama import Llama
from common.models.llama_config import LayerKind, LlamaConfig, Rope

LENGTH = 20
GEMMA = LlamaConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    layer_kinds=(LayerKind(Rope(1e4), window=3), LayerKind(None), LayerKind(Rope(1e4), window=3)),
    sandwich_norm=True,
    qk_norm=True,
)
SMALL_GPT2 = GPT2Config(31, 16, 24, num_hidden_layers=2, num_attention_heads=4)
MODELS = {"gemma": (Llama, GEMMA), "gpt2": (GPT2, SMALL_GPT2)}


def make(name, **options):
    kind, config = MODELS[name]
    return kind(config, rngs=nnx.Rngs(0), **options)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def dense_attention(q, k, v, scale, window, segments):
    """The definition, with loops over the batch and the heads."""
    mixed = np.zeros(q.shape)
    groups = q.shape[2] // k.shape[2]
    for row in range(len(q)):
        for head in range(q.shape[2]):
            of_q, of_k, of_v = q[row, :, head], k[row, :, head // groups], v[row, :, head // groups]
            scores = scale * of_q @ of_k.T
            for i in range(len(scores)):
                for j in range(len(scores)):
                    outside = j > i or (window is not None and i - j >= window)
                    if outside or segments[row, i] != segments[row, j]:
                        scores[i, j] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            mixed[row, :, head] = weights / weights.sum(axis=1, keepdims=True) @ of_v
    return mixed


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_in_blocks_is_the_definition(window, packed, x64, monkeypatch):
    monkeypatch.setattr(attention, "MIN_BLOCK", 6)  # four blocks, the last one shorter
    q, k, v = draw(2, LENGTH, 4, 3), draw(2, LENGTH, 2, 3, seed=1), draw(2, LENGTH, 2, 3, seed=2)
    segments = np.stack([np.arange(LENGTH) // 9, np.arange(LENGTH) // 4])
    of_rows = jnp.asarray(segments) if packed else None
    run = lambda q: attention.attend(
        q, jnp.asarray(k), jnp.asarray(v), scale=0.7, window=window, segments=of_rows
    )
    expected = dense_attention(q, k, v, 0.7, window, segments if packed else 0 * segments)
    # `jax.nn.dot_product_attention` computes the softmax in float32 whatever its inputs are.
    np.testing.assert_allclose(jax.jit(run)(jnp.asarray(q)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_is_its_sequences_one_by_one(name):
    model = jax.jit(make(name))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, LENGTH // 2)))
    alone = model(ids)
    places = jnp.arange(LENGTH)[None]
    packed = model(ids.reshape(1, -1), places % (LENGTH // 2), places // (LENGTH // 2))
    np.testing.assert_allclose(packed.reshape(alone.shape), alone, rtol=0, atol=2e-5)
    # The model sees the difference between a packed row and a single sequence.
    assert np.abs(packed - model(ids.reshape(1, -1))).max() > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_layers_have_the_same_gradient(name, x64):
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, LENGTH + 1)))

    @functools.partial(jax.jit, static_argnames="remat")
    def gradient(remat):
        graphdef, weights = nnx.split(make(name, remat=remat))
        weights = jax.tree.map(lambda x: x.astype(jnp.float64), weights)
        loss = lambda w: losses.token_losses(nnx.merge(graphdef, w), ids[:, :-1], ids[:, 1:]).sum()
        return jax.value_and_grad(loss)(weights)

    for one, other in zip(
        jax.tree.leaves(gradient(remat=True)), jax.tree.leaves(gradient(remat=False)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-10)


class Head:
    """A model of one matrix: its input is the hidden state."""

    def __init__(self, weights):
        self.weights = weights

    def hidden(self, hidden, **_):
        return hidden

    def head(self, hidden):
        return hidden @ self.weights


@pytest.mark.parametrize("chunk", [1, 6, 1000])
def test_the_loss_in_chunks_is_the_definition_with_its_gradient(chunk, x64):
    hidden, weights = draw(3, 7, 5), draw(5, 11, seed=1)
    targets = np.random.default_rng(2).integers(0, 11, (3, 7))
    scale = draw(3, 7, seed=3)  # weights of the tokens

    def total(hidden, weights):
        found = losses.token_losses(Head(weights), hidden, jnp.asarray(targets), chunk=chunk)
        return (found * scale).sum(), found

    both = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (_, found), gradients = jax.jit(both)(jnp.asarray(hidden), jnp.asarray(weights))
    logits = hidden @ weights
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    right = np.eye(11)[targets]
    of_logits = (probabilities - right) * scale[..., None]
    np.testing.assert_allclose(found, -np.log((probabilities * right).sum(-1)), atol=1e-12)
    np.testing.assert_allclose(gradients[0], of_logits @ weights.T, atol=1e-12)
    np.testing.assert_allclose(
        gradients[1], np.einsum("nlh,nlv->hv", hidden, of_logits), atol=1e-12
    )
