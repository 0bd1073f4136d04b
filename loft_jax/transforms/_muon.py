"""LoFT-Muon: the paper's Algorithm 5, in the orthonormal basis, with its learning rate."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from loft_jax._frame import Frame, to_factor
from loft_jax._moments import as_scalar
from loft_jax._newton_schulz import newton_schulz
from loft_jax._pairs import LoraPairs
from loft_jax._rows import Rows
from loft_jax.transforms import _alternation
from loft_jax.transforms._descent import descend
from loft_jax.transforms._momentum import momentum_transformation
from loft_jax.transforms._partition import factors_and_rest
from loft_jax.transforms._step import Blocks

Coefficients = tuple[float | jax.Array, float | jax.Array, float | jax.Array]
QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)


def scale_by_loft_muon(
    momentum: float | jax.Array = 0.95,
    *,
    ns_steps: int | jax.Array = 5,
    ns_coeffs: Coefficients = QUINTIC,
    ns_eps: float | jax.Array = 1e-7,
    nesterov: bool = False,
    consistent_rms: float | jax.Array | None = None,
    alternate: bool = True,
    moves_first: _alternation.FactorName = "b",
    mu_dtype: jax.typing.DTypeLike | None = None,
    pairs: LoraPairs | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The core of LoFT-Muon, without learning rate and weight decay, for chaining.

    For the pair :math:`W = W_0 + s U V^\top`, with :math:`sV = Q L^\top` and
    :math:`T = Q_-^\top Q`, the side of :math:`U` is

    .. math::
      M &\leftarrow \mu M T + \nabla_U f \, L^{-\top} \\
      \Delta U &= \mathrm{NewtonSchulz}(M) \, L^{-1}

    which orthogonalises the full moment :math:`M Q^\top` at the cost of an ``m x r`` matrix: the
    columns of :math:`Q` are orthonormal, so the iteration on :math:`M` is the dense one. State: the
    basis and the moment, ``2 r`` numbers a row.

    Leaves outside pairs get the momentum without orthogonalisation. `loft_muon` gives them AdamW;
    in a chain of your own give them theirs with `optax.partition`.

    Args:
      momentum: decay of the moment.
      ns_steps: Newton-Schulz iterations.
      ns_coeffs: coefficients of the odd quintic that they iterate.
      ns_eps: added to the norm that starts them.
      nesterov: orthogonalises ``gradient + momentum * moment`` in place of the moment.
      consistent_rms: None moves by the orthogonalised moment as it is, as Algorithm 5 prints; a
        number (such as 0.2) scales it by ``sqrt(max(m, n)) * consistent_rms``, as
        `optax.contrib.muon` does, so that the learning rates of AdamW serve.
      alternate, moves_first, mu_dtype, pairs: as in `scale_by_loft_adam`.

    Returns:
      A transformation whose ``update`` needs ``params``, with a `ScaleByLoftMomentumState`.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: Algorithms 3 to 5 of Tastan et al., ICLR 2026.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.eye(3), "lora_b": jnp.zeros((3, 3))}  # full rank: Muon itself
      >>> grads = {"lora_a": jnp.zeros((3, 3)), "lora_b": jnp.diag(jnp.array([3.0, -2.0, 1.0]))}
      >>> tx = scale_by_loft_muon(ns_steps=30, ns_coeffs=(1.5, -0.5, 0.0))
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> jnp.diagonal(updates["lora_b"]).round(3)
      Array([ 1., -1.,  1.], dtype=float32)
    """

    def direction(
        options: tuple[Any, ...], source: jax.Array, frame: Frame, rows: Rows
    ) -> jax.Array:
        steps, coeffs, eps, rms = options
        update = newton_schulz(source, steps, coeffs, eps, rows)
        if rms is not None:
            longer = max(rows.count(source.shape[0]), frame.rows.count(frame.span.shape[0]))
            update = update * (longer**0.5 * as_scalar(rms, update.dtype))
        return to_factor(update, frame)

    order = Blocks(alternate=alternate, moves_first=moves_first)
    options = (ns_steps, ns_coeffs, ns_eps, consistent_rms)
    return momentum_transformation(direction, options, momentum, nesterov, order, mu_dtype, pairs)


def loft_muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | jax.Array = 0.95,
    *,
    ns_steps: int | jax.Array = 5,
    ns_coeffs: Coefficients = QUINTIC,
    ns_eps: float | jax.Array = 1e-7,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    consistent_rms: float | jax.Array | None = None,
    alternate: bool = True,
    moves_first: _alternation.FactorName = "b",
    mu_dtype: jax.typing.DTypeLike | None = None,
    adam_b1: float | jax.Array = 0.9,
    adam_b2: float | jax.Array = 0.999,
    adam_eps: float | jax.Array = 1e-8,
    adam_weight_decay: float | jax.Array = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    pairs: LoraPairs | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoFT-Muon: low-rank adaptation that follows full fine-tuning with Muon.

    The factor whose turn it is, say :math:`U`, moves by :math:`-\eta_k (\Delta U + \lambda U)` with
    :math:`\Delta U` as in `scale_by_loft_muon`; the other rests, and does not decay either. At full
    rank it is Muon. Leaves outside pairs get `optax.adamw`.

    Args:
      learning_rate: a number or a schedule of the step.
      momentum, ns_steps, ns_coeffs, ns_eps, nesterov, consistent_rms: see `scale_by_loft_muon`.
      weight_decay: of the factors: decoupled, times the learning rate; a number or a schedule.
      mask: a tree of booleans, or a function from parameters to one, of the factors to decay.
      alternate, moves_first, pairs: as in `scale_by_loft_adam`.
      mu_dtype: dtype of the factors' moment.
      adam_b1, adam_b2, adam_eps, adam_weight_decay: of leaves outside pairs. Their `optax.adamw`
        keeps its moments in their dtype.
      adam_learning_rate: theirs; None for ``learning_rate``.

    Returns:
      A transformation whose ``update`` needs ``params``: an `optax.partition` of the leaves.

    Raises:
      ValueError, TypeError: as `scale_by_loft_adam`.

    Source: Algorithm 5 of Tastan et al., ICLR 2026, with the learning rate that its lines 17 to 22
      leave out.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> target = jnp.outer(jnp.arange(4.0), jnp.array([1.0, -1.0, 2.0]))
      >>> loss = lambda p: jnp.sum((p["lora_a"] @ p["lora_b"] - target) ** 2)
      >>> params = {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.zeros((1, 3))}
      >>> tx = loft_muon(optax.linear_schedule(0.5, 0.0, 100))
      >>> @jax.jit
      ... def step(params, state):
      ...   updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...   return optax.apply_updates(params, updates), state
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...   params, state = step(params, state)
      >>> bool(loss(params) < 1e-2 * jnp.sum(target**2))
      True
    """
    core = scale_by_loft_muon(
        momentum,
        ns_steps=ns_steps,
        ns_coeffs=ns_coeffs,
        ns_eps=ns_eps,
        nesterov=nesterov,
        consistent_rms=consistent_rms,
        alternate=alternate,
        moves_first=moves_first,
        mu_dtype=mu_dtype,
        pairs=pairs,
    )
    muon = descend(core, learning_rate, weight_decay, mask, alternate, moves_first, pairs)
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    adamw = optax.adamw(rate, adam_b1, adam_b2, adam_eps, weight_decay=adam_weight_decay)

    return factors_and_rest(muon, adamw, pairs)
