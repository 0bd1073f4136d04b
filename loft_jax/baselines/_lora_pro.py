"""LoRA-Pro: the step of both factors whose change of the weight is nearest to full AdamW's."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from loft_jax.algorithm.adam import AdamScalars, adam_ratio, adam_scalars, as_scalar
from loft_jax.baselines._checked import check_shapes
from loft_jax.baselines._matrices import Spectrum, gram_spectra, inverse_gram
from loft_jax.execution.arguments import leaves_like
from loft_jax.execution.groups import compute_dtype, group_pairs
from loft_jax.execution.transformation import Core, as_transformation, descend
from loft_jax.execution.update import resize_axis
from loft_jax.pairs.find import PairedTree


class ScaleByLoraProState(NamedTuple):
    """State of `scale_by_lora_pro`. The trees have the structure of the parameters.

    Attributes:
      count: ``()`` int32, steps taken.
      mu: first moment of the equivalent full gradient, ``m n`` numbers at each ``lora_b``: its rank
        axis is resized to the number of rows of ``lora_a``. Other leaves are `optax.MaskedNode`.
      nu: second moment, in the same form.
    """

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_lora_pro(
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    *,
    damping: float | jax.Array = 1e-8,
    pairs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The core of LoRA-Pro with AdamW, without learning rate, for chaining.

    Adam runs on the equivalent gradient of the full weight,
    :math:`E = P_U G + G P_V - P_U G P_V`, the nearest to :math:`G` that a step of both factors of
    :math:`W = W_0 + s U V^\top` can realise. The factors then approximate Adam's direction
    :math:`D` (``m x n``) as closely as possible:

    .. math::
      \Delta U &= s^{-1} D V (V^\top V)^{-1} + U X^\top \\
      \Delta V &= s^{-1} (I - P_V) D^\top U (U^\top U)^{-1} - V X

    where ``X`` has no effect to first order and is chosen to be nearest to LoRA's own step: it
    solves :math:`V^\top V X + X U^\top U = -s^{-1} (V^\top V)^{-1} V^\top D^\top U`.

    **The state is dense**: ``2 m n`` numbers per pair, as in full fine-tuning, and ``m x n`` arrays
    are formed at each step. Updates of non-LoRA parameters are unchanged.

    Args:
      b1, b2, eps: Adam's, on the full weight.
      damping: absolute, added to the diagonal of both Gram matrices before they are inverted.
      pairs: the LoRA pairs, as in `scale_by_loft_adam`.

    Returns:
      A transformation whose ``update`` needs ``params``.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: Wang, Liang, He, Wang and Tan, "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?",
      ICLR 2025, the version with AdamW. Bias correction uses the count of the current step, as in
      the paper and the first released code. The current released code is one step ahead, so its
      first update is 0.74 times as large.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.eye(2), "lora_b": jnp.zeros((2, 2))}
      >>> grads = {"lora_a": jnp.zeros((2, 2)), "lora_b": jnp.array([[3.0, -1.0], [-2.0, 4.0]])}
      >>> tx = scale_by_lora_pro()
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> updates["lora_b"].round(4)
      Array([[ 1., -1.],
             [-1.,  1.]], dtype=float32)
    """

    return as_transformation(_lora_pro_core(_Hyperparams(b1, b2, eps, damping)), pairs)


