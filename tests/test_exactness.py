"""LoFT-AdamW: float64 exactness, against the dense oracles: what "it is right" means."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import hasty_compiler as hasty_compiler
from oracles import (
    Head,
    Hyper,
    Problem,
    adamw,
    algorithm_1,
    dense_loft,
    simple_loft,
)
from trajectories import follow, run

from loft_jax import loft_adamw
from loft_jax.algorithm import cross_terms
from loft_jax.algorithm.cross_terms import (
    TWO_PRODUCTS_FROM,
    calibrate_cross_terms,
    packed_outer,
    packed_quadratic,
)

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
    "nesterov": Hyper(nesterov=True),
    "eps root": Hyper(eps_root=1e-2),
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


@pytest.mark.parametrize("r", [1, 3, TWO_PRODUCTS_FROM - 1, TWO_PRODUCTS_FROM])
def test_cross_terms_are_calibrated_at_any_rank(r, assert_close):
    rng = np.random.default_rng(r)
    h, matrix = rng.normal(size=(4, r)), rng.normal(size=(r, r)) / r**0.5
    dense = np.einsum("mi,mj,ik,jl->mkl", h, h, matrix, matrix)
    packed = calibrate_cross_terms(packed_outer(jnp.asarray(h)), jnp.asarray(matrix))
    row, col = np.triu_indices(r)
    assert_close(packed, dense[:, row, col], 1e-12, "calibration of cross terms")


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("r", [1, 2, 5])
def test_quadratic_forms_of_cross_terms_on_any_platform(r, platform, assert_close, monkeypatch):
    """A TPU picks entries by products where others gather."""
    monkeypatch.setattr(cross_terms, "traced_platform", lambda: platform)
    rng = np.random.default_rng(r)
    h, q = rng.normal(size=(6, r)), rng.normal(size=(4, r))
    squares = packed_outer(jnp.asarray(h)) @ packed_quadratic(jnp.asarray(q))
    assert_close(squares, (h @ q.T) ** 2, 1e-12, "squares from cross terms")


@pytest.mark.parametrize("calibrate", [True, False], ids=["calibrated", "uncalibrated"])
@pytest.mark.parametrize("hyper", ["no alternation", "weight decay", "other decays"])
@pytest.mark.parametrize("shape", ["tall", "rank one", "scaled"])
def test_loft_is_algorithm_1(shape, hyper, calibrate, assert_close):
    problem, hyper = SHAPES[shape], HYPERS[hyper]
    expected = algorithm_1(problem, hyper, STEPS, calibrate)
    # Raw cross terms lose digits that the orthonormal basis keeps: the oracle limits this.
    assert_close(run([problem], hyper, STEPS, calibrate=calibrate), [expected], 1e-9)


ABLATIONS = {
    "no second-moment calibration, raw": {"reconstruct": False, "second_moment": "diagonal"},
    "block 2 off": {"scale_gradient": False},
    "block 5 off": {"reconstruct": False},
    "blocks 2 and 5 off": {"scale_gradient": False, "reconstruct": False},
    "blocks 2 to 4 off": {"scale_gradient": False, "calibrate": False},
}


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("hyper", ["no alternation", "weight decay", "other decays"])
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_ablations_are_algorithm_1_with_blocks_off(shape, hyper, ablation, assert_close):
    problem, hyper = SHAPES[shape], HYPERS[hyper]
    options = dict(ABLATIONS[ablation])
    got = run([problem], hyper, STEPS, **options)
    diagonal = options.pop("second_moment", None) is not None
    expected = algorithm_1(problem, hyper, STEPS, diagonal=diagonal, **options)
    assert_close(got, [expected], 1e-9)


@pytest.mark.parametrize("hyper", ["default", "a first", "no alternation", "weight decay"])
@pytest.mark.parametrize("shape", ["tall", "rank one", "zero init", "scaled", "full rank"])
def test_simple_loft_is_the_dense_momentum_over_squares_in_the_basis(shape, hyper, assert_close):
    problem, hyper = SHAPES[shape], HYPERS[hyper]
    got = run([problem], hyper, STEPS, second_moment="diagonal")
    assert_close(got, [simple_loft(problem, hyper, STEPS)], 1e-9)


@pytest.mark.parametrize("shape", ["tall", "zero init", "scaled"])
def test_with_every_block_off_loft_is_lora_with_adamw(shape, assert_close):
    problem, hyper = SHAPES[shape], Hyper(alternate=False, weight_decay=0.1)
    switches = {"scale_gradient": False, "calibrate": False, "reconstruct": False}
    lora = optax.adamw(hyper.lr, weight_decay=hyper.weight_decay)
    expected = follow(lora, [problem], STEPS)
    for second_moment in ("diagonal", "calibrated"):
        got = run([problem], hyper, STEPS, second_moment=second_moment, **switches)
        assert_close(got, expected)


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


@pytest.mark.parametrize("nesterov", [False, True])
def test_at_full_rank_loft_adamw_is_the_adamw_of_optax(nesterov, assert_close):
    problem = Problem(8, 8, 8, seed=12, zero_base=True)
    arguments = (0.05, 0.8, 0.95, 1e-6, 1e-3, None, 0.3)
    reference = optax.adamw(*arguments, nesterov=nesterov)
    w = problem.weight(problem.u, problem.v)
    state, expected = reference.init(w), []
    for k in range(STEPS):
        updates, state = reference.update(problem.gradient(w, k), state, w)
        w = w + np.asarray(updates)
        expected.append(w)
    got = follow(loft_adamw(*arguments, nesterov=nesterov), [problem], STEPS)
    assert_close(got, [expected])


def test_full_rank_loft_with_weight_decay_is_adamw_where_the_base_is_zero(assert_close):
    problem = Problem(8, 8, 8, seed=12, zero_base=True)
    hyper = Hyper(weight_decay=0.3)
    assert_close(run([problem], hyper, STEPS), [adamw(problem, hyper, STEPS)])


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


@pytest.mark.parametrize("chained", [True, False], ids=["chained", "max_norm"])
@pytest.mark.parametrize("hyper", ["default", "clipped", "clipped, no alternation"])
def test_pairs_and_other_leaves_train_together_under_one_norm(hyper, chained, assert_close):
    problems = [SHAPES["tall"], SHAPES["scaled"], SHAPES["zero init"]]
    hyper, head = dataclasses.replace(HYPERS[hyper], weight_decay=0.1), Head(6, STEPS)
    got = run(problems, hyper, STEPS, head=head, chained=chained)
    expected = dense_loft(problems, hyper, STEPS, head=head)
    for ours, dense in zip(got, expected, strict=True):
        assert_close(ours, dense)
