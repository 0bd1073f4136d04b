"""The baseline optimizers in float64, each against its published rule in plain NumPy.

The oracles take a problem of `oracles.py` and step its factors ``U`` and ``V`` by the rule as
printed in the paper, with the gradients ``s G V`` and ``s G^T U`` that a framework would compute.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import hasty_compiler as hasty_compiler
from oracles import Head, Hyper, Problem, adamw, projector
from trajectories import follow

from loft_jax import LoraPairs, baselines

pytestmark = pytest.mark.usefixtures("x64")

STEPS = 25
LR = 0.02
SHAPES = {
    "tall": Problem(14, 6, 3, seed=1),
    "wide, scaled": Problem(6, 14, 3, seed=2, scale=2.5),
    "rank one": Problem(10, 7, 1, seed=4),
    "zero init": Problem(11, 8, 3, seed=7, zero_init=True, scale=0.5),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def trajectory(problem: Problem, rule: Callable[..., tuple[np.ndarray, np.ndarray]]) -> list:
    """The path of W under ``rule(k, u, v, g_u, g_v) -> (u, v)``, ``k`` from 1."""
    u, v, path = problem.u, problem.v, []
    for k in range(1, STEPS + 1):
        g = problem.gradient(problem.weight(u, v), k - 1)
        u, v = rule(k, u, v, problem.scale * g @ v, problem.scale * g.T @ u)
        path.append(problem.weight(u, v))
    return path


@dataclasses.dataclass
class Adam:
    """Adam on one array."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    m: Any = 0.0
    v: Any = 0.0

    def __call__(self, k: int, g: np.ndarray) -> np.ndarray:
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        v_hat = self.v / (1 - self.b2**k)
        return self.m / (1 - self.b1**k) / (np.sqrt(v_hat) + self.eps)


def damped_inverse(x: np.ndarray, damping: float) -> np.ndarray:
    return np.linalg.inv(x.T @ x + damping * np.eye(x.shape[1]))


@every_shape
def test_lora_plus_is_adamw_with_two_learning_rates(shape, assert_close):
    problem, of_u, of_v = SHAPES[shape], Adam(), Adam()

    def rule(k, u, v, g_u, g_v):
        u = u - LR * (of_u(k, g_u) + 0.1 * u)
        return u, v - 8 * LR * (of_v(k, g_v) + 0.1 * v)

    tx = baselines.lora_plus(LR, ratio=8.0, weight_decay=0.1)
    assert_close(follow(tx, [problem], STEPS), [trajectory(problem, rule)])


@every_shape
def test_scaled_sgd_is_the_riemannian_gradient_step(shape, assert_close):
    problem = SHAPES[shape]

    def rule(k, u, v, g_u, g_v):
        return u - LR * g_u @ damped_inverse(v, 0.3), v - LR * g_v @ damped_inverse(u, 0.3)

    tx = baselines.scaled_sgd(LR, damping=0.3)
    assert_close(follow(tx, [problem], STEPS), [trajectory(problem, rule)])


@every_shape
def test_scaled_adamw_is_adamw_on_preconditioned_gradients(shape, assert_close):
    problem, of_u, of_v = SHAPES[shape], Adam(0.7, 0.8), Adam(0.7, 0.8)

    def rule(k, u, v, g_u, g_v):
        d_u, d_v = g_u @ damped_inverse(v, 1e-2), g_v @ damped_inverse(u, 1e-2)
        return u - LR * (of_u(k, d_u) + 0.1 * u), v - LR * (of_v(k, d_v) + 0.1 * v)

    tx = baselines.scaled_adamw(LR, 0.7, 0.8, weight_decay=0.1, damping=1e-2)
    assert_close(follow(tx, [problem], STEPS), [trajectory(problem, rule)])


def test_scaled_sgd_without_damping_does_not_depend_on_the_factorization(assert_close):
    problem = SHAPES["tall"]
    x = np.random.default_rng(1).normal(size=(3, 3))
    other = problem.with_factors(problem.u @ x, problem.v @ np.linalg.inv(x).T)
    tx = baselines.scaled_sgd(LR, damping=0.0)
    assert_close(follow(tx, [other], STEPS), follow(tx, [problem], STEPS))


