"""Renewal of adapters: the weight stays, the moments come along, against a dense oracle."""

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import schedule_free
from optimizers import assert_trees_close, random_like, types
from optimizers import hasty_compiler as hasty_compiler
from oracles import Hyper, MomentumHyper, Problem, adamw, projector

from loft_jax import LoraAxes, LoraPairs, loft_adamw, loft_muon, loft_sgd
from loft_jax.adapters import LoraRule, add_lora, change_rank, merge, renew, renew_model
from loft_jax.algorithm.basis import orthonormal_basis
from loft_jax.algorithm.pair import FactorPair, Moments
from loft_jax.algorithm.renewal import (
    RenewalInput,
    carry_moments,
    momentum_directions,
    random_directions,
    renew_factors,
)
from loft_jax.algorithm.second_moment import SECOND_MOMENTS
from loft_jax.algorithm.sharded_dim import UNSHARDED

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
    factors = lambda: (np.asarray(adapter["q"][name]) for name in ("lora_a", "lora_b"))

    def weight_of() -> np.ndarray:
        a, b = factors()
        return np.asarray(base["q"]["kernel"], np.float64) + problem.scale * a @ b

    for k in range(STEPS):
        g = problem.scale * problem.gradient(weight_of(), k)
        u, v = (x.T if k else x for k, x in enumerate(factors()))
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


# Trees: stacks, layouts, meshes, frameworks, errors.

KERNELS = {"q": (8, 16), "stack": (8, 6, 10), "heads": (8, 2, 4)}
PAIRS = LoraPairs(
    axes=(("stack/.*", LoraAxes(batch=(0,))), ("heads/.*", LoraAxes())), scale=(("q/.*", 2.0),)
)
SPECS = {
    "q": (P("x", None), P("x", None), P(None, None)),
    "stack": (P("x"), P("x"), P("x")),
    "heads": (P("x"), P("x", None), P()),
}


RENEW = jax.jit(functools.partial(renew, pairs=PAIRS, keep=1))


@functools.cache
def model_tree() -> tuple:
    """Base, adapter and a state with moments: plain, stacked and of several heads."""
    factors = {
        "q": ((8, 2), (2, 16)),
        "stack": ((8, 6, 2), (8, 2, 10)),
        "heads": ((8, 2), (2, 2, 4)),
    }
    base = {name: {"kernel": jnp.zeros(shape)} for name, shape in KERNELS.items()}
    adapter = {n: {"lora_a": jnp.zeros(a), "lora_b": jnp.zeros(b)} for n, (a, b) in factors.items()}
    base, adapter = random_like(base, 0), random_like(adapter, 1)
    tx = optax.chain(optax.clip(1e6), loft_adamw(0.1, second_moment="factored", pairs=PAIRS))
    state, update = tx.init(adapter), jax.jit(tx.update)
    for seed in (2, 3):
        updates, state = update(random_like(adapter, seed), state, adapter)
        adapter = optax.apply_updates(adapter, updates)
    return base, adapter, state


def test_stacks_and_heads_are_renewed_as_plain_matrices():
    base, adapter, state = model_tree()
    new = RENEW(base, adapter, state, jax.random.key(0))
    assert types(new) == types((base, adapter, state))
    assert_trees_close(merge(*new[:2], PAIRS), merge(base, adapter, PAIRS))
    leading = lambda tree: jnp.linalg.svd(
        jnp.einsum("lmr,lrn->lmn", *tree["stack"].values()), compute_uv=False
    )[:, 0]
    # Which of the two new singular values is the larger depends on the layer.
    np.testing.assert_array_less(0.99 * leading(adapter), leading(new.adapter))
    moments = [jnp.linalg.norm(x) for x in jax.tree.leaves(new.state[1][0].mu)]
    assert all(x > 0 for x in moments)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_mesh_changes_no_renewal_and_no_sharding(axis_type):
    base, adapter, state = model_tree()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    expected = RENEW(base, adapter, state, jax.random.key(0))
    specs_base = {n: {"kernel": s[0]} for n, s in SPECS.items()}
    specs = {n: {"lora_a": s[1], "lora_b": s[2]} for n, s in SPECS.items()}
    put = lambda tree, specs: jax.device_put(
        tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    )
    core, *others = state[1]
    with jax.set_mesh(mesh):
        core = core._replace(**{f: put(getattr(core, f), specs) for f in ("basis", "mu", "nu")})
        placed = (state[0], (core, *others))
        got = RENEW(put(base, specs_base), put(adapter, specs), placed, jax.random.key(0))
    assert_trees_close(jax.device_get(got), jax.device_get(expected))
    for name, entry in got.adapter.items():
        split = entry["lora_a"].sharding.shard_shape(entry["lora_a"].shape)
        assert split != entry["lora_a"].shape, name


