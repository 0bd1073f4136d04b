"""LoFT-AdamW in one file, to read before the package: Algorithm 1 on one device, for nested dicts.

LoFT (Tastan et al., ICLR 2026, arXiv:2505.21289) trains the factors U (m, r) and V (n, r) of

    W = W0 + s U V^T,     lora_a = U,  lora_b = V^T,  s = alpha / r

so that W moves as AdamW on the full weight would move it, as far as rank r allows. The numbers of
blocks, equations and lines are the paper's. Every formula is written for U and its partner V: for
V, exchange the two and transpose the gradient. The scale goes into the partner: V stands for s V.

The paper writes the moments in the coordinates of V, so each formula carries (V^T V)^-1. Here
V = Q L with orthonormal columns in Q and L = (V^T V)^(1/2). With G = grad_W f, so grad_U f = G V:

    the paper                                       here
    projector        P_V = V (V^T V)^-1 V^T         Q Q^T
    scaled gradient  grad_U f (V^T V)^-1            h = grad_U f L^-1 = G Q    G P_V = h Q^T
    calibration      C = V_old^T V (V^T V)^-1       T = Q_old^T Q
    first moment     m                              M = m L                    eq. (8) = M Q^T
    second moment    p (V * V)                      P_i for each row i of U    v_ij = q_j^T P_i q_j
    step             D V (V^T V)^-1                 D Q L^-1                   moves W by D P_V

Both columns move W alike. The left one divides by |V|^2, which loses digits when V is small.

The package (`loft_jax`) adds: a basis for sharded factors, packed P_i, m x n work in blocks, a
bound on Adam's ratio against rounding, balanced factors (`balance=False` leaves them out), clipping
(block 6), stacked layers, several devices. It also lets the same factor move again after a step in
which no adapter had a gradient.

`python examples/minimal_loft.py` takes a few seconds. It prints a table of losses in matrix
factorization, all at one learning rate: AdamW on W, LoFT with either second moment, and LoRA (AdamW
on the factors). LoFT follows AdamW and does not depend on s. LoRA does, and can be slower or
faster. The last line is the largest difference in W between LoFT at full rank and AdamW.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class FactorState(NamedTuple):  # of U
    q: jax.Array  # (n, r), the partner's basis at the last step (line 7 needs V_old)
    m: jax.Array  # (m, r), the first moment M
    p: Any  # the second moment: all P_i as (m, r, r), or R (m,) and S (r, r) if factored


class LoftState(NamedTuple):
    count: jax.Array  # steps taken
    leaves: dict[str, Any]  # by path: FactorState of a factor, Adam's (m, v) of any other leaf


def orthonormal_basis(v):
    """Returns Q and L^-1 with V = Q L. V = 0 gives Q = 0 and L^-1 = 0: no direction for U.

    Directions that are rounding alone are dropped: this is the pseudo-inverse of footnote 1. The
    SVD is the plainest accurate way. It is slow on accelerators and would gather a sharded factor,
    so the package uses Cholesky factors of r x r Gram matrices, in several passes.
    """
    left, s, right = jnp.linalg.svd(v, full_matrices=False)  # V = left diag(s) right
    keep = s > max(v.shape) * jnp.finfo(v.dtype).eps * s[0]
    inverse = jnp.where(keep, 1 / jnp.where(keep, s, 1), 0)
    return (left * keep) @ right, (right.T * inverse) @ right


def advance_calibrated(p, t, h, b2):
    """Block 4, eqs. (11), (12): P_i <- b2 T^T P_i T + (1 - b2) h_i h_i^T.

    Squares of h cannot follow a change of basis: (h_i . q_j)^2 needs the products of its entries.
    """
    carried = jnp.einsum("iab,ac,bd->icd", p, t, t)
    return b2 * carried + (1 - b2) * h[:, :, None] * h[:, None, :]


def project_calibrated(m_hat, p_hat, q, eps):
    """Block 5: rebuilds Adam's direction D of the full weight, eq. (9), and returns D Q."""
    v_full = jnp.einsum("ja,iab,jb->ij", q, p_hat, q)
    denominator = jnp.sqrt(jnp.maximum(v_full, 0)) + eps  # eq. (13) has eps inside, AdamW outside
    return (m_hat @ q.T / denominator) @ q


def advance_factored(p, t, h, b2):
    """Not in the paper: Adafactor's estimate v_ij = R_i C_j / tr S, so no r^2 numbers per row.

    R_i = tr P_i are the row sums of v. S = sum_i P_i gives its column sums, C_j = q_j^T S q_j.
    S follows a change of basis exactly; the rows are assumed to lose the same share each.
    """
    row_sums, s = p
    carried, total = t.T @ s @ t, jnp.trace(s)
    share = jnp.trace(carried) / jnp.where(total > 0, total, 1)
    row_sums = b2 * share * row_sums + (1 - b2) * jnp.sum(h * h, axis=1)
    return row_sums, b2 * carried + (1 - b2) * h.T @ h


def project_factored(m_hat, p_hat, q, eps):
    """Block 5: D Q with nothing m x n, as sqrt(v_ij) = a_i c_j / t in root mean squares.

    Epsilon joins each of the three: sqrt(v) + eps where v is uniform, and still a product.
    """
    row_sums, s = p_hat
    column_sums = jnp.maximum(jnp.sum(q @ s * q, axis=1), 0)
    m, n = len(m_hat), len(q)
    a, c = jnp.sqrt(row_sums / n) + eps, jnp.sqrt(column_sums / m) + eps
    t = jnp.sqrt(jnp.trace(s) / (m * n)) + eps
    return (t / a)[:, None] * (m_hat @ (q.T / c @ q))


