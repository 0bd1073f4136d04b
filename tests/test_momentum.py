"""LoFT with momentum and LoFT-Muon: float64 exactness, and the paper's two lemmas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import hasty_compiler as hasty_compiler
from oracles import Factorization, MomentumHyper, Problem, dense_momentum, full_momentum
from trajectories import follow

import loft_jax

pytestmark = pytest.mark.usefixtures("x64")

STEPS = 30
SHAPES = {
    "tall": Problem(14, 6, 3, seed=1),
    "wide": Problem(6, 14, 3, seed=2),
    "rank one": Problem(10, 7, 1, seed=4),
    "full column rank": Problem(12, 5, 5, seed=5),
    "zero init": Problem(11, 8, 3, seed=7, zero_init=True),
    "scaled": Problem(8, 10, 2, seed=8, scale=2.5),
}
HYPERS = {
    "default": MomentumHyper(),
    "a first": MomentumHyper(moves_first="a"),
    "no alternation": MomentumHyper(alternate=False),
    "nesterov": MomentumHyper(nesterov=True, momentum=0.8),
}
ONLY_MUON = {
    "weight decay": MomentumHyper(weight_decay=0.5),
    "consistent rms": MomentumHyper(consistent_rms=0.2),
}
CASES = [(shape, "default") for shape in SHAPES]
CASES += [(shape, hyper) for shape in ("tall", "scaled") for hyper in HYPERS if hyper != "default"]


def optimizer(problem: Problem, hyper: MomentumHyper) -> optax.GradientTransformation:
    shared = {
        "nesterov": hyper.nesterov,
        "alternate": hyper.alternate,
        "moves_first": hyper.moves_first,
        "pairs": loft_jax.LoraPairs(scale=problem.scale),
    }
    if not hyper.muon:
        return loft_jax.loft_sgd(hyper.lr, hyper.momentum, **shared)
    shared |= {"weight_decay": hyper.weight_decay, "consistent_rms": hyper.consistent_rms}
    return loft_jax.loft_muon(hyper.lr, beta=hyper.momentum, **shared)


@pytest.mark.parametrize(("shape", "hyper"), CASES)
def test_loft_sgd_is_the_dense_method(shape, hyper, assert_close):
    problem, hyper = SHAPES[shape], HYPERS[hyper]
    got = follow(optimizer(problem, hyper), [problem], STEPS)
    assert_close(got, [dense_momentum(problem, hyper, STEPS)])


@pytest.mark.parametrize(
    ("shape", "hyper"),
    CASES + [(shape, hyper) for shape in ("wide", "scaled") for hyper in ONLY_MUON],
)
def test_loft_muon_is_the_dense_method(shape, hyper, assert_close):
    problem = SHAPES[shape]
    hyper = dataclasses.replace({**HYPERS, **ONLY_MUON}[hyper], muon=True)
    got = follow(optimizer(problem, hyper), [problem], STEPS)
    assert_close(got, [dense_momentum(problem, hyper, STEPS)])


@pytest.mark.parametrize("muon", [False, True], ids=["momentum", "muon"])
@pytest.mark.parametrize("moves_first", ["a", "b"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_at_full_rank_the_weight_moves_as_in_full_fine_tuning(
    muon, moves_first, nesterov, assert_close
):
    problem = Problem(8, 8, 8, seed=11)
    hyper = MomentumHyper(muon=muon, moves_first=moves_first, nesterov=nesterov)
    got = follow(optimizer(problem, hyper), [problem], STEPS)
    assert_close(got, [full_momentum(problem, hyper, STEPS)])


@pytest.mark.parametrize("nesterov", [False, True])
def test_at_full_rank_loft_muon_is_the_muon_of_optax(nesterov, assert_close):
    problem = Problem(8, 8, 8, seed=12)
    muon = optax.contrib.muon(0.02, eps=0.0, nesterov=nesterov)
    w = problem.weight(problem.u, problem.v)
    state, expected = muon.init(w), []
    for k in range(STEPS):
        updates, state = muon.update(problem.gradient(w, k), state, w)
        w = w + np.asarray(updates)
        expected.append(w)
    got = follow(loft_jax.loft_muon(0.02, eps=0.0, nesterov=nesterov), [problem], STEPS)
    assert_close(got, [expected])


@pytest.mark.parametrize("nesterov", [False, True])
def test_leaves_outside_pairs_move_as_in_the_muon_of_optax(nesterov):
    params = {"lora_a": jnp.eye(3, 2), "lora_b": jnp.ones((2, 4)), "head": jnp.ones(4)}
    gradients = {**params, "head": jnp.arange(4.0)}
    updates = []
    for make in (loft_jax.loft_muon, optax.contrib.muon):
        tx = make(0.1, eps=1e-8, nesterov=nesterov, adam_weight_decay=0.1)
        state = tx.init(params)
        for scale in (1.0, -2.0):
            scaled = jax.tree.map(lambda x, scale=scale: scale * x, gradients)
            of_step, state = tx.update(scaled, state, params)
        updates.append(of_step["head"])
    np.testing.assert_allclose(*updates, rtol=1e-5)


def test_lemma_1_in_the_right_subspaces_momentum_is_full_momentum(assert_close):
    problem = Factorization(10, 8, 3, seed=13)
    u, s, vt = np.linalg.svd(problem.a)
    problem.a = u[:, :3] * s[:3] @ vt[:3]  # the target of rank r
    x, y = np.random.default_rng(0).normal(size=(2, 3, 3))
    start = problem.with_factors(u[:, :3] @ x, vt[:3].T @ y)
    start.a = problem.a
    hyper = MomentumHyper(lr=0.02, momentum=0.9)
    expected = full_momentum(start, hyper, STEPS)
    assert_close(follow(optimizer(start, hyper), [start], STEPS), [expected])
    assert np.linalg.norm(expected[-1] - start.a) < np.linalg.norm(expected[0] - start.a)


def test_lemma_2_step_size_one_is_alternating_least_squares(assert_close):
    problem = Factorization(9, 7, 3, seed=14)
    got = follow(loft_jax.loft_sgd(1.0), [problem], 12)[0]
    u, v = problem.u, problem.v
    for k in range(12):
        if k % 2 == 0:
            v = np.linalg.lstsq(u, problem.a, rcond=None)[0].T
        else:
            u = np.linalg.lstsq(v, problem.a.T, rcond=None)[0].T
        assert_close(got[k], u @ v.T)


@pytest.mark.parametrize("muon", [False, True], ids=["momentum", "muon"])
def test_the_path_of_w_does_not_depend_on_the_factorization(muon, assert_close):
    problem, hyper = SHAPES["tall"], MomentumHyper(muon=muon)
    x = np.random.default_rng(1).normal(size=(3, 3))
    expected = follow(optimizer(problem, hyper), [problem], STEPS)
    other = problem.with_factors(problem.u @ x, problem.v @ np.linalg.inv(x).T)
    assert_close(follow(optimizer(other, hyper), [other], STEPS), expected)
    scaled = problem.with_factors(300 * problem.u, problem.v / 1e4, scale=1e4 / 300)
    assert_close(follow(optimizer(scaled, hyper), [scaled], STEPS), expected)


def test_the_path_of_loft_simple_does_depend_on_the_factorization():
    """Documented: it is a property of the method, and no rounding."""
    problem = SHAPES["tall"]
    x = np.random.default_rng(1).normal(size=(3, 3))
    other = problem.with_factors(problem.u @ x, problem.v @ np.linalg.inv(x).T)
    tx = loft_jax.loft_adamw(0.05, weight_decay=0.0, second_moment="diagonal")
    paths = [np.asarray(follow(tx, [p], STEPS)) for p in (problem, other)]
    assert np.abs(paths[0] - paths[1]).max() > 1e-2