def lora_pro(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    *,
    damping: float | jax.Array = 1e-8,
    pairs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-Pro with AdamW; its state is that of full fine-tuning, ``2 m n`` numbers per pair.

    Both factors are updated at every step. Non-LoRA parameters get `optax.adam`. There is no
    weight decay: the authors' version also decays the frozen weight, which an optimizer of adapters
    cannot do, and their current code no longer has it.

    Args:
      learning_rate: a number or a schedule; use that of full fine-tuning (2e-5 in the released
        code).
      b1, b2, eps, damping, pairs: see `scale_by_lora_pro`.

    Returns:
      A transformation whose ``update`` needs ``params``.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: see `scale_by_lora_pro`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.eye(2), "lora_b": jnp.zeros((2, 2))}
      >>> grads = {"lora_a": jnp.zeros((2, 2)), "lora_b": jnp.array([[3.0, -1.0], [-2.0, 4.0]])}
      >>> tx = lora_pro(0.5)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> updates["lora_b"].round(4)
      Array([[-0.5,  0.5],
             [ 0.5, -0.5]], dtype=float32)
    """
    core = _lora_pro_core(_Hyperparams(b1, b2, eps, damping))
    return descend(core, learning_rate, pairs, others=optax.adam(learning_rate, b1, b2, eps))


class _Hyperparams(NamedTuple):
    """Numbers that may change from step to step."""

    b1: float | jax.Array
    b2: float | jax.Array
    eps: float | jax.Array
    damping: float | jax.Array


def _lora_pro_core(hyperparams: _Hyperparams) -> Core[ScaleByLoraProState, _Hyperparams]:
    def init(tree: PairedTree) -> ScaleByLoraProState:
        mu, nu = (tree.treedef.unflatten(_dense_zeros(tree)) for _ in range(2))
        return ScaleByLoraProState(jnp.zeros([], jnp.int32), mu, nu)

    def step(
        hyperparams: _Hyperparams,
        tree: PairedTree,
        gradients: list[Any],
        state: ScaleByLoraProState,
    ) -> tuple[list[Any], ScaleByLoraProState]:
        check_shapes(tree, state, jax.eval_shape(init, tree))
        mu, nu = (leaves_like(tree, field, "states") for field in (state.mu, state.nu))
        count = jnp.asarray(optax.safe_increment(state.count))
        directions, mu, nu = _step(tree, tree.leaves, gradients, mu, nu, count, hyperparams)
        unflatten = tree.treedef.unflatten
        return directions, ScaleByLoraProState(count, unflatten(mu), unflatten(nu))

    return Core(ScaleByLoraProState, init, step, hyperparams, sharded=False)


def _dense_zeros(tree: PairedTree) -> list[Any]:
    leaves: list[Any] = [optax.MaskedNode() for _ in tree.leaves]
    for pair in tree.pairs:
        b = tree.leaves[pair.b]
        zeros = jnp.zeros_like(b, dtype=compute_dtype(b))
        leaves[pair.b] = resize_axis(zeros, pair.layout_b.rank, pair.m)
    return leaves


@jax.default_matmul_precision("highest")
def _step(
    tree: PairedTree,
    params: list[jax.Array],
    gradients: list[jax.Array],
    mu: list[Any],
    nu: list[Any],
    count: jax.Array,
    hyperparams: _Hyperparams,
) -> tuple[list[jax.Array], list[Any], list[Any]]:
    b1, b2, eps, damping = hyperparams
    directions, new_mu, new_nu = list(gradients), list(mu), list(nu)
    groups = group_pairs(tree)
    grams = iter(gram_spectra([group.matrices(name, params) for group in groups for name in "ab"]))
    for group in groups:
        of_a, of_b = (functools.partial(group.matrices, name) for name in "ab")
        dense = of_b(mu)
        scalars = adam_scalars(count, b1, b2, eps, dense.dtype)
        of_pair = functools.partial(_pair, group.kind.scale, b1, b2, damping, scalars)
        d_u, d_v, *moments = group.kind.over_batch(of_pair)(
            of_a(params), of_b(params), next(grams), next(grams), of_a(gradients), of_b(gradients),
            dense, of_b(nu),
        )  # fmt: skip
        group.put_matrices("a", d_u, directions, gradients)
        group.put_matrices("b", d_v, directions, gradients)
        group.put_matrices("b", moments[0], new_mu, mu)
        group.put_matrices("b", moments[1], new_nu, nu)
    return directions, new_mu, new_nu


def _pair(
    s: float,
    b1: float | jax.Array,
    b2: float | jax.Array,
    damping: float | jax.Array,
    scalars: AdamScalars,
    u: Float[Array, "m r"],
    v: Float[Array, "n r"],
    gram_u: Spectrum,
    gram_v: Spectrum,
    g_u: Float[Array, "m r"],
    g_v: Float[Array, "n r"],
    mu: Float[Array, "n m"],
    nu: Float[Array, "n m"],
) -> tuple[Float[Array, "m r"], Float[Array, "n r"], Float[Array, "n m"], Float[Array, "n m"]]:
    """Returns the step of both factors and the dense moments (transposed, as ``lora_b`` is)."""
    b1, b2, damping = (as_scalar(x, u.dtype) for x in (b1, b2, damping))
    inverse_u, inverse_v = inverse_gram(gram_u, damping), inverse_gram(gram_v, damping)

    def nearest(g_u, g_v, x):
        """Returns the step nearest to a full ``G``, from ``g_u = s G V`` and ``g_v = s G^T U``."""
        outside = g_v - v @ (inverse_v @ (v.T @ g_v))
        return g_u @ inverse_v / s / s + u @ x.T, outside @ inverse_u / s / s - v @ x

    d_u, d_v = nearest(g_u, g_v, jnp.zeros_like(inverse_u))
    equivalent = s * (v @ d_u.T + d_v @ u.T)
    mu = b1 * mu + (1 - b1) * equivalent
    nu = b2 * nu + (1 - b2) * equivalent * equivalent
    direction = adam_ratio(mu / scalars.correction1, nu / scalars.correction2, scalars)
    h_u, h_v = s * direction.T @ v, s * direction @ u
    x = solve_sylvester(gram_v, gram_u, -inverse_v @ (h_u.T @ u) / s / s)
    return *nearest(h_u, h_v, x), mu, nu


def solve_sylvester(a: Spectrum, b: Spectrum, c: Float[Array, "r r"]) -> Float[Array, "r r"]:
    """Returns the ``X`` with ``A X + X B = C`` for positive semidefinite ``A`` and ``B``.

    The solution is zero in directions that both matrices map to zero.

    Example:
      >>> a, b = gram_spectra([jnp.diag(jnp.array([1.0, 2.0])), jnp.diag(jnp.array([1.0, 0.0]))])
      >>> solve_sylvester(a, b, jnp.ones((2, 2))).round(3)  # A is diag(1, 4), B diag(1, 0)
      Array([[0.5 , 1.  ],
             [0.2 , 0.25]], dtype=float32)
    """
    total = a.values[:, None] + b.values[None, :]
    inside = (a.vectors.T @ c @ b.vectors) / jnp.where(total > 0, total, 1)
    return a.vectors @ jnp.where(total > 0, inside, 0) @ b.vectors.T
