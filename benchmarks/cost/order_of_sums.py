"""Measures how the order of sums changes a step of the calibrated second moment in float32.

    python -m benchmarks.cost order-of-sums

Devices of a mesh sum in another order than a single one. The rows of a factor get one gradient or
several, random ones, in a fixed basis, and the direction of the step is computed with the
coordinates of the basis in ten random orders. The table has the largest difference from the given
order, relative to the whole direction and to that of a row, and the error against float64. "before"
takes every entry from the cross terms, also in rows that saw one gradient.
"""

import argparse
import contextlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import markdown
from benchmarks.command_line import add_results
from benchmarks.records import Row, append
from loft_jax.algorithm import calibrated
from loft_jax.algorithm.adam import adam_scalars, first_moment_estimate
from loft_jax.algorithm.basis import Basis
from loft_jax.algorithm.cross_terms import packed_outer
from loft_jax.algorithm.sharded_dim import UNSHARDED

M, N, ORDERS = 256, 192, 10
B1, B2, EPS = 0.9, 0.999, 1e-8


def direction(
    q: np.ndarray, gradients: np.ndarray, count: int, dtype: jax.typing.DTypeLike, order: np.ndarray
) -> np.ndarray:
    """The direction at step ``count`` after these last gradients, with permuted coordinates."""
    rank = q.shape[1]
    basis = Basis(jnp.asarray(q[:, order], dtype), jnp.eye(rank, dtype=dtype))
    mu = jnp.zeros((gradients.shape[1], rank), dtype)
    nu = jnp.zeros((gradients.shape[1], rank * (rank + 1) // 2), dtype)
    for h in gradients[..., order]:
        h = jnp.asarray(h, dtype)
        mu, nu = B1 * mu + (1 - B1) * h, B2 * nu + (1 - B2) * packed_outer(h)
    scalars = adam_scalars(jnp.array(count), B1, B2, EPS, dtype)
    m_hat = first_moment_estimate(mu, mu, scalars)
    found = calibrated.Calibrated().direction(m_hat, nu, basis, scalars, UNSHARDED, 1)
    return np.asarray(found, np.float64)[:, np.argsort(order)]


@contextlib.contextmanager
def cross_terms_alone() -> Iterator[None]:
    """Takes every entry from the cross terms."""
    own = calibrated.separate_rank_one
    calibrated.separate_rank_one = lambda nu, m_hat, scalars: (nu, jnp.zeros_like(nu[:, :1]))
    try:
        yield
    finally:
        calibrated.separate_rank_one = own


def measure(rank: int, gradients: int, count: int) -> list[Row]:
    """The differences before and after."""
    draw = np.random.default_rng(0)
    q = np.linalg.qr(draw.normal(size=(N, rank)))[0]
    drawn = draw.normal(size=(gradients, M, rank))
    plain = np.arange(rank)
    orders = [draw.permutation(rank) for _ in range(ORDERS)]
    with jax.enable_x64(True):
        exact = direction(q, drawn, count, jnp.float64, plain)
    rows = []
    for name in ("before", "now"):
        with cross_terms_alone() if name == "before" else contextlib.nullcontext():
            given = direction(q, drawn, count, jnp.float32, plain)
            others = [direction(q, drawn, count, jnp.float32, order) for order in orders]
        of_rows = [np.linalg.norm(x - given, axis=1) for x in others]
        rows.append(
            {
                "rank": rank,
                "gradients": gradients,
                "step": count,
                "rows": name,
                "whole": max(map(np.linalg.norm, of_rows)) / np.linalg.norm(exact),
                "row": float(np.max(of_rows / np.linalg.norm(exact, axis=1))),
                "error": np.linalg.norm(given - exact) / np.linalg.norm(exact),
            }
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    heads = ["rank", "gradients", "step", "rows", "whole", "row", "error"]
    show = lambda x: f"{x:.1e}" if isinstance(x, float) else x
    return markdown.table(heads, [[show(row[head]) for head in heads] for row in rows])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16])
    add_results(parser)


def run(options: argparse.Namespace) -> None:
    cases = ((1, 1), (1, 2), (1, 10), (2, 2), (3, 3), (20, 20))
    rows = [row for rank in options.ranks for case in cases for row in measure(rank, *case)]
    append(options.results, rows)
    print(table(rows))