def test_ranks_may_differ_between_adapters():
    base, adapter, state = model_tree()
    ranks = (("q/.*", 4), ("stack/.*", 1))
    change = jax.jit(functools.partial(change_rank, rank=ranks, pairs=PAIRS))
    new = change(base, adapter, state, jax.random.key(0))
    found = {name: entry["lora_a"].shape[-1] for name, entry in new.adapter.items()}
    assert found == {"q": 4, "stack": 1, "heads": 2}
    assert_trees_close(merge(*new[:2], PAIRS), merge(base, adapter, PAIRS))
    tx = loft_adamw(0.1, second_moment="factored", pairs=PAIRS)
    updates, after = jax.eval_shape(tx.update, new.adapter, new.state[1], new.adapter)
    assert types(updates) == types(new.adapter)
    assert types(after) == types(new.state[1])


def test_an_nnx_model_is_renewed_in_place():
    rule = LoraRule(path=".*", rank=2, alpha=4, init_b=jax.nn.initializers.normal(0.3))
    layers = [nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 4, rngs=nnx.Rngs(1))]
    model = add_lora(nnx.Sequential(*layers), rule, rngs=nnx.Rngs(2))
    pairs = rule.lora_pairs()
    tx = loft_adamw(1e-2, second_moment="factored", pairs=pairs)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    x = jnp.ones((3, 6))

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.sum(model(x) ** 2)
        graph = nnx.DiffState(0, nnx.LoRAParam)
        optimizer.update(model, nnx.grad(loss, argnums=graph)(model))

    step(model, optimizer)
    before, kernel = model(x), model.layers[0].base.kernel[...]
    for rank, expected in ((None, 2), (3, 3), (1, 1)):
        change = nnx.jit(functools.partial(renew_model, rank=rank, pairs=pairs))
        change(model, optimizer, jax.random.key(0))
        np.testing.assert_allclose(model(x), before, atol=2e-5)
        assert model.layers[0].lora_a.shape == (6, expected)
        assert float(jnp.abs(model.layers[0].base.kernel[...] - kernel).max()) > 1e-3
        step(model, optimizer)
        before = model(x)


