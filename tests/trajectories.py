"""Runs the package's transformations on the oracles' problems."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from oracles import Head, Hyper, Problem

import loft_jax


def transformation(
    problems: list[Problem], hyper: Hyper, *, chained: bool = True, **options
) -> optax.GradientTransformation:
    """Clipping, if any, and `loft_adamw` for the adapters ``layer<i>/lora_a, lora_b``."""
    pairs = loft_jax.LoraPairs(
        scale=tuple((f"layer{i}/.*", problem.scale) for i, problem in enumerate(problems))
    )
    order = {"alternate": hyper.alternate, "moves_first": hyper.moves_first, "pairs": pairs}
    if not chained:
        options["max_norm"] = hyper.max_norm
    tx = loft_jax.loft_adamw(
        hyper.lr,
        hyper.b1,
        hyper.b2,
        hyper.eps,
        hyper.eps_root,
        weight_decay=hyper.weight_decay,
        nesterov=hyper.nesterov,
        **order,
        **{"second_moment": "factored" if hyper.factored else "calibrated", **options},
    )
    if hyper.max_norm is None or not chained:
        return tx
    return optax.chain(loft_jax.clip_by_projected_global_norm(hyper.max_norm, **order), tx)


def run(
    problems: list[Problem],
    hyper: Hyper,
    steps: int,
    dtype: jnp.dtype = np.float64,
    head: Head | None = None,
    **options,
) -> list[list[np.ndarray]]:
    """Trajectories of the weights under `transformation`, see `follow`."""
    return follow(transformation(problems, hyper, **options), problems, steps, dtype, head)


def follow(
    tx: optax.GradientTransformation,
    problems: list[Problem],
    steps: int,
    dtype: jnp.dtype = np.float64,
    head: Head | None = None,
) -> list[list[np.ndarray]]:
    """Trajectories of the weights, one list a layer (and one for the head)."""
    params = {
        f"layer{i}": {"lora_a": jnp.asarray(p.u, dtype), "lora_b": jnp.asarray(p.v.T, dtype)}
        for i, p in enumerate(problems)
    }
    if head is not None:
        params["head"] = jnp.asarray(head.start, dtype)
    state, update = tx.init(params), jax.jit(tx.update)
    trajectories: list[list[np.ndarray]] = [[] for _ in problems]
    heads: list[np.ndarray] = []
    for k in range(steps):
        grads = {} if head is None else {"head": jnp.asarray(head.gradients[k], dtype)}
        for i, p in enumerate(problems):
            u, v = factors(params[f"layer{i}"])
            g = p.scale * p.gradient(p.weight(u, v), k)
            grads[f"layer{i}"] = {
                "lora_a": jnp.asarray(g @ v, dtype),
                "lora_b": jnp.asarray(u.T @ g, dtype),
            }
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for i, p in enumerate(problems):
            trajectories[i].append(p.weight(*factors(params[f"layer{i}"])))
        if head is not None:
            heads.append(np.asarray(params["head"], np.float64))
    return trajectories if head is None else [*trajectories, heads]


def factors(layer) -> tuple[np.ndarray, np.ndarray]:
    """The factors ``U`` and ``V`` of a layer in float64."""
    return np.asarray(layer["lora_a"], np.float64), np.asarray(layer["lora_b"], np.float64).T
