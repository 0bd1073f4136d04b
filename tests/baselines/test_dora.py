"""DoRA, against the paper's formulas and its gradients by hand, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import hasty_compiler as hasty_compiler

from loft_jax import loft_adamw
from loft_jax.baselines._dora import dora_init, dora_output, dora_weight

SCALE = 0.7


class Oracle:
    """Eq. (5) and its gradients, column by column, in the layout ``x @ W``."""

    def __init__(self, w0, m, a, b):
        self.w0, self.m, self.a, self.b = w0, m, a, b
        self.v = w0 + SCALE * a @ b
        self.norms = np.array([np.sqrt((column**2).sum()) for column in self.v.T])
        self.weight = np.stack(
            [m[j] * self.v[:, j] / self.norms[j] for j in range(w0.shape[1])], axis=1
        )

    def gradients(self, g, detached):
        """Of ``m``, ``a`` and ``b``, given that of the weight: eqs. (6) and (7), and (11)."""
        dm, dv = np.zeros_like(self.m), np.zeros_like(self.v)
        for j, norm in enumerate(self.norms):
            v, of_column = self.v[:, j], g[:, j]
            dm[j] = of_column @ v / norm
            projection = 0 if detached else np.outer(v, v) / norm**2
            dv[:, j] = self.m[j] / norm * (np.eye(len(v)) - projection) @ of_column
        return dm, SCALE * dv @ self.b.T, SCALE * self.a.T @ dv


def problem(m=9, n=6, r=3, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in [(m, n), (n,), (m, r), (r, n)]]


def arrays(values):
    return [jnp.asarray(x) for x in values]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(9, 6, 3), (4, 11, 2), (5, 5, 1)])
def test_weight_and_output_are_the_papers(shape, assert_close):
    values = problem(*shape)
    x = np.random.default_rng(1).normal(size=(2, 7, shape[0]))
    expected = Oracle(*values).weight
    for detach_norm in (True, False):
        got = dora_weight(*arrays(values), SCALE, detach_norm=detach_norm)
        assert_close(got, expected)
        y = dora_output(jnp.asarray(x), *arrays(values), SCALE, detach_norm=detach_norm)
        assert_close(y, x @ expected)


@pytest.mark.usefixtures("x64")
def test_dropout_applies_to_what_the_adapter_adds(assert_close):
    values = problem()
    rng = np.random.default_rng(1)
    x = rng.normal(size=(7, 9))
    dropped = x * rng.integers(0, 2, size=x.shape) * 2
    y = dora_output(*arrays([x, *values]), SCALE, dropped=jnp.asarray(dropped))
    w0, oracle = values[0], Oracle(*values)
    assert_close(y, x @ w0 + dropped @ (oracle.weight - w0))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("detach_norm", [True, False], ids=["constant norm", "full"])
def test_gradients_are_the_papers(detach_norm, assert_close):
    values = problem()
    rng = np.random.default_rng(1)
    x, dy = rng.normal(size=(7, 9)), rng.normal(size=(7, 6))
    expected = Oracle(*values).gradients(x.T @ dy, detach_norm)
    kernel, *trained = arrays(values)
    of_weight = lambda *leaves: x @ dora_weight(kernel, *leaves, SCALE, detach_norm=detach_norm)
    of_output = lambda *leaves: dora_output(
        jnp.asarray(x), kernel, *leaves, SCALE, detach_norm=detach_norm
    )
    for output in (of_weight, of_output):
        got = jax.grad(lambda *p, f=output: jnp.sum(dy * f(*p)), argnums=(0, 1, 2))(*trained)
        for ours, theirs in zip(got, expected, strict=True):
            assert_close(ours, theirs)


@pytest.mark.usefixtures("x64")
def test_the_constant_norm_is_the_default(assert_close):
    kernel, m, a, b = arrays(problem())
    of = lambda **options: jax.grad(lambda b: dora_weight(kernel, m, a, b, **options)[0].sum())(b)
    assert_close(of(), of(detach_norm=True))
    assert float(jnp.abs(of() - of(detach_norm=False)).max()) > 1e-2


@pytest.mark.usefixtures("x64")
def test_a_zero_adapter_is_the_pretrained_weight(assert_close):
    kernel, _, a, b = arrays(problem())
    magnitude = dora_init(kernel)
    assert_close(magnitude, np.linalg.norm(kernel, axis=0))
    assert_close(dora_weight(kernel, magnitude, a, 0 * b, SCALE), kernel)


@pytest.mark.usefixtures("x64")
def test_the_magnitude_alone_is_the_norm_of_each_output(assert_close):
    kernel, magnitude, a, b = arrays(problem())
    weight = dora_weight(kernel, magnitude, a, b, SCALE)
    assert_close(jnp.linalg.norm(weight, axis=0), jnp.abs(magnitude))


@pytest.mark.usefixtures("x64")
def test_a_full_gradient_does_not_change_the_lengths_of_the_direction(assert_close):
    """The paper's remark on eq. (6): it is orthogonal to each column of the direction."""
    kernel, m, a, b = arrays(problem())
    weight = lambda v: dora_weight(v, m, a, 0 * b, detach_norm=False)
    loss = lambda v: jnp.sum(jnp.tanh(weight(v)))
    assert_close(jnp.sum(jax.grad(loss)(kernel) * kernel, axis=0), np.zeros(6))