BAD = {
    "no LoFT state": (
        lambda base, adapter, state: renew(base, adapter, optax.adam(1.0).init(adapter), KEY),
        "holds none of a LoFT optimizer",
    ),
    "the state of an nnx optimizer": (
        lambda base, adapter, state: change_rank(
            base, jax.tree.map(nnx.LoRAParam, adapter), state, KEY, 3
        ),
        r"For an nnx\.Optimizer use loft_jax\.adapters\.renew_model",
    ),
    "nnx.state of an optimizer": (
        lambda base, adapter, state: change_rank(base, adapter, {"opt_state": {"0": {}}}, KEY, 3),
        r"for an nnx\.Optimizer use loft_jax\.adapters\.renew_model",
    ),
    "a frozen pair": (
        lambda base, adapter, state: renew(base, adapter, masked(adapter, NOTHING), KEY),
        "q/lora_a: no LoFT optimizer",
    ),
    "a hidden subtree": (
        lambda base, adapter, state: renew(base, adapter, masked(adapter, {"q": False}), KEY),
        "q/lora_a: no LoFT optimizer",
    ),
    "an ablation": (
        lambda base, adapter, state: renew(
            base, adapter, loft_adamw(1.0, calibrate=False).init(adapter), KEY
        ),
        "calibrate=False",
    ),
    "keep": (
        lambda base, adapter, state: renew(base, adapter, state, KEY, keep=3),
        "q/lora_a: keep must be from 0 to 2",
    ),
    "rank": (
        lambda base, adapter, state: change_rank(base, adapter, state, KEY, 9),
        "q/lora_a: the new rank must be from 1 to 6",
    ),
    "a keep that is no number": (
        lambda base, adapter, state: renew(base, adapter, state, KEY, keep=("q/.*", 1)),
        r"keep must be a whole number, or \(regex",
    ),
    "a rank that is not whole": (
        lambda base, adapter, state: change_rank(base, adapter, state, KEY, 3.0),
        "rank must be a whole number",
    ),
    "an entry of no adapter": (
        lambda base, adapter, state: change_rank(base, adapter, state, KEY, (("k/.*", 4),)),
        "rank: 'k/.*' matches no adapter. Their paths are q/lora_a",
    ),
    "a size of zero": (
        lambda base, adapter, state: renew(base, adapter, state, KEY, size=0.0),
        "size must be positive",
    ),
    "columns of another number": (
        lambda base, adapter, state: renew(
            base, adapter, state, KEY, keep=1, directions=lambda key, given, count: given.factors
        ),
        r"directions returned columns of shapes .*, and has to return \[\(8, 1\), \(6, 1\)\]",
    ),
    "an average of the parameters": (
        lambda base, adapter, state: renew(
            base, adapter, schedule_free(loft_adamw(1.0), 1.0).init(adapter), KEY
        ),
        r"a tree like the adapter at .*z",
    ),
    "an average of the updates": (
        lambda base, adapter, state: change_rank(
            base, adapter, optax.chain(loft_adamw(1.0), optax.ema(0.9)).init(adapter), KEY, 3
        ),
        r"a tree like the adapter at \[1\]\.ema",
    ),
    "an average of a part of the updates": (
        lambda base, adapter, state: renew_two(
            base,
            adapter,
            optax.chain(loft_adamw(1.0), optax.masked(optax.ema(0.9), {"q": True, "k": False})),
        ),
        r"a tree like the adapter at \[1\]\.inner_state\.ema",
    ),
    "another optimizer for a layer": (
        lambda base, adapter, state: renew_two(
            base, adapter, by_layer(q=loft_sgd(1.0), k=optax.adam(1.0)), directions="random"
        ),
        r"a tree like the adapter at .*k.*mu",
    ),
    "gradients in an accumulation": (
        lambda base, adapter, state: renew(base, adapter, accumulating(adapter), KEY),
        "accumulated the gradients of 1 steps",
    ),
    "a float8 weight": (
        lambda base, adapter, state: renew(
            {"q": {"kernel": jnp.zeros((8, 6), jnp.float8_e4m3fn)}}, adapter, state, KEY
        ),
        "no floating-point weight",
    ),
    "directions": (
        lambda base, adapter, state: renew(base, adapter, state, KEY, directions="gradient"),
        "'random', 'momentum'",
    ),
    "no moments": (
        lambda base, adapter, state: renew(base, adapter, loft_sgd(1.0).init(adapter), KEY),
        "needs a first moment",
    ),
    "a quantized weight": (
        lambda base, adapter, state: renew({"q": {"kernel": QUANTIZED}}, adapter, state, KEY),
        "A quantized weight cannot be merged into",
    ),
}
KEY = jax.random.key(0)
NOTHING = {"q": {"lora_a": False, "lora_b": False}}


def masked(adapter, mask):
    """A state that is of no pair."""
    return optax.masked(loft_adamw(1.0, pairs=LoraPairs(required=False)), mask).init(adapter)


def renew_two(base, adapter, tx, **options):
    """Two equal adapters with an optimizer."""
    base, adapter = ({**x, "k": x["q"]} for x in (base, adapter))
    return renew(base, adapter, tx.init(adapter), KEY, **options)


def accumulating(adapter):
    """A state of two steps' accumulation, after one."""
    tx = optax.MultiSteps(loft_adamw(1.0), 2)
    return tx.update(adapter, tx.init(adapter), adapter)[1]


QUANTIZED = jnp.zeros((8, 6), jnp.int8)


@pytest.mark.parametrize("mistake", BAD)
def test_mistakes_are_named_with_their_remedy(mistake):
    adapter = {"q": {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.ones((2, 6))}}
    base = {"q": {"kernel": jnp.zeros((8, 6))}}
    call, message = BAD[mistake]
    with pytest.raises(ValueError, match=message):
        call(base, adapter, loft_adamw(1.0).init(adapter))


def test_an_adapter_that_was_never_trained_keeps_its_zero_factor():
    adapter = {"q": {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.zeros((2, 6))}}
    state = loft_adamw(1.0).init(adapter)
    new = renew({"q": {"kernel": jnp.zeros((8, 6))}}, adapter, state, KEY)
    assert not new.adapter["q"]["lora_b"].any()
    lengths = jnp.linalg.norm(new.adapter["q"]["lora_a"], axis=0)
    np.testing.assert_allclose(lengths, 8**0.5, rtol=1e-5)


