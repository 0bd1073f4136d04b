"""Float64 exactness, against the dense oracles: what "it is right" means."""

import dataclasses

import numpy as np
import pytest
from oracles import (
    Factorization,
    Head,
    Hyper,
    Problem,
    adamw,
    algorithm_1,
    dense_loft,
    gd_with_momentum,
)
from trajectories import run

pytestmark = pytest.mark.usefixtures("x64")

STEPS = 30
SHAPES = {
    "tall": Problem(14, 6, 3, seed=1),
    "wide": Problem(6, 14, 3, seed=2),
    "square": Problem(9, 9, 4, seed=3),
    "rank one": Problem(10, 7, 1, seed=4),
    "full column rank": Problem(12, 5, 5, seed=5),
    "full rank": Problem(7, 7, 7, seed=6),
    "zero init": Problem(11, 8, 3, seed=7, zero_init=True),
    "scaled": Problem(8, 10, 2, seed=8, scale=2.5),
    "scaled, zero init": Problem(8, 10, 4, seed=9, scale=0.125, zero_init=True),
    "ill-conditioned": Problem(20, 9, 4, seed=10, condition=1e4),
}
HYPERS = {
    "default": Hyper(),
    "a first": Hyper(moves_first="a"),
    "no alternation": Hyper(alternate=False, lr=0.02),
    "weight decay": Hyper(weight_decay=0.1),
    "clipped": Hyper(max_norm=0.7),
    "clipped, no alternation": Hyper(max_norm=0.7, alternate=False, lr=0.02),
    "other decays": Hyper(b1=0.5, b2=0.6, eps=1e-3),
    "no momentum": Hyper(b1=0.0, b2=0.9),
}


# Every shape with the defaults, every hyper-parameter on a tall and on a wide weight.
CASES = [(shape, "default") for shape in SHAPES]
CASES += [(shape, hyper) for shape in ("tall", "scaled") for hyper in HYPERS if hyper != "default"]


@pytest.mark.parametrize("factored", [False, True], ids=["calibrated", "factored"])
@pytest.mark.parametrize(("shape", "hyper"), CASES)
def test_loft_is_the_dense_method(shape, hyper, factored, assert_close):
    problem, hyper = SHAPES[shape], dataclasses.replace(HYPERS[hyper], factored=factored)
    got, expected = run([problem], hyper, STEPS), dense_loft([problem], hyper, STEPS)
    name = f"dense method, {'factored' if factored else 'calibrated'}, cond {problem.condition:.0e}"
    assert_close(got, expected, 1e-10 if problem.condition == 1 else 1e-9, name)


@pytest.mark.parametrize("calibrate", [True, False], ids=["calibrated", "uncalibrated"])
@pytest.mark.parametrize("hyper", ["no alternation", "weight decay", "other decays"])
@pytest.mark.parametrize("shape", ["tall", "rank one", "scaled"])
def test_loft_is_algorithm_1(shape, hyper, calibrate, assert_close):
    problem, hyper = SHAPES[shape], HYPERS[hyper]
    expected = algorithm_1(problem, hyper, STEPS, calibrate)
    # Raw cross terms lose digits that the orthonormal basis keeps: the oracle limits this.
    assert_close(run([problem], hyper, STEPS, calibrate=calibrate), [expected], 1e-9)


@pytest.mark.parametrize("factored", [False, True], ids=["calibrated", "factored"])
@pytest.mark.parametrize("moves_first", ["a", "b"])
@pytest.mark.parametrize("condition", [1.0, 1e2])
@pytest.mark.parametrize("decays", [(0.9, 0.999), (0.0, 0.0)])
def test_full_rank_loft_is_adamw(decays, condition, moves_first, factored, assert_close):
    problem = Problem(8, 8, 8, seed=11, condition=condition)
    b1, b2 = decays
    eps = 0.0 if factored else 1e-8
    hyper = Hyper(b1=b1, b2=b2, eps=eps, moves_first=moves_first, factored=factored)
    # With b2 = 0 the step is the sign of the last gradient, from cross terms of rank one: entries
    # near zero lose digits to cancellation in any form of eq. (9).
    tolerance = 1e-10 if b2 > 0 else 1e-8 if factored else 1e-6
    name = "full rank is AdamW" + ", b2 = 0" * (b2 == 0) + ", factored" * factored
    assert_close(run([problem], hyper, STEPS), [adamw(problem, hyper, STEPS)], tolerance, name)