@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "plain"])
@every_shape
def test_lora_fa_is_adamw_on_one_factor(shape, correct, assert_close):
    problem, of_v = SHAPES[shape], Adam(eps=1e-6)

    def rule(k, u, v, g_u, g_v):
        d_v = g_v @ damped_inverse(u, 1e-8) / problem.scale**2 if correct else g_v
        return u, v - LR * (of_v(k, d_v) + 0.1 * v)

    pairs = LoraPairs(scale=problem.scale)
    tx = baselines.lora_fa(LR, weight_decay=0.1, correct_gradient=correct, pairs=pairs)
    assert_close(follow(tx, [problem], STEPS), [trajectory(problem, rule)])


def test_lora_fa_can_freeze_the_other_factor(assert_close):
    problem = SHAPES["tall"]
    transposed = follow(baselines.lora_fa(LR), [problem.transposed()], STEPS)[0]
    got = follow(baselines.lora_fa(LR, frozen="b"), [problem], STEPS)[0]
    assert_close(got, [w.T for w in transposed])


class AltLora:
    """Algorithm 1 (and, with ``b2``, 2) of AltLoRA for one factor, when it is active."""

    def __init__(self, scale: float, damping: float, b1: float = 0.9, b2: float | None = None):
        self.scale, self.damping, self.b1, self.b2 = scale, damping, b1, b2
        self.m = self.s = 0.0
        self.partner = None

    def __call__(self, g: np.ndarray, partner: np.ndarray) -> np.ndarray:
        inverse = damped_inverse(partner, self.damping)
        g = g @ inverse / self.scale**2
        if self.partner is not None:
            self.m = self.m @ (self.partner.T @ partner) @ inverse
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.partner = partner
        if self.b2 is None:
            return self.m
        self.s = self.b2 * self.s + (1 - self.b2) * g**2
        return self.m / (np.sqrt(self.s) + 1e-8)


@pytest.mark.parametrize("alternate", [True, False], ids=["alternating", "joint"])
@pytest.mark.parametrize("plus", [False, True], ids=["altlora", "altlora_plus"])
@every_shape
def test_altlora_is_its_algorithm(shape, plus, alternate, assert_close):
    problem, b2 = SHAPES[shape], 0.99 if plus else None
    of_u, of_v = (AltLora(problem.scale, 1e-4, b2=b2) for _ in "uv")

    def rule(k, u, v, g_u, g_v):
        start = u
        if not alternate or k % 2 == 0:
            u = u - LR * (of_u(g_u, v) + 0.1 * u)
        if not alternate or k % 2 == 1:
            v = v - LR * (of_v(g_v, start) + 0.1 * v)
        return u, v

    options = {"damping": 1e-4, "alternate": alternate, "pairs": LoraPairs(scale=problem.scale)}
    if plus:
        tx = baselines.altlora_plus(LR, b2=0.99, weight_decay=0.1, **options)
    else:
        tx = baselines.altlora(LR, weight_decay=0.1, **options)
    assert_close(follow(tx, [problem], STEPS), [trajectory(problem, rule)], 1e-9)


def test_altlora_without_damping_does_not_depend_on_the_factorization(assert_close):
    problem = SHAPES["tall"]
    x = np.random.default_rng(1).normal(size=(3, 3))
    other = problem.with_factors(problem.u @ x, problem.v @ np.linalg.inv(x).T)
    tx = baselines.altlora(LR, damping=0.0)
    assert_close(follow(tx, [other], STEPS), follow(tx, [problem], STEPS))


