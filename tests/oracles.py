"""Independent dense oracles in NumPy float64, written from the paper's equations.

They share nothing with the package: explicit ``m x n`` projectors by pseudo-inverse, whole
sequences of projected gradients instead of accumulators, Kronecker products instead of packed cross
terms. Notation of the paper: ``W = W0 + s U V^T`` with ``U`` (m x r), ``V`` (n x r).
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Problem:
    """A smooth stochastic objective of ``W``: step ``k`` sees its own batch."""

    m: int
    n: int
    r: int
    seed: int = 0
    zero_init: bool = False
    condition: float = 1.0
    scale: float = 1.0
    zero_base: bool = False

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        self.batches = rng.normal(size=(64, 5, self.m))
        self.targets = 2 * rng.normal(size=(64, 5, self.n))
        self.w0 = rng.normal(size=(self.m, self.n)) * (not self.zero_base)
        self.u = conditioned(rng, self.m, self.r, self.condition)
        self.v = conditioned(rng, self.n, self.r, self.condition)
        if self.zero_init:
            self.v = np.zeros_like(self.v)

    def gradient(self, w: np.ndarray, k: int) -> np.ndarray:
        """Gradient of ``sum log cosh(X W - Y)`` at step ``k``."""
        x, y = self.batches[k % 64], self.targets[k % 64]
        return x.T @ np.tanh(x @ w - y)

    def transposed(self) -> "Problem":
        """The same problem of the transposed weight: the roles of ``U`` and ``V`` exchanged."""
        other = dataclasses.replace(self)
        other.m, other.n = self.n, self.m
        other.w0, other.u, other.v = self.w0.T, self.v, self.u
        other.gradient = lambda w, k: self.gradient(w.T, k).T
        return other

    def with_factors(self, u: np.ndarray, v: np.ndarray, scale: float = 1.0) -> "Problem":
        other = dataclasses.replace(self, scale=scale)
        other.u, other.v = u, v
        return other

    def weight(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return self.w0 + self.scale * u @ v.T


def conditioned(rng: np.random.Generator, n: int, r: int, condition: float) -> np.ndarray:
    """A random ``n x r`` matrix with singular values spread from 1 to ``1 / condition``."""
    q = np.linalg.qr(rng.normal(size=(n, n)))[0][:, : min(n, r)]
    z = np.linalg.qr(rng.normal(size=(r, r)))[0][:, : min(n, r)]
    return q * np.geomspace(1, 1 / condition, min(n, r)) @ z.T


@dataclasses.dataclass(frozen=True)
class Hyper:
    lr: float = 0.05
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_norm: float | None = None
    alternate: bool = True
    moves_first: str = "b"
    factored: bool = False
    eps_root: float = 0.0
    nesterov: bool = False

    def root(self, v_hat: np.ndarray) -> np.ndarray:
        return np.sqrt(v_hat + self.eps_root) + self.eps

    def m_hat(self, m: np.ndarray, g: np.ndarray, k: int) -> np.ndarray:
        """The bias-corrected first moment at step ``k`` (from 1), with Nesterov one step ahead."""
        if not self.nesterov:
            return m / (1 - self.b1**k)
        return self.b1 * m / (1 - self.b1 ** (k + 1)) + (1 - self.b1) * g / (1 - self.b1**k)


def projector(v: np.ndarray) -> np.ndarray:
    return v @ np.linalg.pinv(v)


class DenseMoments:
    """Eqs. (8) and (9) for one factor, keeping every projected gradient of the past."""

    def __init__(self, hyper: Hyper):
        self.hyper = hyper
        self.past: list[np.ndarray] = []
        self.row_sums = None

    def see(self, g: np.ndarray, p: np.ndarray) -> None:
        self.past = [past @ p for past in [*self.past, g]]
        if self.hyper.factored:
            self._see_factored(g @ p, p)

    def _see_factored(self, g: np.ndarray, p: np.ndarray) -> None:
        b2 = self.hyper.b2
        if self.row_sums is None:
            self.row_sums, self.gram = np.zeros(g.shape[0]), np.zeros((g.shape[1],) * 2)
        carried = p @ self.gram @ p
        total = np.trace(self.gram)
        shrink = np.trace(carried) / total if total > 0 else 0.0
        self.row_sums = b2 * shrink * self.row_sums + (1 - b2) * (g * g).sum(1)
        self.gram = b2 * carried + (1 - b2) * g.T @ g

    def direction(self) -> np.ndarray:
        """The dense Adam direction ``D`` (``m x n``), before its projection."""
        h, k = self.hyper, len(self.past)
        ages = np.arange(k)[::-1]
        m = (1 - h.b1) * sum(h.b1**age * g for age, g in zip(ages, self.past, strict=True))
        m_hat = h.m_hat(m, self.past[-1], k)
        if h.factored:
            rows, columns = self.row_sums / (1 - h.b2**k), np.diag(self.gram) / (1 - h.b2**k)
            a = h.root(rows / columns.size)
            c = h.root(columns / rows.size)
            t = h.root(columns.sum() / (rows.size * columns.size))
            return m_hat / (a[:, None] * c[None, :] / t)
        v = (1 - h.b2) * sum(h.b2**age * g * g for age, g in zip(ages, self.past, strict=True))
        return m_hat / h.root(v / (1 - h.b2**k))


class Head:
    """A non-LoRA parameter, with a gradient of its own at each step, trained by plain AdamW."""

    def __init__(self, size: int, steps: int, seed: int = 5):
        rng = np.random.default_rng(seed)
        self.start = rng.normal(size=size)
        self.gradients = rng.normal(size=(steps, size))


def dense_loft(
    problems: list[Problem], hyper: Hyper, steps: int, head: Head | None = None
) -> list[list[np.ndarray]]:
    """Trajectories of ``W`` of several layers trained together (one clipping norm), then the head.

    Moves ``W`` through its factors: ``dU = D P_V pinv(V^T)``, so that ``dU V^T = D P_V``.
    """
    us, vs = [p.u for p in problems], [p.v for p in problems]
    moments = [(DenseMoments(hyper), DenseMoments(hyper)) for _ in problems]
    trajectories: list[list[np.ndarray]] = [[] for _ in problems]
    leaf = None if head is None else AdamLeaf(head.start, hyper)
    decay = 1 - hyper.lr * hyper.weight_decay
    for k in range(steps):
        move_u = (k % 2 == 0) == (hyper.moves_first == "a")
        gs = [p.gradient(p.weight(u, v), k) for p, u, v in zip(problems, us, vs, strict=True)]
        factor = clip_factor(gs, us, vs, hyper, move_u, head and head.gradients[k])
        for i, (p, (moments_u, moments_v)) in enumerate(zip(problems, moments, strict=True)):
            u, v, g = us[i], vs[i], factor * gs[i]
            moments_u.see(g, projector(v))
            moments_v.see(g.T, projector(u))
            if move_u or not hyper.alternate:
                du = moments_u.direction() @ np.linalg.pinv(v).T / p.scale
                us[i] = decay * u - hyper.lr * du
            if not move_u or not hyper.alternate:
                dv = moments_v.direction() @ np.linalg.pinv(u).T / p.scale
                vs[i] = decay * v - hyper.lr * dv
            trajectories[i].append(p.weight(us[i], vs[i]))
        if leaf is not None:
            leaf.step(factor * head.gradients[k])
    return trajectories if leaf is None else [*trajectories, leaf.trajectory]


class AdamLeaf:
    """AdamW on one array."""

    def __init__(self, start: np.ndarray, hyper: Hyper):
        self.w, self.m, self.v, self.hyper = start, 0.0, 0.0, hyper
        self.trajectory: list[np.ndarray] = []

    def step(self, g: np.ndarray) -> None:
        h, k = self.hyper, len(self.trajectory) + 1
        self.m = h.b1 * self.m + (1 - h.b1) * g
        self.v = h.b2 * self.v + (1 - h.b2) * g * g
        v_hat = self.v / (1 - h.b2**k)
        if h.factored and g.ndim == 2:  # Adafactor's rank-one estimate
            v_hat = np.outer(v_hat.sum(1), v_hat.sum(0)) / v_hat.sum()
        direction = h.m_hat(self.m, g, k) / h.root(v_hat)
        self.w = self.w - h.lr * (direction + h.weight_decay * self.w)
        self.trajectory.append(self.w)


def clip_factor(gs, us, vs, hyper: Hyper, move_u: bool, other=None) -> float:
    """Block 6 on the effective dense gradients, and on a non-LoRA parameter as it is."""
    if hyper.max_norm is None:
        return 1.0
    squares = 0.0 if other is None else (other**2).sum()
    for g, u, v in zip(gs, us, vs, strict=True):
        of_u, of_v = g @ projector(v), projector(u) @ g
        effective = of_u + of_v if not hyper.alternate else of_u if move_u else of_v
        squares += (effective**2).sum()
    return min(1.0, hyper.max_norm / np.sqrt(squares))


def algorithm_1(
    problem: Problem,
    hyper: Hyper,
    steps: int,
    calibrate: bool = True,
    scale_gradient: bool = True,
    reconstruct: bool = True,
    diagonal: bool = False,
) -> list[np.ndarray]:
    """Algorithm 1 as printed, in the raw coordinates, with the errata mended.

    The switches are the ablations: calibration matrices that are the identity, the factors' own
    gradients, Adam's ratio entry by entry in the factors, and (then) a second moment of the factors
    that keeps squares alone and is not calibrated. The last two take the scale to be 1.

    Scaled gradients with ``(V^T V)^-1``, the calibration matrix ``C``, ``r x r`` cross terms as
    ``m x r^2`` Khatri-Rao products calibrated by ``C (x) C``; epsilon outside the square root.
    """
    p, h = problem, hyper
    u, v = p.u.copy(), p.scale * p.v  # the scale goes to one factor
    u_old, v_old = u, v
    r = p.r
    mu_u, mu_v = np.zeros_like(u), np.zeros_like(v)
    p_u, p_v = np.zeros((p.m, r * r)), np.zeros((p.n, r * r))
    trajectory = []
    inv = lambda x: np.linalg.pinv(x.T @ x, rcond=1e-30, hermitian=False)
    khatri_rao = lambda x: np.stack([np.kron(row, row) for row in x])

    def entrywise(mu, cross):
        squares = np.maximum(cross[:, :: r + 1], 0)
        return mu / (1 - h.b1**k) / (np.sqrt(squares / (1 - h.b2**k)) + h.eps)

    for k in range(1, steps + 1):
        g = p.gradient(p.w0 + u @ v.T, k - 1)
        iu, iv = inv(u), inv(v)
        gu, gv = g @ v, g.T @ u
        if scale_gradient:
            gu, gv = gu @ iv, gv @ iu
        cu, cv = u_old.T @ u @ iu, v_old.T @ v @ iv
        if not calibrate:
            cu = cv = np.eye(r)
        mu_u = h.b1 * mu_u @ cv + (1 - h.b1) * gu
        mu_v = h.b1 * mu_v @ cu + (1 - h.b1) * gv
        ku, kv = (np.eye(r * r) if diagonal else np.kron(c, c) for c in (cu, cv))
        p_u = h.b2 * p_u @ kv + (1 - h.b2) * khatri_rao(gu)
        p_v = h.b2 * p_v @ ku + (1 - h.b2) * khatri_rao(gv)
        u_old, v_old = u, v
        move_u = (k % 2 == 1) == (h.moves_first == "a")
        start = u
        if move_u or not h.alternate:
            second = np.sqrt(np.maximum(p_u @ khatri_rao(v).T, 0) / (1 - h.b2**k)) + h.eps
            du = (mu_u @ v.T / (1 - h.b1**k)) / second @ v @ iv
            du = du if reconstruct else entrywise(mu_u, p_u)
            u = (1 - h.lr * h.weight_decay) * u - h.lr * du
        if not move_u or not h.alternate:
            second = np.sqrt(np.maximum(p_v @ khatri_rao(start).T, 0) / (1 - h.b2**k)) + h.eps
            dv = (mu_v @ start.T / (1 - h.b1**k)) / second @ start @ iu
            dv = dv if reconstruct else entrywise(mu_v, p_v)
            v = (1 - h.lr * h.weight_decay) * v - h.lr * dv
        trajectory.append(p.w0 + u @ v.T)
    return trajectory


def adamw(problem: Problem, hyper: Hyper, steps: int) -> list[np.ndarray]:
    """AdamW on the full weight, from the adapter's starting point."""
    leaf = AdamLeaf(problem.weight(problem.u, problem.v), hyper)
    for k in range(steps):
        leaf.step(problem.gradient(leaf.w, k))
    return leaf.trajectory