# What is left of the rank: products of lower rank than their factors.


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def direction_lengths(adapter) -> tuple[np.ndarray, np.ndarray]:
    a, b = adapter["q"]["lora_a"], adapter["q"]["lora_b"]
    return np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("zero", ["lora_a", "lora_b"])
@pytest.mark.parametrize("keep", [None, 2], ids=["shrunk", "kept"])
def test_an_adapter_before_its_first_step_stays_trainable(zero, keep):
    factors = {"lora_a": normal(0, 8, 4), "lora_b": normal(1, 4, 6)}
    adapter = {"q": factors | {zero: jnp.zeros_like(factors[zero])}}
    base, state = {"q": {"kernel": normal(2, 8, 6)}}, loft_adamw(1.0).init(adapter)
    if keep is None:
        new = change_rank(base, adapter, state, KEY, 2)
    else:
        new = renew(base, adapter, state, KEY, keep=keep)
    assert_trees_close(new.base, base)
    lengths = dict(zip(("lora_a", "lora_b"), direction_lengths(new.adapter), strict=True))
    assert not lengths.pop(zero).any()
    (live,) = lengths.values()
    np.testing.assert_allclose(live, live[0], rtol=1e-5)
    assert live[0] > 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("deficient", ["a", "b"])
def test_directions_that_the_product_does_not_have_become_new_ones(deficient, dtype):
    """Three are to be kept of a product of rank one, and one is to be new."""
    # bfloat16 has these whole numbers exactly.
    small = (lambda x: jnp.round(2 * x)) if dtype == jnp.bfloat16 else (lambda x: x)
    of_rank_one = lambda m, n: small(normal(0, m, 1)) @ small(normal(1, 1, n))
    a, b = normal(2, 8, 4), normal(3, 4, 6)
    a, b = (of_rank_one(8, 4), b) if deficient == "a" else (a, of_rank_one(4, 6))
    adapter = {"q": {"lora_a": a.astype(dtype), "lora_b": b.astype(dtype)}}
    base, state = {"q": {"kernel": jnp.zeros((8, 6))}}, loft_adamw(1.0).init(adapter)
    new = renew(base, adapter, state, KEY, keep=3)
    before, after = merge(base, adapter), merge(*new[:2])
    tolerance = 20 * float(jnp.finfo(dtype).eps)
    assert_trees_close(after, before, tolerance * float(jnp.abs(before["q"]["kernel"]).max()))
    lengths = direction_lengths(jax.tree.map(lambda x: np.asarray(x, np.float32), new.adapter))
    for of in lengths:
        assert of.min() > 0.2 * of.max()
    product = np.asarray(new.adapter["q"]["lora_a"] @ new.adapter["q"]["lora_b"], np.float32)
    assert np.linalg.matrix_rank(product, rtol=0.05) == 4


def test_new_directions_enter_with_the_size_of_a_product_that_nearly_cancels():
    x, y = normal(0, 48), normal(1, 40)
    u, v = jnp.stack([x, x], 1), jnp.stack([y, -y * (1 - 1e-4)], 1)
    exact = np.linalg.norm(np.asarray(u, np.float64) @ np.asarray(v, np.float64).T)
    given = RenewalInput(FactorPair(u, v), None)
    for seed in range(4):
        new = renew_factors(jax.random.key(seed), given, 0, 2, random_directions, 1.0)
        sizes = np.linalg.svd(new.a @ new.b.T, compute_uv=False)[:2]
        np.testing.assert_allclose(sizes, exact / 2**0.5, rtol=0.02)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SECOND_MOMENTS)
def test_unseen_directions_get_the_mean_of_the_seen_ones_of_a_partner_of_rank_one(
    name, assert_close
):
    second_moment = SECOND_MOMENTS[name]
    wide = functools.partial(normal, dtype=np.float64)
    old = orthonormal_basis(wide(0, 9, 1) @ wide(1, 1, 3))
    h = wide(2, 5, 9) @ old.matrix
    nothing = jnp.zeros((5, second_moment.width(5, 3)))
    nu = second_moment.advance(nothing, h, jnp.eye(3), None, 0.0, UNSHARDED)
    columns = wide(3, 9, 2)
    new = orthonormal_basis(columns - old.matrix @ (old.matrix.T @ columns))
    carried = carry_moments(second_moment, Moments(h, nu), old.matrix, old, new)
    found = second_moment.diagonal(carried.nu, 2, UNSHARDED)
    assert_close(found, np.tile(np.sum(h**2, 1, keepdims=True), 2), 1e-10, "unseen directions")
    assert_close(carried.mu, np.zeros((5, 2)), 1e-10, "unseen directions")