class LoraRite:
    """LoRA-RITE for one factor, as released with escaped mass: averages corrected in their decay.

    Its second moment is of the gradients in ``n x n`` coordinates, where a basis is a projector.
    """

    def __init__(self, scale: float, escaped: bool, b1=0.9, b2=0.999, eps=1e-6, eps_root=0.0):
        self.scale, self.escaped, self.b1, self.b2 = scale, escaped, b1, b2
        self.eps, self.eps_root = eps, eps_root
        self.second = self.first = self.rho = 0.0

    def __call__(self, k: int, g: np.ndarray, partner: np.ndarray) -> np.ndarray:
        """Takes the full gradient, and returns the step of the factor."""
        decay = lambda b: b * (1 - b ** (k - 1)) / (1 - b**k)
        b1, b2, p, r = decay(self.b1), decay(self.b2), projector(partner), partner.shape[1]
        g = g @ p
        carried, zeros = p @ self.second @ p if k > 1 else 0 * p, np.zeros_like(p)
        if self.escaped:
            values = [np.linalg.eigvalsh(x + zeros)[-r:] for x in (self.second, carried)]
            # The largest of differences that add up to that of the traces.
            lost = min((values[0] - values[1]).max(), values[0].sum() - values[1].sum())
            self.rho = b2 * (self.rho + lost)
        self.second = b2 * carried + (1 - b2) * g.T @ g / len(g)
        values, vectors = np.linalg.eigh(self.second)
        root = np.sqrt(np.maximum(values, 0) + self.rho + self.eps_root) + self.eps
        self.first = (
            b1 * (self.first @ p if k > 1 else 0) + (1 - b1) * g @ vectors / root @ vectors.T
        )
        return self.first @ np.linalg.pinv(partner).T / self.scale


@pytest.mark.parametrize("escaped", [True, False], ids=["escaped mass", "plain"])
@every_shape
def test_lora_rite_is_its_rule_in_the_coordinates_of_the_weight(shape, escaped, assert_close):
    problem = SHAPES[shape]
    of_u, of_v = (LoraRite(problem.scale, escaped, b2=0.9) for _ in "uv")

    def rule(k, u, v, g_u, g_v):
        g = problem.gradient(problem.weight(u, v), k - 1)
        return u - LR * (of_u(k, g, v) + 0.1 * u), v - LR * (of_v(k, g.T, u) + 0.1 * v)

    pairs = LoraPairs(scale=problem.scale)
    tx = baselines.lora_rite(LR, b2=0.9, weight_decay=0.1, escaped_mass=escaped, pairs=pairs)
    assert_close(follow(tx, [problem], STEPS), [trajectory(problem, rule)], 1e-10)


@pytest.mark.parametrize("escaped", [True, False], ids=["escaped mass", "plain"])
def test_lora_rite_is_that_of_pytorch_optimizer(escaped, assert_close):
    """A recorded path, without the clipping and the skipping that only the code has."""
    recorded = np.load(Path(__file__).parent / "data" / "lora_rite.npz")
    path = recorded["escaped" if escaped else "plain"]
    # The settings of `record_lora_rite.py`, which has the square of epsilon inside the root too.
    options = {"weight_decay": 0.1, "escaped_mass": escaped, "eps_root": 1e-12}
    tx = baselines.lora_rite(0.02, b2=0.9, **options)
    assert_close(follow(tx, [Problem(9, 6, 3, seed=1)], len(path)), [path], 1e-9)


def test_lora_rite_does_not_depend_on_the_factorization(assert_close):
    problem = SHAPES["tall"]
    x = np.random.default_rng(1).normal(size=(3, 3))
    other = problem.with_factors(30 * problem.u @ x, problem.v @ np.linalg.inv(x).T, scale=1 / 30)
    pairs = LoraPairs(scale=other.scale)
    got = follow(baselines.lora_rite(LR, pairs=pairs), [other], STEPS)
    assert_close(got, follow(baselines.lora_rite(LR), [problem], STEPS))


