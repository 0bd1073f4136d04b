"""Renewal of adapters: the weight stays, the moments come along, against a dense oracle."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import assert_trees_close, random_like
from optimizers import hasty_compiler as hasty_compiler
from oracles import Hyper, MomentumHyper, Problem, adamw, projector

from loft_jax import LoraPairs, loft_adamw, loft_muon, loft_sgd
from loft_jax.adapters import change_rank, renew
from loft_jax.algorithm.pair import FactorPair
from loft_jax.algorithm.renewal import RenewalInput, momentum_directions

STEPS = 18
Factors = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Renewal:
    """A renewal after a step: how many directions stay, and the columns of the new ones."""

    keep: int
    new: Factors
    size: float = 1.0

    @classmethod
    def draw(cls, seed: int, problem: Problem, keep: int, count: int, size=1.0) -> "Renewal":
        rng = np.random.default_rng(seed)
        columns = tuple(rng.normal(size=(rows, count)) for rows in (problem.m, problem.n))
        return cls(keep, columns, size)

    @property
    def rank(self) -> int:
        return self.keep + self.new[0].shape[1]

    def factors(self, u: np.ndarray, v: np.ndarray) -> Factors:
        """The new factors, by singular value and QR decompositions of dense matrices."""
        x, sigma, y = np.linalg.svd(u @ v.T)
        r, k = u.shape[1], self.keep
        root = np.sqrt(sigma[:k])
        kept = (x[:, :k] * root, y[:k].T * root)
        length = np.sqrt(self.size * np.sqrt((sigma[:r] ** 2).sum() / r))
        grown = []
        for old, new in zip(kept, self.new, strict=True):
            q, upper = np.linalg.qr(new - projector(old) @ new)
            grown.append(np.hstack([old, length * q * np.sign(np.diag(upper))]))
        return tuple(grown)


class RowMoments:
    """The moments of one factor: an ``m x n`` matrix, and an ``n x n`` matrix of each row."""

    def __init__(self, hyper: Hyper, m: int, n: int):
        self.hyper, self.k = hyper, 0
        self.first, self.rows = np.zeros((m, n)), np.zeros((m, n, n))
        self.row_sums, self.gram = np.zeros(m), np.zeros((n, n))

    def renew(self, old: np.ndarray, p: np.ndarray) -> None:
        """From one span into another; what the old one did not have gets the mean of what it had.

        Args:
          old: the projector of the partner before the renewal.
          p: that after it.
        """
        self._project(old)
        r, new = round(np.trace(old)), p - p @ old @ p
        fill = lambda trace: (trace / r)[..., None, None] * new
        trace = np.trace(self.rows, axis1=1, axis2=2)
        total = np.trace(self.gram)
        self._project(p)
        shrunk = np.trace(self.gram)
        self.rows, self.gram = self.rows + fill(trace), self.gram + fill(total)
        self.row_sums = self.row_sums * np.trace(self.gram) / shrunk

    def see(self, g: np.ndarray, p: np.ndarray) -> None:
        h, self.k, self.g = self.hyper, self.k + 1, g @ p
        self._project(p)
        self.first = h.b1 * self.first + (1 - h.b1) * self.g
        self.rows = h.b2 * self.rows + (1 - h.b2) * self.g[:, :, None] * self.g[:, None, :]
        self.gram = h.b2 * self.gram + (1 - h.b2) * self.g.T @ self.g
        self.row_sums = h.b2 * self.row_sums + (1 - h.b2) * (self.g**2).sum(1)

    def _project(self, p: np.ndarray) -> None:
        total = np.trace(self.gram)
        self.first, self.rows, self.gram = self.first @ p, p @ self.rows @ p, p @ self.gram @ p
        self.row_sums = self.row_sums * (np.trace(self.gram) / total if total > 0 else 0.0)

    def direction(self) -> np.ndarray:
        h, correction = self.hyper, 1 - self.hyper.b2**self.k
        m_hat = h.m_hat(self.first, self.g, self.k)
        if not h.factored:
            return m_hat / h.root(np.diagonal(self.rows, axis1=1, axis2=2) / correction)
        rows, columns = self.row_sums / correction, np.diag(self.gram) / correction
        sizes = rows.size, columns.size
        whole = h.root(columns.sum() / (sizes[0] * sizes[1]))
        of_rows, of_columns = h.root(rows / sizes[1]), h.root(columns / sizes[0])
        return m_hat * whole / of_rows[:, None] / of_columns[None, :]


class Momentum:
    """The moment of LoFT-SGD and of LoFT-Muon."""

    def __init__(self, hyper: MomentumHyper, m: int, n: int):
        self.hyper, self.moment, self.k = hyper, np.zeros((m, n)), -1

    def renew(self, old: np.ndarray, p: np.ndarray) -> None:
        self.moment = self.moment @ old @ p

    def see(self, g: np.ndarray, p: np.ndarray) -> None:
        self.k += 1
        self.g, self.moment = g @ p, self.hyper.momentum * self.moment @ p + g @ p

    def direction(self) -> np.ndarray:
        return self.hyper.direction(self.moment, self.g, self.k)


def dense_loft(problem: Problem, hyper, renewals: dict[int, Renewal]) -> list[np.ndarray]:
    """The path of W, with renewals after some steps (counted from 1)."""
    w, u, v = problem.w0, problem.u, problem.v
    make = RowMoments if isinstance(hyper, Hyper) else Momentum
    moments = make(hyper, problem.m, problem.n), make(hyper, problem.n, problem.m)
    path = []
    for k in range(STEPS):
        weight = w + problem.scale * u @ v.T
        g = problem.gradient(weight, k)
        moments[0].see(g, projector(v))
        moments[1].see(g.T, projector(u))
        if k % 2:
            u = u - hyper.lr * moments[0].direction() @ np.linalg.pinv(v).T / problem.scale
        else:
            v = v - hyper.lr * moments[1].direction() @ np.linalg.pinv(u).T / problem.scale
        path.append(w + problem.scale * u @ v.T)
        if renewal := renewals.get(k + 1):
            old_u, old_v, (u, v) = u, v, renewal.factors(u, v)
            w = path[-1] - problem.scale * u @ v.T
            moments[0].renew(projector(old_v), projector(v))
            moments[1].renew(projector(old_u), projector(u))
    return path


Renew = Callable[..., tuple]


def follow(tx, problem: Problem, renewals: dict[int, Renew], dtype=np.float64) -> list[np.ndarray]:
    """The path of W under the package, with renewals after some steps."""
    base = {"q": {"kernel": jnp.asarray(problem.w0, dtype)}}
    adapter = {"q": {"lora_a": jnp.asarray(problem.u, dtype)}}
    adapter["q"]["lora_b"] = jnp.asarray(problem.v.T, dtype)
    state, update, path = tx.init(adapter), jax.jit(tx.update), []
    weight = lambda: problem.scale * adapter["q"]["lora_a"] @ adapter["q"]["lora_b"]
    weight_of = lambda: np.asarray(base["q"]["kernel"] + weight(), np.float64)
    for k in range(STEPS):
        g = problem.scale * problem.gradient(weight_of(), k)
        u, v = adapter["q"]["lora_a"], adapter["q"]["lora_b"].T
        gradients = {"q": {"lora_a": jnp.asarray(g @ v), "lora_b": jnp.asarray(u.T @ g)}}
        updates, state = update(gradients, state, adapter)
        adapter = optax.apply_updates(adapter, updates)
        path.append(weight_of())
        if change := renewals.get(k + 1):
            base, adapter, state = jax.jit(change)(base, adapter, state, jax.random.key(k))
            np.testing.assert_allclose(weight_of(), path[-1], atol=1e-13 * abs(path[-1]).max())
    return path


def by_package(renewals: dict[int, Renewal], pairs: LoraPairs, rank: int) -> dict[int, Renew]:
    """The same renewals, as calls of the package."""
    calls: dict[int, Renew] = {}
    for k, of in sorted(renewals.items()):
        new = FactorPair(*map(jnp.asarray, of.new))
        options = {"pairs": pairs, "size": of.size, "directions": lambda *_, new=new: new}
        if of.rank == rank:
            calls[k] = functools.partial(renew, keep=of.keep, **options)
        else:
            calls[k] = functools.partial(change_rank, rank=of.rank, **options)
        rank = of.rank
    return calls


TALL, SCALED = Problem(14, 6, 3, seed=1), Problem(8, 10, 4, seed=8, scale=2.5)
SCHEDULES = {
    "renewed": lambda p: {
        7: Renewal.draw(7, p, 0, p.r),
        12: Renewal.draw(12, p, 2, p.r - 2, size=0.1),
    },
    "shrunk and grown": lambda p: {
        5: Renewal.draw(5, p, 2, 0),
        12: Renewal.draw(12, p, 2, 3, size=0.01),
    },
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", ["calibrated", "factored", "nesterov", "sgd", "muon"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_renewals_are_those_of_the_dense_method(schedule, method, assert_close):
    problem = TALL if schedule == "renewed" else SCALED
    renewals, pairs = SCHEDULES[schedule](problem), LoraPairs(scale=problem.scale)
    nesterov = method == "nesterov"
    hyper = Hyper(factored=method == "factored", nesterov=nesterov, b2=0.99)
    name = "factored" if hyper.factored else "calibrated"
    tx = loft_adamw(
        hyper.lr, b2=0.99, weight_decay=0.0, nesterov=nesterov, second_moment=name, pairs=pairs
    )
    if method == "sgd":
        hyper, tx = MomentumHyper(), loft_sgd(0.02, 0.95, pairs=pairs)
    elif method == "muon":
        hyper = MomentumHyper(muon=True)
        tx = loft_muon(0.02, weight_decay=0.0, pairs=pairs)
    got = follow(tx, problem, by_package(renewals, pairs, problem.r))
    assert_close(got, dense_loft(problem, hyper, renewals), 1e-10, f"renewals, {method}")


METHODS = {
    name: functools.partial(loft_adamw, 0.05, weight_decay=0.1, second_moment=name)
    for name in ("calibrated", "factored", "diagonal")
} | {"muon": functools.partial(loft_muon, 0.02), "sgd": functools.partial(loft_sgd, 0.02, 0.9)}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", METHODS)
def test_a_renewal_that_keeps_all_directions_changes_nothing(method, assert_close):
    pairs = LoraPairs(scale=SCALED.scale)
    tx = METHODS[method](pairs=pairs)
    call = functools.partial(renew, keep=SCALED.r, pairs=pairs)
    got = follow(tx, SCALED, dict.fromkeys((5, 10, 11), call))
    assert_close(got, follow(tx, SCALED, {}), 1e-10, "renewals that keep all directions")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("factored", [False, True], ids=["calibrated", "factored"])
def test_at_full_rank_a_run_with_renewals_is_adamw(factored, assert_close):
    problem = Problem(8, 8, 8, seed=11)
    hyper = Hyper(factored=factored, eps=0.0 if factored else 1e-8)
    name = "factored" if factored else "calibrated"
    tx = loft_adamw(hyper.lr, eps=hyper.eps, weight_decay=0.0, second_moment=name)
    calls = {
        3: functools.partial(renew, directions="random"),
        8: functools.partial(renew, directions="momentum", size=0.1),
        13: functools.partial(renew, directions="random", keep=5),
    }
    expected = adamw(problem, hyper, STEPS)
    assert_close(follow(tx, problem, calls), expected, 1e-10, "renewals at full rank are AdamW")


@pytest.mark.usefixtures("x64")
def test_moments_point_along_the_leading_directions_of_a_gradient(assert_close):
    """As one step of the power iteration."""
    rng = np.random.default_rng(0)
    gradient, v, u = rng.normal(size=(9, 7)), rng.normal(size=(7, 3)), rng.normal(size=(9, 3))
    moments = FactorPair(jnp.asarray(gradient @ v), jnp.asarray(gradient.T @ u))
    given = RenewalInput(FactorPair(jnp.asarray(u), jnp.asarray(v)), moments)
    found = momentum_directions(jax.random.key(0), given, 2)
    for columns, moment in zip(found, moments, strict=True):
        expected = np.linalg.svd(moment)[0][:, :2]
        # But for a thousandth of noise.
        assert_close(abs(expected.T @ columns), np.eye(2), 5e-3, "leading directions")
    more = momentum_directions(jax.random.key(0), given, 5)
    assert all(np.linalg.matrix_rank(x) == 5 for x in more)