def newton_schulz(x: np.ndarray, steps: int = 5, eps: float = 1e-7) -> np.ndarray:
    """Algorithm 3, on a dense matrix of any shape."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (np.linalg.norm(x) + eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@dataclasses.dataclass(frozen=True)
class MomentumHyper:
    lr: float = 0.02
    momentum: float = 0.95
    nesterov: bool = False
    weight_decay: float = 0.0
    alternate: bool = True
    moves_first: str = "b"
    muon: bool = False
    consistent_rms: float | None = None

    def direction(self, moment: np.ndarray, g: np.ndarray, k: int) -> np.ndarray:
        """The direction of the full weight at step ``k`` (from 0), from moment and gradient."""
        if not self.muon:
            return g + self.momentum * moment if self.nesterov else moment
        d = moment
        if self.nesterov:  # with Optax's bias corrections
            ahead, now = (1 - self.momentum ** (k + i) for i in (2, 1))
            d = g / now + self.momentum * moment / ahead
        factor = 1 if self.consistent_rms is None else self.consistent_rms * max(d.shape) ** 0.5
        return factor * newton_schulz(d)


def dense_momentum(problem: Problem, hyper: MomentumHyper, steps: int) -> list[np.ndarray]:
    """Momentum (or Muon's) on projected full gradients, each moment projected step after step."""
    p, h = problem, hyper
    u, v = p.u, p.v
    m_u = m_v = 0.0
    decay = 1 - h.lr * h.weight_decay
    trajectory = []
    for k in range(steps):
        g = p.gradient(p.weight(u, v), k)
        on_v, on_u = projector(v), projector(u)
        m_u = h.momentum * m_u @ on_v + g @ on_v if k else g @ on_v
        m_v = on_u @ (h.momentum * m_v + g)
        move_u = (k % 2 == 0) == (h.moves_first == "a")
        du = h.direction(m_u, g @ on_v, k) @ np.linalg.pinv(v).T / p.scale
        dv = h.direction(m_v, on_u @ g, k).T @ np.linalg.pinv(u).T / p.scale
        if move_u or not h.alternate:
            u = decay * u - h.lr * du
        if not move_u or not h.alternate:
            v = decay * v - h.lr * dv
        trajectory.append(p.weight(u, v))
    return trajectory


def full_momentum(problem: Problem, hyper: MomentumHyper, steps: int) -> list[np.ndarray]:
    """Gradient descent with momentum, or Muon, on the full weight."""
    w = problem.weight(problem.u, problem.v)
    moment, trajectory = np.zeros_like(w), []
    for k in range(steps):
        g = problem.gradient(w, k)
        moment = hyper.momentum * moment + g
        w = w - hyper.lr * hyper.direction(moment, g, k)
        trajectory.append(w)
    return trajectory


def simple_loft(problem: Problem, hyper: Hyper, steps: int) -> list[np.ndarray]:
    """LoFT (simple) in Gram-Schmidt bases of the factors, scale and all.

    The projected gradients of the past are carried exactly; their squares in the basis are not.
    """
    p, h = problem, hyper
    u, v = p.u, p.v
    pasts: list[list[np.ndarray]] = [[], []]
    squares = [0.0, 0.0]
    trajectory = []
    for k in range(1, steps + 1):
        g = p.gradient(p.weight(u, v), k - 1)
        steps_of = []
        for i, (full, partner) in enumerate(((g, v), (g.T, u))):
            q, r = np.linalg.qr(partner) if partner.any() else (0 * partner, np.eye(p.r))
            signs = np.sign(np.diag(r))
            q, r = q * signs, r * signs[:, None]
            pasts[i] = [past @ q @ q.T for past in [*pasts[i], full]]
            moment = sum(h.b1 ** (k - 1 - j) * past for j, past in enumerate(pasts[i])) @ q
            squares[i] = h.b2 * squares[i] + (1 - h.b2) * (full @ q) ** 2
            m_hat = (1 - h.b1) * moment / (1 - h.b1**k)
            ratio = m_hat / (np.sqrt(squares[i] / (1 - h.b2**k)) + h.eps)
            steps_of.append(ratio @ np.linalg.inv(r).T / p.scale)
        move_u = (k % 2 == 1) == (h.moves_first == "a")
        if move_u or not h.alternate:
            u = (1 - h.lr * h.weight_decay) * u - h.lr * steps_of[0]
        if not move_u or not h.alternate:
            v = (1 - h.lr * h.weight_decay) * v - h.lr * steps_of[1]
        trajectory.append(p.weight(u, v))
    return trajectory


class Factorization(Problem):
    """The matrix factorization problem of the paper's lemmas, ``1/2 |U V^T - A|^2``."""

    def __post_init__(self):
        super().__post_init__()
        self.w0 = np.zeros((self.m, self.n))
        self.a = np.random.default_rng(self.seed + 1).normal(size=(self.m, self.n))

    def gradient(self, w: np.ndarray, k: int) -> np.ndarray:
        return w - self.a