# Several optimizers, and those around them.


def two_layers() -> tuple:
    base = {name: {"kernel": normal(k, 8, 6)} for k, name in enumerate(("l0", "l1"))}
    adapter = {
        name: {"lora_a": normal(k + 2, 8, 2), "lora_b": normal(k + 4, 2, 6)}
        for k, name in enumerate(base)
    }
    return base, adapter


def trained(tx, adapter, steps: int = 3) -> tuple:
    state, update = tx.init(adapter), jax.jit(tx.update)
    for seed in range(steps):
        updates, state = update(random_like(adapter, seed), state, adapter)
        adapter = optax.apply_updates(adapter, updates)
    return adapter, state


def by_layer(by_leaf=False, **optimizers):
    labels = lambda params: {k: dict.fromkeys(v, k) if by_leaf else k for k, v in params.items()}
    return optax.partition(optimizers, labels)


@pytest.mark.parametrize("by_leaf", [False, True], ids=["subtrees", "leaves"])
def test_layers_with_optimizers_of_their_own_are_renewed_as_by_one(by_leaf):
    base, adapter = two_layers()
    make = functools.partial(loft_adamw, 1e-2)
    adapter, state = trained(make(), adapter)
    tx = by_layer(by_leaf, l0=make(), l1=make())
    parts, apart = trained(tx, two_layers()[1])
    assert_trees_close(parts, adapter)
    directions = lambda key, given, count: tuple(normal(9, *x.shape) for x in given.factors)
    expected = renew(base, adapter, state, KEY, directions=directions)
    found = renew(base, parts, apart, KEY, directions=directions)
    assert_trees_close(found.adapter, expected.adapter)
    assert_trees_close(found.base, expected.base)
    assert jax.tree.structure(found.state) == jax.tree.structure(apart)
    for name in adapter:
        one = found.state.inner_states[name].inner_state[0]
        for field in ("basis", "mu", "nu"):
            together = getattr(expected.state[0], field)[name]
            assert_trees_close(getattr(one, field)[name], together)


def test_only_the_moments_of_an_optimizer_that_has_some_are_carried():
    base, adapter = two_layers()
    tx = by_layer(l0=loft_sgd(1e-2), l1=loft_adamw(1e-2))
    adapter, state = trained(tx, adapter)
    new = renew(base, adapter, state, KEY, directions="random")
    before, after = (x.inner_states["l1"].inner_state[0] for x in (state, new.state))
    for field in ("basis", "mu", "nu"):
        for name, x in getattr(after, field)["l1"].items():
            assert jnp.abs(x - getattr(before, field)["l1"][name]).max() > 1e-4, (field, name)
    assert_trees_close(merge(*new[:2]), merge(base, adapter))


def in_two_parts(tx):
    return optax.MultiSteps(tx, 2).gradient_transformation()


ACCUMULATING = {
    "all": lambda: in_two_parts(loft_adamw(1e-2)),
    "layers": lambda: by_layer(
        l0=in_two_parts(loft_adamw(1e-2)), l1=in_two_parts(loft_adamw(1e-2))
    ),
    "twice": lambda: in_two_parts(in_two_parts(loft_adamw(1e-2))),
}


@pytest.mark.parametrize("how", ACCUMULATING)
def test_an_accumulation_has_the_shapes_of_the_new_factors(how):
    base, adapter = two_layers()
    tx = ACCUMULATING[how]()
    adapter, state = trained(tx, adapter, 4)
    new = change_rank(base, adapter, state, KEY, 1)
    assert types(new.state) == types(tx.init(new.adapter))
    updates, _ = jax.jit(tx.update)(random_like(new.adapter, 9), new.state, new.adapter)
    assert types(updates) == types(new.adapter)


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_gradients_are_accumulated_for_the_new_factors(rank):
    base, adapter = two_layers()
    tx = optax.MultiSteps(loft_adamw(1e-2), 2)
    adapter, state = trained(tx, adapter, 4)
    change = renew if rank is None else functools.partial(change_rank, rank=rank)
    new = change(base, adapter, state, KEY)
    assert types(new.state.acc_grads) == types(new.adapter)
    grads = random_like(new.adapter, 9)
    _, once = tx.update(grads, new.state, new.adapter)
    updates, _ = tx.update(grads, once, new.adapter)
    plain, _ = loft_adamw(1e-2).update(grads, new.state.inner_opt_state, new.adapter)
    assert_trees_close(updates, plain)