@every_shape
def test_lora_pro_is_adam_on_the_tangent_space(shape, assert_close):
    """The oracle solves its two least-squares problems as such, entry by entry."""
    problem, adam = SHAPES[shape], Adam()
    m, n, r, s = problem.m, problem.n, problem.r, problem.scale

    def nearest(g, u, v):
        """All steps of the factors with the least ``|s (dU V^T + U dV^T) - G|``."""
        of_u = s * np.kron(np.eye(m), v)  # vec of dU V^T, by rows
        of_v = s * np.einsum("il,jk->ijkl", u, np.eye(n)).reshape(m * n, n * r)
        columns = np.hstack([of_u, of_v])
        step = np.linalg.lstsq(columns, g.ravel(), rcond=1e-12)[0]
        return columns, step

    def rule(k, u, v, g_u, g_v):
        g = problem.gradient(problem.weight(u, v), k - 1)
        columns, step = nearest(g, u, v)
        direction = adam(k, (columns @ step).reshape(m, n))
        h_u, h_v = s * direction @ v, s * direction.T @ u
        # The solution with d_U = (1/s) D V inv(V^T V) is moved by (U X^T, -V X) next to (h_u, h_v).
        d_u = direction @ np.linalg.pinv(v).T / s
        d_v = (np.eye(n) - projector(v)) @ direction.T @ np.linalg.pinv(u).T / s
        shift = np.vstack(
            [
                np.einsum("il,jk->ijkl", u, np.eye(r)).reshape(m * r, r * r),
                -np.kron(v, np.eye(r)),
            ]
        )
        gap = np.concatenate([(h_u - d_u).ravel(), (h_v - d_v).ravel()])
        move = shift @ np.linalg.lstsq(shift, gap, rcond=None)[0]
        d_u, d_v = d_u + move[: m * r].reshape(m, r), d_v + move[m * r :].reshape(n, r)
        return u - LR * d_u, v - LR * d_v

    tx = baselines.lora_pro(LR, damping=0.0, pairs=LoraPairs(scale=s))
    assert_close(follow(tx, [problem], STEPS), [trajectory(problem, rule)], 1e-9)


def test_lora_pro_at_full_rank_moves_the_weight_as_adam_to_first_order(assert_close):
    problem = Problem(7, 7, 7, seed=3)
    lr = 1e-5
    got = follow(baselines.lora_pro(lr), [problem], 10)
    expected = adamw(problem, Hyper(lr=lr, weight_decay=0.0), 10)
    assert_close(got, [expected], 1e-7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: baselines.altlora(LR, b1=0.8),
        lambda: baselines.altlora_plus(LR, b1=0.8),
        lambda: baselines.lora_pro(LR, b1=0.8),
        lambda: baselines.lora_plus(LR, b1=0.8),
        lambda: baselines.scaled_adamw(LR, b1=0.8),
        lambda: baselines.lora_fa(LR, b1=0.8, eps=1e-8),
    ],
    ids=["altlora", "altlora_plus", "lora_pro", "lora_plus", "scaled_adamw", "lora_fa"],
)
def test_leaves_outside_pairs_get_adamw(make, assert_close):
    head = Head(5, STEPS)
    got = follow(make(), [SHAPES["tall"]], STEPS, head=head)[-1]
    tx, w = optax.adam(LR, 0.8), jnp.asarray(head.start)
    state, expected = tx.init(w), []
    for g in head.gradients:
        updates, state = tx.update(jnp.asarray(g), state, w)
        w = w + updates
        expected.append(w)
    assert_close(got, expected)


def test_the_state_of_lora_pro_is_dense_and_of_the_others_thin():
    params = {"lora_a": jnp.ones((30, 2)), "lora_b": jnp.zeros((2, 20))}
    sizes = {
        "lora_plus": 2 * 2 * 50,
        "scaled_adamw": 2 * 2 * 50,
        "scaled_sgd": 0,
        "lora_fa": 2 * 2 * 20,
        "altlora": 2 * 2 * 50,
        "altlora_plus": 3 * 2 * 50,
        "lora_pro": 2 * 30 * 20,
    }
    for name, size in sizes.items():
        state = getattr(baselines, name)(LR).init(params)
        assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == size, name


# Of two calls at once, each would wait on one of two CPU threads for work that none is left to do.
@pytest.mark.parametrize("name", ["scaled_adamw", "altlora", "altlora_plus", "lora_pro"])
def test_a_step_calls_the_eigensolver_once(name):
    layer = lambda n: {"lora_a": jnp.ones((30, 2)), "lora_b": jnp.zeros((2, n))}
    params = {"q": layer(20), "k": layer(10), "v": {"0": layer(30), "1": layer(30)}}
    tx = getattr(baselines, name)(LR)
    program = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
    assert len(re.findall(r'"lapack_[sd]syevd_ffi"', program)) == 1