def test_full_rank_loft_with_weight_decay_is_adamw_where_the_base_is_zero(assert_close):
    problem = Problem(8, 8, 8, seed=12, zero_base=True)
    hyper = Hyper(weight_decay=0.3)
    assert_close(run([problem], hyper, STEPS), [adamw(problem, hyper, STEPS)])


# With epsilon far above the gradients Adam is gradient descent with (bias-corrected) momentum, the
# learning rate divided by epsilon: that makes the paper's lemmas statements about loft_adamw.
HUGE = 1e13


def test_lemma_1_in_the_right_subspaces_momentum_is_full_momentum(assert_close):
    problem = Factorization(10, 8, 3, seed=13)
    u, s, vt = np.linalg.svd(problem.a)
    problem.a = u[:, :3] * s[:3] @ vt[:3]  # the target of rank r
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 3))
    start = problem.with_factors(u[:, :3] @ x, vt[:3].T @ y)
    start.a = problem.a
    hyper = Hyper(lr=0.1 * HUGE, eps=HUGE)
    expected = gd_with_momentum(start, 0.1, hyper.b1, STEPS)
    assert_close(run([start], hyper, STEPS), [expected])
    assert np.linalg.norm(expected[-1] - start.a) < np.linalg.norm(expected[0] - start.a)


def test_lemma_2_step_size_one_is_alternating_least_squares(assert_close):
    problem = Factorization(9, 7, 3, seed=14)
    got = run([problem], Hyper(lr=HUGE, eps=HUGE, b1=0.0), 12)[0]
    u, v = problem.u, problem.v
    for k in range(12):
        if k % 2 == 0:
            v = np.linalg.lstsq(u, problem.a, rcond=None)[0].T
        else:
            u = np.linalg.lstsq(v, problem.a.T, rcond=None)[0].T
        assert_close(got[k], u @ v.T)


@pytest.mark.parametrize("factored", [False, True], ids=["calibrated", "factored"])
@pytest.mark.parametrize("hyper", ["default", "weight decay", "clipped, no alternation"])
def test_the_path_of_w_does_not_depend_on_the_factorization(hyper, factored, assert_close):
    problem, hyper = SHAPES["tall"], dataclasses.replace(HYPERS[hyper], factored=factored)
    x = np.random.default_rng(1).normal(size=(3, 3))
    other = problem.with_factors(problem.u @ x, problem.v @ np.linalg.inv(x).T)
    assert_close(run([other], hyper, STEPS), run([problem], hyper, STEPS))
    scaled = problem.with_factors(300 * problem.u, problem.v / 1e4, scale=1e4 / 300)
    assert_close(run([scaled], hyper, STEPS), run([problem], hyper, STEPS))


@pytest.mark.parametrize("factored", [False, True], ids=["calibrated", "factored"])
@pytest.mark.parametrize("hyper", ["default", "a first", "clipped", "no alternation"])
def test_exchanging_the_factors_transposes_the_path(hyper, factored, assert_close):
    problem, hyper = SHAPES["wide"], dataclasses.replace(HYPERS[hyper], factored=factored)
    exchanged = dataclasses.replace(hyper, moves_first="ab".replace(hyper.moves_first, ""))
    got = run([problem.transposed()], exchanged, STEPS)[0]
    assert_close([w.T for w in got], run([problem], hyper, STEPS)[0])


@pytest.mark.parametrize("hyper", ["default", "clipped", "clipped, no alternation"])
def test_pairs_and_other_leaves_train_together_under_one_norm(hyper, assert_close):
    problems = [SHAPES["tall"], SHAPES["scaled"], SHAPES["zero init"]]
    hyper, head = dataclasses.replace(HYPERS[hyper], weight_decay=0.1), Head(6, STEPS)
    got = run(problems, hyper, STEPS, head=head)
    expected = dense_loft(problems, hyper, STEPS, head=head)
    for ours, dense in zip(got, expected, strict=True):
        assert_close(ours, dense)