def test_an_accumulation_that_is_traced_starts_anew():
    base, adapter = two_layers()
    adapter, state = trained(optax.MultiSteps(loft_adamw(1e-2), 4), adapter, 2)
    assert state.mini_step == 2
    new = jax.jit(renew)(base, adapter, state, KEY)
    assert new.state.mini_step == 0
    assert not any(x.any() for x in jax.tree.leaves(new.state.acc_grads))


def test_pairs_that_no_entry_matches_keep_no_direction():
    base, adapter = two_layers()
    adapter, state = trained(loft_adamw(1e-2), adapter)
    new = renew(base, adapter, state, KEY, keep=(("l0/.*", 2),))
    assert_trees_close(new.adapter["l0"], adapter["l0"], 0)
    assert_trees_close(new.base["l0"], base["l0"], 1e-6)
    assert jnp.abs(new.adapter["l1"]["lora_a"] - adapter["l1"]["lora_a"]).max() > 0.1


def test_an_adapter_with_more_columns_than_its_weight_bars_no_other():
    base, adapter = two_layers()
    base["l1"] = {"kernel": normal(7, 8, 3)}
    adapter["l1"] = {"lora_a": normal(8, 8, 4), "lora_b": normal(9, 4, 3)}
    adapter, state = trained(loft_adamw(1e-2), adapter)
    with pytest.raises(ValueError, match="l1/lora_a: its rank is 4, and its weight has 3"):
        renew(base, adapter, state, KEY)
    new = change_rank(base, adapter, state, KEY, (("l0/.*", 1),))
    assert new.adapter["l0"]["lora_a"].shape == (8, 1)
    assert_trees_close(new.adapter["l1"], adapter["l1"], 0)
    assert renew(base, adapter, state, KEY, keep=(("l1/.*", 4),)).adapter["l1"]["lora_b"].any()


def test_without_momentum_a_rank_shrinks():
    base, adapter = two_layers()
    new = change_rank(base, adapter, loft_sgd(1e-2).init(adapter), KEY, 1)
    assert new.adapter["l0"]["lora_b"].shape == (1, 6)


WARNED = """
import warnings
import jax, jax.numpy as jnp
from flax import nnx
from loft_jax import loft_adamw
from loft_jax.adapters import LoraRule, add_lora, renew, renew_model

adapter = {"q": {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.ones((2, 6))}}
base, state = {"q": {"kernel": jnp.zeros((8, 6), jnp.bfloat16)}}, loft_adamw(1.0).init(adapter)
rule = LoraRule(path="", rank=2, alpha=4, init_b=nnx.initializers.normal())
model = add_lora(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), rule, rngs=nnx.Rngs(1))
optimizer = nnx.Optimizer(model, loft_adamw(1e-2, pairs=rule), wrt=nnx.LoRAParam)
key = jax.random.key(0)
for call in (
    lambda: renew(base, adapter, state, key),  # line 15
    lambda: renew_model(model, optimizer, key),  # line 16
):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    for w in caught:
        print(w.filename, w.lineno, " ".join(str(w.message).split()))
"""


def test_warnings_are_at_the_users_line():
    """In another process: here the frames of the type checker lie between."""
    run = subprocess.run(
        [sys.executable, "-c", WARNED], check=True, capture_output=True, text=True, timeout=300
    )
    first, second = run.stdout.splitlines()
    assert first.startswith("<string> 15 q/kernel is bfloat16")
    assert second.startswith("<string> 16 ") and "made with scale 2" in second


def test_a_change_of_rank_in_place_keeps_what_it_can():
    rule = LoraRule(path="", rank=2, alpha=4)
    model = add_lora(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), rule, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, loft_adamw(1e-2, pairs=rule), wrt=nnx.LoRAParam)
    with pytest.raises(ValueError, match="leave keep out"):
        renew_model(model, optimizer, KEY, rank=3, keep=1, pairs=rule)
