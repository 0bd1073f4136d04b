"""Float32 and bfloat16: what rounding may do, and what it must not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import hasty_compiler as hasty_compiler
from oracles import Hyper, Problem, conditioned, projector
from trajectories import follow, run

import loft_jax
from loft_jax.algorithm import basis as bases
from loft_jax.algorithm.adam import adam_scalars
from loft_jax.algorithm.basis import Basis, calibration_matrix, orthonormal_basis
from loft_jax.algorithm.calibrated import Calibrated
from loft_jax.algorithm.cross_terms import packed_quadratic, packed_size
from loft_jax.algorithm.sharded_dim import UNSHARDED
from loft_jax.baselines._matrices import gram_spectra, inverse_gram
from loft_jax.execution.rounding import stochastic_round

# Relative error of the path of W that float32 may show after 200 steps, by condition number of both
# factors. Measured: 2e-6 to 5e-4, which of them depends on the machine's order of summation: in the
# first step, whose cross terms are of rank one, entries tiny beside their row lose their digits.
DRIFT = {1.0: 2e-3, 1e2: 2e-3, 1e3: 2e-3, 1e4: 4e-3}


@pytest.mark.parametrize("factored", [False, True], ids=["calibrated", "factored"])
@pytest.mark.parametrize("condition", DRIFT)
def test_float32_follows_float64_over_200_steps(condition, factored, report):
    problem = Problem(48, 40, 4, seed=20, condition=condition)
    hyper = Hyper(lr=5e-3, factored=factored)
    single = np.array(run([problem], hyper, 200, np.float32)[0])
    with jax.enable_x64(True):
        double = np.array(run([problem], hyper, 200)[0])
    assert np.isfinite(single).all()
    start = problem.weight(problem.u, problem.v)
    errors = [
        np.linalg.norm(single[k] - double[k]) / np.linalg.norm(double[k] - start)
        for k in (0, 19, 199)
    ]
    name = "factored" if factored else "calibrated"
    report(
        f"float32 against float64, {name:10}, cond(U), cond(V) = {condition:.0e}: relative error "
        f"of W's path after 1, 20, 200 steps: " + ", ".join(f"{e:.1e}" for e in errors)
    )
    assert errors[-1] < DRIFT[condition]


OTHERS = {
    "diagonal": loft_jax.loft_adamw(2e-3, weight_decay=0.0, second_moment="diagonal"),
    "momentum": loft_jax.loft_sgd(2e-3, momentum=0.9),
    "muon": loft_jax.loft_muon(5e-3),
}
every_other = pytest.mark.parametrize("tx", OTHERS.values(), ids=OTHERS)


@every_other
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_float32_follows_float64_with_the_other_methods(condition, tx, report, request):
    problem = Problem(48, 40, 4, seed=20, condition=condition)
    single = np.array(follow(tx, [problem], 200, np.float32)[0])
    with jax.enable_x64(True):
        double = np.array(follow(tx, [problem], 200)[0])
    start = problem.weight(problem.u, problem.v)
    error = np.linalg.norm(single[-1] - double[-1]) / np.linalg.norm(double[-1] - start)
    report(f"float32 against float64, {request.node.callspec.id}, 200 steps: {error:.1e}")
    assert error < DRIFT[condition]


@every_other
@pytest.mark.filterwarnings("ignore:Both factors of these pairs are zero")
@pytest.mark.parametrize("kind", ["duplicate columns", "both zero", "rank over the smaller side"])
def test_degenerate_factors_do_not_blow_up_the_other_methods(kind, tx):
    problem = degenerate(kind)
    path = np.array(follow(tx, [problem], 40, np.float32)[0])
    start = problem.weight(problem.u, problem.v)
    assert np.isfinite(path).all()
    assert (np.abs(path[-1] - start).max() > 1e-2) == (kind != "both zero")
    assert np.abs(path - start).max() < 5


@every_other
@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_the_size_of_the_factors_does_not_matter_to_the_other_methods(size, tx):
    problem = Problem(20, 16, 3, seed=21)
    other = problem.with_factors(problem.u * size, problem.v / size)
    got, expected = (follow(tx, [p], 20, np.float32)[0] for p in (other, problem))
    np.testing.assert_allclose(got, expected, atol=2e-4)


ABLATIONS = {
    "no calibration": {"calibrate": False},
    "block 2 off": {"scale_gradient": False},
    "block 5 off": {"reconstruct": False},
    "simple, raw": {"reconstruct": False, "second_moment": "diagonal"},
    "blocks 2 and 5 off": {"scale_gradient": False, "reconstruct": False},
}


@pytest.mark.parametrize("options", ABLATIONS.values(), ids=ABLATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ablations_stay_finite_from_a_start_that_gives_one_direction(dtype, options):
    """A rank-one gradient and a zero factor: after the first step the factor has rank one."""
    rng = np.random.default_rng(0)
    target = 4 * np.outer(rng.normal(size=48), rng.normal(size=32))
    with jax.enable_x64(dtype == np.float64):
        params = {
            "lora_a": jnp.asarray(rng.normal(size=(48, 8)), dtype),
            "lora_b": jnp.zeros((8, 32), dtype),
        }
        tx = loft_jax.loft_adamw(3e-3, weight_decay=0.0, **options)
        loss = lambda p: 0.5 * jnp.mean((p["lora_a"] @ p["lora_b"] - target) ** 2)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), loss(params)

        _, losses = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, 300))(params)
        losses = np.asarray(losses)
    assert np.isfinite(losses).all()
    assert losses[-1] < 1e3 * losses[0]  # an ablation need not train; it must not explode


@pytest.mark.parametrize("keep_raw", [False, True], ids=["orthonormal", "raw"])
@pytest.mark.parametrize("condition", [1.0, 1e4, 1e6])
def test_the_calibration_of_a_resting_factor_is_a_projector(condition, keep_raw):
    v = conditioned(np.random.default_rng(3), 24, 4, condition).astype(np.float32)
    basis = orthonormal_basis(jnp.asarray(v), keep_raw=keep_raw)
    eigenvalues = np.abs(np.linalg.eigvals(calibration_matrix(basis.matrix, basis)))
    assert eigenvalues.max() < 1.1  # more would grow the moments, step after step


def test_a_moment_that_turns_from_its_squares_is_held():
    """LoFT (simple): the squares stay behind when the columns of the partner change places."""
    tx = loft_jax.scale_by_loft_adam(second_moment="diagonal", alternate=False)
    b = np.zeros((2, 6), np.float32)
    b[0, 0] = b[1, 1] = 1.0
    params = {"lora_a": jnp.ones((5, 2)), "lora_b": jnp.asarray(b)}
    quiet = {"lora_a": jnp.zeros((5, 2)), "lora_b": jnp.zeros((2, 6))}
    state = tx.init(params)
    for _ in range(50):
        grads = quiet | {"lora_a": quiet["lora_a"].at[:, 0].set(1.0)}
        _, state = tx.update(grads, state, params)
    params["lora_b"] = params["lora_b"][::-1]
    largest = 0.0
    for _ in range(2):
        updates, state = tx.update(quiet, state, params)
        largest = max(largest, float(jnp.abs(updates["lora_a"]).max()))
    assert 7.3 < largest < 73  # ten times Adam's own limit, where it would be 1e8


@pytest.mark.parametrize("second_moment", ["factored", "diagonal"])
def test_gradients_whose_squares_overflow_stop_the_step(second_moment):
    params = {"lora_a": jnp.eye(6, 2), "lora_b": jnp.eye(2, 5)}
    grads = jax.tree.map(lambda x: jnp.full_like(x, 1e25), params)
    tx = loft_jax.scale_by_loft_adam(second_moment=second_moment)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert all((x == 0).all() for x in jax.tree.leaves(updates))


# The Gram matrix rounds at the square of the condition; a direction that is dropped costs all of 1.
@pytest.mark.parametrize(("condition", "tolerance"), [(1.0, 1e-5), (30.0, 1e-3), (1e3, 0.3)])
def test_the_inverse_of_the_baselines_keeps_every_direction_that_float32_has(condition, tolerance):
    v = conditioned(np.random.default_rng(5), 512, 16, condition).astype(np.float32)
    expected = np.linalg.inv(v.T.astype(np.float64) @ v + 1e-6 * np.eye(16))
    got = inverse_gram(*gram_spectra([jnp.asarray(v)]), 1e-6)
    assert np.abs(got - expected).max() < tolerance * np.abs(expected).max()


def degenerate(kind: str) -> Problem:
    problem = Problem(12, 5, 8 if kind.startswith("rank") else 4, seed=22)
    if kind == "duplicate columns":
        problem.v[:, 3] = problem.v[:, 2]
    if kind == "both zero":
        problem.u, problem.v = 0 * problem.u, 0 * problem.v
    return problem


@pytest.mark.parametrize("factorize", [bases._eliminate, bases._cholesky])
@pytest.mark.parametrize("r", [1, 5, 16, 17, 40])
def test_gram_matrices_are_factorized_on_every_platform(r, factorize, x64):
    """By elimination on CPUs, by the Cholesky factorization of the platform elsewhere."""
    v = conditioned(np.random.default_rng(r), 50, r, 1e2)
    step = factorize(jnp.asarray(v.T @ v))
    np.testing.assert_allclose(step, np.linalg.inv(np.linalg.cholesky(v.T @ v)), atol=1e-8)


@pytest.mark.parametrize("factorize", [bases._eliminate, bases._cholesky])
@pytest.mark.parametrize(("r", "condition"), [(8, 1.0), (8, 1e2), (8, 1e4), (40, 1e4)])
def test_the_basis_is_orthonormal_in_float32(r, condition, factorize, monkeypatch):
    monkeypatch.setattr(bases, "_eliminate", factorize)
    v = conditioned(np.random.default_rng(0), 300, r, condition).astype(np.float32)
    q, l_inv, *_ = orthonormal_basis(jnp.asarray(v))
    np.testing.assert_allclose(q.T @ q, np.eye(r), atol=2e-6)
    np.testing.assert_allclose(
        q @ q.T, projector(v.astype(np.float64)), atol=3e-8 * condition + 1e-6
    )
    np.testing.assert_allclose(v @ l_inv.T, q, atol=1e-8 * condition + 1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_rank_deficient_factor_has_the_basis_of_its_span(dtype):
    rng = np.random.default_rng(1)
    v = conditioned(rng, 40, 6, 1.0)
    v[:, 5], v[:, 4], v[:, 0] = v[:, 3], v[:, 2] - v[:, 1], 0
    with jax.enable_x64(dtype == np.float64):
        q, l_inv, *_ = orthonormal_basis(jnp.asarray(v, dtype))
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(q @ q.T, projector(v), atol=20 * eps)
        # What multiplies a gradient stays of the size that the column space itself requires.
        assert np.abs(q @ l_inv).max() < 100


def test_a_zero_factor_has_a_zero_basis():
    q, l_inv, *_ = orthonormal_basis(jnp.zeros((5, 2)))
    assert not q.any()
    assert not l_inv.any()


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e15])
def test_the_basis_does_not_depend_on_the_size_of_the_factor(scale):
    v = conditioned(np.random.default_rng(2), 30, 4, 10.0).astype(np.float32)
    expected = orthonormal_basis(jnp.asarray(v)).q
    scaled = orthonormal_basis(jnp.asarray(v) * jnp.float32(scale)).q
    np.testing.assert_allclose(scaled, expected, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_the_adam_ratio_stays_within_its_bound(steps):
    # In the first steps P is of low rank, and most entries of v are what cancellation leaves.
    rng = np.random.default_rng(3)
    n = r = 16
    q = jnp.asarray(np.linalg.qr(rng.normal(size=(n, r)))[0], jnp.float32)
    mu, cross = jnp.zeros((200, r)), jnp.zeros((200, packed_size(r)))
    for _ in range(steps):
        # Gradients almost along one direction leave all others to cancellation, on any processor.
        along = q[rng.integers(n, size=200)]
        h = along + jnp.asarray(1e-4 * rng.normal(size=(200, r)), jnp.float32)
        mu = 0.9 * mu + 0.1 * h
        cross = Calibrated().advance(cross, h, None, None, 0.999, UNSHARDED)
    step = adam_scalars(steps, 0.9, 0.999, 0.0, jnp.float32)
    basis, m_hat = Basis(q, jnp.eye(r)), mu / step.correction1
    direction = Calibrated().direction(m_hat, cross, basis, step, UNSHARDED, 1)
    direction = direction @ q.T  # q is square: D itself
    assert np.abs(direction).max() <= float(step.bound) * (1 + 1e-5)
    # Unbounded, the first step's ratio goes far beyond it: the bound is not idle.
    second = jnp.maximum(cross @ packed_quadratic(q), 0) / step.correction2
    raw = np.abs(mu @ q.T / step.correction1) / np.sqrt(np.maximum(second, 1e-30))
    if steps == 1:
        assert raw.max() > 2 * float(step.bound)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_bound_is_what_cauchy_schwarz_gives(nesterov):
    usual = [(0.9, 0.999, k) for k in (1, 7, 3000)]
    for b1, b2, k in [*usual, (0.9, 0.81, 12), (0.5, 0.2, 9), (0.0, 0.0, 4), (0.0, 0.99, 30)]:
        age = np.arange(k)[::-1]
        a = (1 - b1) * np.power(b1, age) / (1 - b1**k)
        b = (1 - b2) * np.power(b2, age) / (1 - b2**k)
        if nesterov:
            a = a * b1 * (1 - b1**k) / (1 - b1 ** (k + 1))
            a[-1] += (1 - b1) / (1 - b1**k)
        with jax.enable_x64(True):
            scalars = adam_scalars(k, b1, b2, 0.0, jnp.float64, nesterov=nesterov)
            bound = float(scalars.bound)
        kept = b > 0
        np.testing.assert_allclose(bound, np.sqrt((a[kept] ** 2 / b[kept]).sum()), rtol=1e-9)
    assert np.isinf(adam_scalars(3, 0.9, 0.0, 0.0, jnp.float32).bound)


@pytest.mark.parametrize("b2", [0.9, 0.999, 0.9999, 0.999999])
def test_the_bound_does_not_bend_the_first_step_in_float32(b2):
    # At step 1 every ratio is 1, on the bound: full-rank Adam moves by the sign.
    params = {"lora_a": jnp.eye(3), "lora_b": jnp.eye(3)}
    g = jnp.asarray(np.random.default_rng(6).normal(size=(3, 3)), jnp.float32)
    tx = loft_jax.scale_by_loft_adam(b2=b2)
    updates, _ = tx.update({"lora_a": g, "lora_b": g}, tx.init(params), params)
    np.testing.assert_allclose(updates["lora_b"], np.sign(g), atol=2e-6)


@pytest.mark.parametrize("factored", [False, True], ids=["calibrated", "factored"])
@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_in_float32_too_the_size_of_the_factors_does_not_matter(size, factored):
    problem, hyper = Problem(20, 16, 3, seed=21), Hyper(lr=5e-3, factored=factored)
    other = problem.with_factors(problem.u * size, problem.v / size)
    got, expected = (run([p], hyper, 20, np.float32)[0] for p in (other, problem))
    np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.mark.filterwarnings("ignore:Both factors of these pairs are zero")
@pytest.mark.parametrize("factored", [False, True], ids=["calibrated", "factored"])
@pytest.mark.parametrize("kind", ["duplicate columns", "both zero", "rank over the smaller side"])
def test_degenerate_factors_train_without_blowing_up(kind, factored):
    problem = degenerate(kind)
    path = np.array(run([problem], Hyper(lr=1e-2, factored=factored), 40, np.float32)[0])
    start = problem.weight(problem.u, problem.v)
    assert np.isfinite(path).all()
    # 40 Adam steps of 0.01, each entry at most 7.3 of them: the weight cannot have gone far.
    assert np.abs(path - start).max() < 3
    assert (np.abs(path[-1] - start).max() > 1e-2) == (kind != "both zero")


def test_bfloat16_parameters_train_with_float32_state():
    rng = np.random.default_rng(4)
    target = rng.normal(size=(24, 3)) @ rng.normal(size=(3, 16))
    params = {
        "lora_a": jnp.asarray(rng.normal(size=(24, 3)), jnp.bfloat16),
        "lora_b": jnp.zeros((3, 16), jnp.bfloat16),
    }

    def loss(params):
        a, b = (params[f"lora_{f}"].astype(jnp.float32) for f in "ab")
        return jnp.mean((a @ b - target) ** 2)

    tx = loft_jax.loft_adamw(optax.linear_schedule(0.2, 0.0, 200))
    state, step = tx.init(params), jax.jit(jax.value_and_grad(loss))
    update = jax.jit(tx.update)
    first, _ = step(params)
    for _ in range(200):
        _, grads = step(params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state[0][2:]))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves((params, updates)))
    assert float(step(params)[0]) < 1e-2 * float(first)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0], ids=["no", "rare", "steady"])
def test_stochastic_rounding_is_unbiased_where_little_changes(share):
    """Entries whose gradient is zero, or mostly zero, or constant: only the step changes the bits.

    Of 64 runs, since without gradients the entries of one that meet stay together.
    """
    runs, steps, entries = 64, 2000, 32
    seen = jax.random.uniform(jax.random.key(0), (steps, runs, entries)) < share
    start = jnp.broadcast_to(jnp.linspace(1.0, 2.0, entries), (runs, entries))
    first_steps = 10_000 * jnp.arange(runs)

    def decay(kept, at):
        step, seen = at
        exact, rounded = kept
        advance = lambda nu: 0.999 * nu + 0.001 * seen
        new = advance(rounded.astype(jnp.float32))
        round_run = lambda x, first: stochastic_round(x, jnp.bfloat16, first + step)
        return (advance(exact), jax.vmap(round_run)(new, first_steps)), None

    first = (start, start.astype(jnp.bfloat16))
    (exact, rounded), _ = jax.lax.scan(decay, first, (jnp.arange(steps), seen))
    ratio = rounded.astype(jnp.float32).mean() / exact.mean()
    assert abs(ratio - 1) < 0.05
