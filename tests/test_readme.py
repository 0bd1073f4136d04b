"""The README's Python runs as printed."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["nnx", "linen"])
def test_the_uses_in_the_readme_train(block):
    names: dict = {}
    exec(block, names)
    x, y = jnp.ones((8, 64)), jnp.ones((8, 32))
    if "train_step" in names:
        losses = [names["train_step"](names["model"], names["optimizer"], x, y) for _ in range(9)]
    else:
        jax, optax, state, losses = names["jax"], names["optax"], names["state"], []
        frozen = state.params["kernel"]
        loss = lambda params: optax.l2_loss(state.apply_fn({"params": params}, x), y).mean()
        for _ in range(9):
            value, grads = jax.value_and_grad(loss)(state.params)
            state = state.apply_gradients(grads=grads)
            losses.append(value)
        assert (state.params["kernel"] == frozen).all()
    assert losses[-1] < losses[0]