SECOND_MOMENTS = {
    "calibrated": (advance_calibrated, project_calibrated),
    "factored": (advance_factored, project_factored),
}


def partner(path):
    """Returns the path of the other factor of the pair, None for any other leaf."""
    for own, other in (("lora_a", "lora_b"), ("lora_b", "lora_a")):
        if path.endswith(own):
            return path.removesuffix(own) + other


def by_path(tree):
    """Returns {"layer/lora_a": U, "layer/lora_b": V, "head": leaf, ...} of a nested dict."""
    names = lambda keys: jax.tree_util.keystr(keys, simple=True, separator="/")
    leaves = {names(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(tree)}
    return {path: x.T if path.endswith("lora_b") else x for path, x in leaves.items()}


def minimal_loft_adamw(
    lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, scale=1.0, second_moment="calibrated"
):
    """LoFT-AdamW for each `lora_a`, `lora_b` of a nested dict, and AdamW for all other leaves."""
    advance, project = SECOND_MOMENTS[second_moment]

    def init(params):
        flat, leaves = by_path(params), {}
        for path, x in flat.items():
            leaves[path] = jnp.zeros_like(x), jnp.zeros_like(x)
            if other := partner(path):
                m, r = x.shape
                p = jnp.zeros((m, r, r), x.dtype)
                p = p if second_moment == "calibrated" else (p[:, 0, 0], p[0])
                leaves[path] = FactorState(jnp.zeros_like(flat[other]), jnp.zeros_like(x), p)
        return LoftState(jnp.zeros([], jnp.int32), leaves)

    def loft(g, before, q, l_inv, k):
        """Lines 7 to 17 for g = grad_U f and V = Q L: the new state of U, and its direction."""
        h = g @ l_inv  # block 2, eq. (5); line 8 prints V_old^T V where block 2 has V^T V
        t = before.q.T @ q
        m = b1 * before.m @ t + (1 - b1) * h  # block 3, eq. (7)
        p = advance(before.p, t, h, b2)  # block 4
        p_hat = jax.tree.map(lambda x: x / (1 - b2**k), p)  # v is linear in it
        direction = project(m / (1 - b1**k), p_hat, q, eps) @ l_inv  # block 5, eq. (13)
        return FactorState(q, m, p), direction

    def adam(g, before, k):
        m, v = b1 * before[0] + (1 - b1) * g, b2 * before[1] + (1 - b2) * g * g
        return (m, v), m / (1 - b1**k) / (jnp.sqrt(v / (1 - b2**k)) + eps)

    def update(updates, state, params=None):
        flat, grads, k = by_path(params), by_path(updates), state.count + 1
        bases = {path: orthonormal_basis(scale * x) for path, x in flat.items() if partner(path)}
        leaves, steps = {}, []
        for path, x in flat.items():
            before, moves = state.leaves[path], True
            if other := partner(path):  # the moments of both factors advance at every step
                leaves[path], delta = loft(grads[path], before, *bases[other], k)
                # Block 1, lines 2, 13, 28. V moves first, since U has no gradient while V = 0.
                # The direction of the inactive factor is computed too, for brevity.
                moves = k % 2 == (0 if path.endswith("lora_a") else 1)
            else:
                leaves[path], delta = adam(grads[path], before, k)
            # Lines 18, 25. The decay is decoupled, and an inactive factor does not decay.
            step = jnp.where(moves, -lr * (delta + weight_decay * x), 0)
            steps.append(step.T if path.endswith("lora_b") else step)
        return jax.tree.structure(params).unflatten(steps), LoftState(k, leaves)

    return optax.GradientTransformation(init, update)


def train(tx, params, weight, target, steps):
    """Returns the weights W_0, W_1, ... as `tx` minimizes the mean of (W - target)^2."""

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda params: jnp.mean((weight(params) - target) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), weight(params)

    return jax.lax.scan(step, (params, tx.init(params)), length=steps + 1)[1]


def main(m=64, n=32, r=4, lr=0.01, rows=(0, 25, 50, 100, 200)):
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    product = lambda s: lambda params: s * params["lora_a"] @ params["lora_b"]
    target = normal(0, m, r) @ normal(1, r, n) / r**0.5
    adamw, loft = optax.adamw(lr, weight_decay=0.0), minimal_loft_adamw
    factors = {"lora_a": normal(2, m, r) / m**0.5, "lora_b": jnp.zeros((r, n))}
    runs = {
        "AdamW": (adamw, jnp.zeros((m, n)), lambda w: w),
        "LoFT s=1": (loft(lr), factors, product(1)),
        "LoFT s=8": (loft(lr, scale=8), factors, product(8)),
        "factored s=1": (loft(lr, second_moment="factored"), factors, product(1)),
        "LoRA s=1": (adamw, factors, product(1)),
        "LoRA s=8": (adamw, factors, product(8)),
    }
    errors = [train(tx, x, weight, target, rows[-1]) - target for tx, x, weight in runs.values()]
    print(" step" + "".join(f"{name:>14}" for name in runs))
    for k in rows:
        print(f"{k:5}" + "".join(f"{jnp.mean(error[k] ** 2):14.2e}" for error in errors))

    square = {"lora_a": normal(3, 8, 8), "lora_b": normal(4, 8, 8)}
    ours = train(loft(lr), square, product(1), target[:8, :8], 100)
    full = train(adamw, product(1)(square), lambda w: w, target[:8, :8], 100)
    print(f"full rank, 100 steps: |LoFT - AdamW| <= {jnp.abs(ours - full).max():.0e} in float64")


if __name__ == "__main__":
    with jax.enable_x64(True):
        main()
