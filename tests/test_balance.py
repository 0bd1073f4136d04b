"""Balanced factors: the weight does not notice, and bfloat16 does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import hasty_compiler as hasty_compiler
from oracles import Hyper, Problem
from trajectories import follow, transformation

from benchmarks.cost import low_precision
from loft_jax import LoraPairs, balance_factors, loft_adamw, loft_muon, loft_sgd, scale_by_loft_adam
from loft_jax.algorithm.balance import balancing_matrices, is_unbalanced
from loft_jax.algorithm.jacobi import symmetric_eigen
from loft_jax.algorithm.pair import FactorPair
from loft_jax.execution import batching

gram = lambda x: jnp.asarray(x.T @ x)
grams = lambda u, v: FactorPair(gram(u), gram(v))


def orthonormal(rng: np.random.Generator, n: int, r: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(n, r)))[0]


def factors(r: int, decay: float, condition: float, dtype=np.float64) -> tuple[jax.Array, ...]:
    """Factors of a product with singular values ``decay ** k``, in a basis of this condition."""
    rng = np.random.default_rng(r)
    root = decay ** (np.arange(r) / 2)
    u, v = orthonormal(rng, 2 * r + 5, r) * root, orthonormal(rng, 3 * r + 2, r) * root
    x = orthonormal(rng, r, r) * np.geomspace(1, condition, r) @ orthonormal(rng, r, r)
    return jnp.asarray(u @ x, dtype), jnp.asarray(v @ np.linalg.inv(x).T, dtype)


@pytest.mark.parametrize("r", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("kind", ["random", "graded", "rank one", "identity"])
def test_eigenvectors_are_those_of_lapack(r, kind, x64, assert_close):
    rng = np.random.default_rng(r)
    square = rng.normal(size=(r, r))
    matrix = {
        "random": square + square.T,
        "graded": orthonormal(rng, r, r) * np.geomspace(1, 1e-6, r),
        "rank one": np.outer(square[0], square[0]),
        "identity": np.eye(r),
    }[kind]
    matrix = gram(matrix.T) if kind == "graded" else matrix
    values, vectors = symmetric_eigen(jnp.asarray(matrix))
    assert_close(np.sort(values), np.linalg.eigvalsh(matrix), 1e-10, "eigenvalues")
    assert_close((vectors * values) @ vectors.T, matrix, 1e-7, "eigenvectors")
    assert_close(vectors.T @ vectors, np.eye(r), 1e-13, "orthogonality of eigenvectors")


@pytest.mark.parametrize("r", [1, 2, 5, 16])
@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("condition", [1.0, 30.0])
def test_balanced_factors_are_the_singular_vectors(r, decay, condition, x64, assert_close):
    u, v = factors(r, decay, condition)
    matrices = balancing_matrices(grams(u, v))
    new_u, new_v = u @ matrices.a, v @ matrices.b
    assert_close(new_u @ new_v.T, u @ v.T, 1e-12, "product of balanced factors")
    singular = np.linalg.svd(u @ v.T, compute_uv=False)[:r]
    # Down to the floor both carry the root; the shift of the first Gram matrix is in the rest.
    kept = singular > 1e-2 * singular[0]
    for factor in (new_u, new_v):
        lengths = np.sort(jnp.sum(factor**2, axis=0))[::-1]
        assert_close(lengths[kept], singular[kept], 5e-2, "squared lengths")
        long = factor[:, jnp.sum(factor**2, axis=0) > 1e-2 * singular[0]]
        cosines = gram(long / jnp.linalg.norm(long, axis=0))
        assert_close(cosines, np.eye(long.shape[1]), 5e-2, "cosines between columns")
    assert not is_unbalanced(grams(new_u, new_v))


def test_what_one_factor_has_alone_stays_alive(x64, assert_close):
    rng = np.random.default_rng(0)
    u, column = rng.normal(size=(9, 4)), rng.normal(size=(7, 1))
    for a, b in ((u, column @ rng.normal(size=(1, 4))), (column @ rng.normal(size=(1, 4)), u)):
        matrices = balancing_matrices(grams(a, b))
        new_a, new_b = a @ matrices.a, b @ matrices.b
        assert_close(new_a @ new_b.T, a @ b.T, 1e-12, "product of rank one")
        whole = new_a if a is u else new_b
        assert np.linalg.matrix_rank(whole) == 4
        values = np.linalg.svd(whole, compute_uv=False)
        assert values[-1] > 5e-3 * values[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_is_done_where_nothing_helps(dtype):
    u, _ = factors(4, 0.5, 1e3, np.float32)
    zero = jnp.zeros((6, 4))
    infinite = zero.at[0, 0].set(jnp.inf)
    for v in (zero, infinite, infinite * jnp.nan):
        params = {"lora_a": u.astype(dtype), "lora_b": zero.T.astype(dtype)}
        updates = {"lora_a": jnp.zeros_like(u, dtype), "lora_b": v.T.astype(dtype)}
        new, _ = balance_factors().update(updates, optax.EmptyState(), params)
        wide = lambda x: x.astype(jnp.float32)
        jax.tree.map(np.testing.assert_array_equal, *jax.tree.map(wide, (new, updates)))


def test_pairs_that_are_balanced_keep_their_updates_to_the_last_bit():
    bad, good = factors(4, 0.5, 1e3, np.float32), factors(4, 0.5, 1.0, np.float32)
    good = tuple(x / jnp.linalg.norm(x, axis=0) for x in np.linalg.svd(good[0] @ good[1].T)[::2])
    good = jnp.asarray(good[0][:, :4]), jnp.asarray(good[1].T[:, :4])
    assert is_unbalanced(grams(*bad))
    assert not is_unbalanced(grams(*good))
    params = {
        f"layer{k}": {"lora_a": u[:13], "lora_b": v[:13].T} for k, (u, v) in enumerate((bad, good))
    }
    updates = jax.tree.map(lambda x: 1e-3 * x, params)
    new, _ = balance_factors().update(updates, optax.EmptyState(), params)
    jax.tree.map(np.testing.assert_array_equal, new["layer1"], updates["layer1"])
    assert np.abs(new["layer0"]["lora_a"] - updates["layer0"]["lora_a"]).max() > 1e-2


def test_a_few_matrices_are_computed_in_blocks(monkeypatch):
    """Of seven, two at a time: those that are needed, whichever they are, and a derivative."""
    monkeypatch.setattr(batching, "_BLOCK_ENTRIES", {"cpu": 2 * 9})
    stacks = [
        jax.random.normal(jax.random.key(k), (*batch, 3, 3))
        for k, batch in enumerate([(2, 2), (3,)])
    ]

    @jax.jit
    def squares(flags: jax.Array) -> tuple[jax.Array, jax.Array]:
        def total(size: jax.Array) -> tuple[jax.Array, jax.Array]:
            where = [flags[:4].reshape(2, 2), flags[4:]]
            scaled = [jnp.multiply(size, x) for x in stacks]
            found = batching.batched_over_groups(lambda x: x @ x, scaled, where=where)
            found = jnp.concatenate([x.reshape(-1, 3, 3) for x in found])
            return jnp.sum(jnp.where(flags[:, None, None], found, 0)), found

        slope, found = jax.grad(total, has_aux=True)(jnp.ones(()))
        return slope, found

    expected = np.concatenate([np.reshape(x @ x, (-1, 3, 3)) for x in stacks])
    for chosen in ([], [3], [0, 5], [1, 2, 6], range(7)):
        flags = np.isin(np.arange(7), list(chosen))
        slope, found = squares(jnp.asarray(flags))
        np.testing.assert_allclose(found[flags], expected[flags], rtol=1e-5)
        np.testing.assert_allclose(slope, 2 * expected[flags].sum(), rtol=1e-4)
        blocks = -(-flags.sum() // 2)
        assert np.any(found != 0, axis=(1, 2)).sum() <= 2 * blocks


# The weight does not notice.

STARTS = {
    "zero init": Problem(11, 8, 3, seed=7, zero_init=True, scale=2.0),
    "ill-conditioned": Problem(20, 9, 4, seed=10, condition=1e3),
    "full rank": Problem(7, 7, 7, seed=6, condition=10),
}
MAKE = {
    "calibrated": functools.partial(transformation, hyper=Hyper()),
    "factored": functools.partial(transformation, hyper=Hyper(factored=True)),
    "weight decay": functools.partial(transformation, hyper=Hyper(weight_decay=0.1)),
    "clipped": functools.partial(transformation, hyper=Hyper(max_norm=0.7)),
    "simultaneous": functools.partial(transformation, hyper=Hyper(alternate=False, lr=0.02)),
    "a first": functools.partial(transformation, hyper=Hyper(moves_first="a", nesterov=True)),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("make", MAKE)
def test_the_weight_takes_the_same_path(make, start, x64, assert_close):
    problem = STARTS[start]
    if start != "zero init":
        assert is_unbalanced(grams(problem.u, problem.v))
    steps = steps_before_chaos(start, alternate=make != "simultaneous")
    with_it, without = (
        follow(MAKE[make]([problem], balance=balance), [problem], steps)
        for balance in (True, False)
    )
    assert_close(with_it, without, 1e-10, f"path of W, {start}")


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("make", [loft_sgd, functools.partial(loft_sgd, momentum=0.9), loft_muon])
@pytest.mark.parametrize("alternate", [True, False])
def test_the_weight_takes_the_same_path_by_momentum(make, alternate, start, x64, assert_close):
    problem = STARTS[start]
    make = functools.partial(make, 0.01, alternate=alternate, pairs=LoraPairs(scale=problem.scale))
    steps = steps_before_chaos(start, alternate)
    with_it, without = (
        follow(make(balance=balance), [problem], steps) for balance in (True, False)
    )
    assert_close(with_it, without, 1e-10, f"path of W by momentum, {start}")


def steps_before_chaos(start: str, alternate: bool) -> int:
    """Simultaneous steps at full rank divide by the smallest singular value of the product.

    It passes near zero, and whatever rounds there is amplified: without balance, rotating the
    factors of a start of condition 100 changes AdamW's path by 3e-9 in 5 steps, and by 0.1 in 200.
    """
    return 3 if start == "full rank" and not alternate else 200


def test_a_chain_of_parts_is_the_whole(x64, assert_close):
    problem = STARTS["ill-conditioned"]
    chain = optax.chain(scale_by_loft_adam(), optax.scale(-0.01), balance_factors())
    whole = loft_adamw(0.01, weight_decay=0.0)
    got, expected = (follow(tx, [problem], 20) for tx in (chain, whole))
    assert_close(got, expected, 1e-12, "a chain with balance_factors")


@pytest.mark.parametrize("options", [{"second_moment": "diagonal"}, {"calibrate": False}])
def test_methods_that_depend_on_the_factors_keep_them(options, x64):
    problem = STARTS["ill-conditioned"]
    got, expected = (
        follow(loft_adamw(0.01, balance=balance, **options), [problem], 5)
        for balance in (True, False)
    )
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# bfloat16 and float16 do.


@pytest.mark.parametrize("method", ["calibrated", "factored", "muon", "sgd"])
@pytest.mark.parametrize(
    ("rows", "rank", "dtype"), [(1, 4, "bfloat16"), (8, 16, "bfloat16"), (1, 1, "float16")]
)
def test_few_rows_in_low_precision_are_as_good_as_in_float32(method, rows, rank, dtype):
    wide, low = low_precision.measure(method, [rows], rank, 8, dtypes=[dtype])
    # A loss that float32 takes to zero ends where the outputs are rounded.
    assert low["excess"] < 0.05 * wide["final"] + 1e-3
    assert low["peak"] < 1.1
    assert low["largest"] < 10


@pytest.mark.parametrize("method", ["calibrated", "sgd"])
def test_without_balance_few_rows_in_bfloat16_are_lost_or_bounded(method):
    """What the balance is for, and what `gradient_dtype` does in its place."""
    arms = low_precision.ARMS[1:]
    _, lost, bounded = low_precision.measure(method, [1], 4, 8, arms, ["bfloat16"])
    assert lost["excess"] > 0.1 and lost["largest"] > 1000
    assert bounded["excess"] < 5e-3
    assert bounded["peak"] < 1.1
    assert bounded["largest"] < 200


@pytest.mark.parametrize("decay", [0.9, 0.1, 0.01])
@pytest.mark.parametrize("method", ["calibrated", "factored", "muon"])
def test_a_cast_costs_no_more_than_the_precision_of_its_dtype(method, decay):
    rng = np.random.default_rng(0)
    target = orthonormal(rng, 64, 8) * decay ** np.arange(8) @ orthonormal(rng, 48, 8).T
    target = jnp.asarray(16 * target, jnp.float32)
    params = {
        "lora_a": jnp.asarray(rng.normal(size=(64, 8)) / 8, jnp.float32),
        "lora_b": jnp.zeros((8, 48)),
    }
    make = {"factored": functools.partial(loft_adamw, second_moment="factored")}
    make |= {"calibrated": loft_adamw, "muon": loft_muon}
    tx = make[method](optax.cosine_decay_schedule(0.02, 300))
    loss = lambda p: jnp.sum((p["lora_a"] @ p["lora_b"] - target) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, length=300)[0][0])
    a, b = (np.asarray(x) for x in run(params).values())
    for dtype in (jnp.bfloat16, jnp.float16):
        low = lambda x, dtype=dtype: np.asarray(jnp.asarray(x).astype(dtype), np.float32)
        error = np.linalg.norm(low(a) @ low(b) - a @ b) / np.linalg.norm(a @ b)
        assert error < jnp.finfo(dtype).eps / 2


@pytest.mark.parametrize("make", [loft_adamw, loft_sgd, loft_muon])
def test_steps_of_float16_factors_are_finite(make):
    half = lambda x: jnp.asarray(x, jnp.float16)
    rng = np.random.default_rng(0)
    draw = lambda shape, size: half(size * rng.normal(size=shape))
    params = {"lora_a": draw((64, 4), 0.1), "lora_b": draw((4, 32), 1e-5)}
    grads = {"lora_a": draw((64, 4), 1e-3), "lora_b": draw((4, 32), 1e-2)}
    tx = make(1e-3)
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(grads, state, params)
        assert all(x.dtype == jnp.float16 and np.isfinite(x).all() for x in updates.values())
    bad = {**grads, "lora_b": grads["lora_b"].at[0, 0].set(jnp.inf)}
    updates, _ = tx.update(bad, state, params)
    assert not all(np.isfinite(x).all() for x in updates.values())