@pytest.mark.usefixtures("x64")
def test_at_full_rank_loft_trains_the_direction_as_adamw(assert_close):
    """The magnitude beside the factors is trained by AdamW in both."""
    kernel, _, a, b = arrays(problem(6, 6, 6))
    targets = arrays(np.random.default_rng(1).normal(size=(40, 6, 6)))
    hyper = {"eps": 0.0, "weight_decay": 0.0}
    loft, adamw = loft_adamw(0.01, **hyper), optax.adamw(0.01, **hyper)
    weight_of = lambda p: dora_weight(kernel, p["m"], p["lora_a"], p["lora_b"])
    weight_of_direction = lambda p: dora_weight(
        p["v"], p["m"], jnp.zeros((6, 1)), jnp.zeros((1, 6))
    )

    def path(tx, weight, params):
        def step(carry, target):
            params, state = carry
            gradients = jax.grad(lambda p: jnp.sum((weight(p) - target) ** 2))(params)
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), weight(params)

        return jax.lax.scan(step, (params, tx.init(params)), jnp.stack(targets))[1]

    m = dora_init(kernel)
    assert_close(
        path(loft, weight_of, {"m": m, "lora_a": a, "lora_b": b}),
        path(adamw, weight_of_direction, {"m": m, "v": kernel + a @ b}),
    )


@pytest.mark.parametrize("detach_norm", [True, False])
def test_an_output_of_zeros_stays_zero_without_nan(detach_norm):
    kernel, _, a, b = arrays(problem())
    kernel, b = kernel.at[:, 2].set(0), b.at[:, 2].set(0)
    loss = lambda m, b: jnp.sum(dora_weight(kernel, m, a, b, detach_norm=detach_norm) ** 2)
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(dora_init(kernel), b)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
    assert (dora_weight(kernel, dora_init(kernel), a, b)[:, 2] == 0).all()


@pytest.mark.usefixtures("x64")
def test_a_stack_of_layers_is_mapped_over_and_compiled(assert_close):
    layers = [problem(seed=seed) for seed in range(3)]
    stacked = [jnp.stack(x) for x in zip(*layers, strict=True)]
    got = jax.jit(jax.vmap(lambda *leaves: dora_weight(*leaves, SCALE)))(*stacked)
    assert_close(got, np.stack([Oracle(*layer).weight for layer in layers]))


def test_low_precision_takes_norms_in_float32():
    kernel, m, a, b = (x.astype(jnp.bfloat16) for x in arrays(problem(m=4096)))
    assert dora_init(kernel).dtype == jnp.bfloat16
    expected = Oracle(*(np.float64(x) for x in (kernel, m, a, b)))
    got = dora_weight(kernel, m, a, b, SCALE)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(got), expected.weight, rtol=2**-8, atol=1e-6)
    x = jnp.ones((2, 4096), jnp.bfloat16)
    assert dora_output(x, kernel, m, a, b, SCALE).dtype == jnp.bfloat16


def test_shapes_that_do_not_fit_are_refused():
    kernel, m, a, b = arrays(problem())
    with pytest.raises(ValueError, match=r"magnitude is \(6,\).* got \(9,\)"):
        dora_weight(kernel, kernel[:, 0], a, b)
    with pytest.raises(ValueError, match=r"dora_output: .* \(r, 6\), got"):
        dora_output(kernel.T, kernel, m, a, b.T)
    with pytest.raises(ValueError, match=r"one matrix .* \(6,\)"):
        dora_init(m)
