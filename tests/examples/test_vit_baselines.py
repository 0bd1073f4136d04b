"""Prompts and bottlenecks compute what their papers write, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.models import vit, vit_baselines
from common.models.stacking import scan_layers

CONFIG = vit.VitConfig(
    kind="vit", hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
)


@pytest.fixture
def model() -> vit.Vit:
    return vit.Vit(CONFIG, 14, 3, rngs=nnx.Rngs(0))


@pytest.fixture
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, 5, 8))


def layers_of(layers: nnx.Module) -> list:
    """The stacked layers, each by itself."""
    graphdef, state = nnx.split(layers)
    at = lambda n: jax.tree.map(lambda w: w[n], state)
    return [nnx.merge(graphdef, at(n)) for n in range(2)]


def test_each_layer_attends_to_prompts_of_its_own(model, x):
    prompted = vit_baselines.add_prompts(model, 3, rngs=nnx.Rngs(2))
    prompts = prompted.layers.prompts[...]
    assert prompts.shape == (2, 3, 8)
    expected = x
    for layer, of_layer in zip(layers_of(model.layers), prompts, strict=True):
        # Before the patches here, behind them in the code: attention knows no order.
        both = jnp.concatenate([jnp.broadcast_to(of_layer, (2, 3, 8)), expected], axis=1)
        expected = layer(both)[:, 3:]
    np.testing.assert_allclose(scan_layers(prompted.layers, x), expected, atol=1e-5)
    assert not np.allclose(expected, scan_layers(model.layers, x), atol=1e-3)


def test_bottlenecks_follow_attention_and_mlp(model, x):
    adapted = vit_baselines.add_bottlenecks(model, 4, rngs=nnx.Rngs(2))
    np.testing.assert_array_equal(scan_layers(adapted.layers, x), scan_layers(model.layers, x))
    trained = nnx.state(adapted, nnx.LoRAParam)
    assert len(jax.tree.leaves(trained)) == 8
    draw = lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape)
    nnx.update(adapted, jax.tree.map(draw, trained))

    def after(y, part, n):
        inner = jax.nn.gelu(y @ part.down[n] + part.down_bias[n])
        return y + inner @ part.up[n] + part.up_bias[n]

    attention, mlp = adapted.layers.attention, adapted.layers.mlp
    expected = x
    for n, layer in enumerate(layers_of(model.layers)):
        mixed = layer.attention(layer.layernorm_before(expected))
        expected = expected + after(mixed, attention, n)
        expected = expected + after(layer.mlp(layer.layernorm_after(expected)), mlp, n)
    found = scan_layers(adapted.layers, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
