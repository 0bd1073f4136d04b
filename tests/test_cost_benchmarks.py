"""The benchmarks of cost: the PyTorch baseline, the floors, and all measurements at small size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import hasty_compiler as hasty_compiler

from benchmarks.cost import (
    bfloat16_training,
    compile_time,
    factor_condition,
    floor,
    growth,
    low_precision,
    method_costs,
    optimizer_step,
    precision,
    timing,
    tree_size,
)
from benchmarks.cost.pair_sets import PairSet, adapters, like
from loft_jax import loft_adamw

TINY = PairSet(2, {"q": (12, 9), "down": (7, 12)})
STACKED_TINY = PairSet(8, {"q": (2048, 1024)})


def test_the_equations_typed_in_pytorch_are_loft(x64):
    """An independent implementation, float64: ten steps, with alternating factors."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from benchmarks.cost import torch_loft

    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), adapters(TINY, 3))
    grads = like(params)
    plain = torch_loft.TorchLoft(torch_loft.tall_pairs(params), 1e-2, weight_decay=0.1)
    tx = loft_adamw(1e-2, weight_decay=0.1, balance=False)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(10):
        plain.step(torch_loft.tall_pairs(grads))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for pair, expected in zip(torch_loft.tall_pairs(params), plain.pairs, strict=True):
        for got, factor in zip(pair, expected, strict=True):
            np.testing.assert_allclose(got.numpy(), factor.numpy(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [4, 16, 32])
def test_the_floor_of_the_update_is_what_its_program_multiplies(rank):
    pair_set = PairSet(1, {"q": (2048, 2048)})
    _, multiplied = method_costs.costs("loft_adamw, calibrated", 2048, 2048, rank)
    expected = sum(part.flops for part in floor.parts(pair_set, rank)) / 2
    # The floor also counts 3 t squares per row, which are not matrix products.
    assert multiplied == pytest.approx(expected, rel=1e-3)


def test_pair_sets_are_counted():
    leaves = jax.tree.leaves(adapters(TINY, 1))
    assert len(leaves) == 2 * TINY.pairs == 8
    assert sum(x.size for x in leaves) == TINY.rows
    assert TINY.entries == 2 * (12 * 9 + 7 * 12)


def test_every_optimizer_and_layout_is_measured(monkeypatch):
    monkeypatch.setitem(optimizer_step.PAIR_SETS, "tiny", PairSet(2, {"q": (12, 9)}))
    everything = [*optimizer_step.OPTIMIZERS, optimizer_step.TORCH]
    rows = [
        row
        for stacked in (False, True)
        for row in optimizer_step.measure("tiny", 2, 1, everything, stacked)
    ]
    assert {row["optimizer"] for row in rows} >= set(optimizer_step.OPTIMIZERS)
    assert {row["pairs"] for row in rows} == {"tiny", "tiny, stacked"}
    assert all(row["step_ms"][1] > 0 for row in rows)
    assert len(optimizer_step.table(rows).splitlines()) == 2 + len(rows)


def test_runs_alternate_and_the_first_do_not_count():
    order = []
    steps = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = timing.in_alternation(steps, runs=2, warmup=1)
    assert "".join(order) == "abbaab"
    assert {name: len(x) for name, x in times.items()} == {"a": 2, "b": 2}


def test_emulated_digits_are_those_of_the_formats():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 40)), jnp.float32)
    assert (precision.rounded(x, 8) == x.astype(jnp.bfloat16).astype(jnp.float32)).all()
    assert (precision.rounded(x, 24 - 1) != x).any()
    exact = np.asarray(x, np.float64) @ np.asarray(x, np.float64)
    errors = [np.abs(product(x, x) - exact).max() for product in precision.PRODUCTS.values()]
    in_float32, bfloat16, tf32, bfloat16_x3, _ = errors
    assert in_float32 < bfloat16_x3 < tf32 < bfloat16


def test_growth_is_measured_along_every_axis_and_its_exponent_is_the_slope():
    for axis, values in growth.GROWTH.items():
        if axis != "devices":
            pair_set, rank = growth.one_size(axis, values[1])
            pairs, width = pair_set.pairs, pair_set.shapes["q"][0]
            assert {"rank": rank, "size": width, "pairs": pairs}[axis] == values[1]
    rows = growth.measure("rank", 2, 1)
    assert [row["optimizer"] for row in rows] == list(growth.CHOSEN)
    assert len(growth.table(rows).splitlines()) == 2 + len(rows)
    squares = [{"value": x, "state_mb": 3.0 * x * x} for x in (1, 2, 8)]
    assert growth.exponent(squares, "state_mb") == pytest.approx(2)


def test_trees_have_so_many_pairs_of_one_or_of_distinct_shapes():
    shapes = lambda tree: {x["lora_a"].shape + x["lora_b"].shape for x in tree.values()}
    trees = [tree_size.params_of(tree, 30) for tree in ("distinct", "layers")]
    assert [len(shapes(tree)) for tree in trees] == [30, 5]
    only = ("optax.adamw",)
    rows = [row for pairs in (1, 2) for row in tree_size.measure("distinct", pairs, only)]
    assert [row["leaves"] for row in rows] == [2, 4]
    assert len(tree_size.table(rows).splitlines()) == 3


def test_state_of_one_device_is_its_share():
    one, four = (growth.on_devices("factored", count, STACKED_TINY) for count in (1, 4))
    assert four["state_mb"] == pytest.approx(one["state_mb"] / 4, rel=0.02)


def test_compile_time_of_separate_layers():
    """Stacked layers are compiled by tests/test_scaling.py."""
    (row,) = compile_time.measure("cpu", "tiny", False, 2, 1, ("calibrated",))
    assert row["instructions"] > 1000
    assert row["trace_s"] > 0
    assert row["compile_s"] > 0


def test_training_in_bfloat16_is_resumed_and_compared_by_seed():
    cells = [bfloat16_training.Cell(1, 16, 4, dtype) for dtype in ("float32", "bfloat16")]
    assert [len(cell.arms()) for cell in cells] == [2, 4]
    assert len(bfloat16_training.Cell(2, 32, 4, "bfloat16").arms()) == 2

    def row(cell, final, seed=0, balance=True):
        arm = {"second_moment": "factored", "balance": balance, "seed": seed}
        return {**cell._asdict(), **arm, "final": final, "largest": 2.0}

    rows = [row(cells[0], 3.5), row(cells[0], 3.6, seed=1)]
    assert bfloat16_training.missing(cells, rows) == cells[1:]
    rows += [row(cells[1], 3.51), row(cells[1], 3.58, seed=1)]
    rows.append(row(cells[1], None, balance=False))
    lines = bfloat16_training.table(rows).splitlines()[2:]
    assert lines == [
        "| 1 x 16 | factored | 4 | float32 | 3.5500 |  | 2 |",
        "| 1 x 16 | factored | 4 | bfloat16 | 3.5450 | +0.0100, -0.0200 | 2 |",
        "| 1 x 16 | factored | 4 | bfloat16, balance=False | NaN | NaN | 2 |",
    ]


def test_problems_in_low_precision_are_counted_by_their_excess():
    losses = lambda *final: np.array([[[2.0, x] for x in final]])
    exact = low_precision.Descents(losses(1.0, 1e-9, 0.1, 0.2), np.ones((1, 4)))
    low = low_precision.Descents(losses(1.04, 1e-6, 0.2, np.inf), np.ones((1, 4)))
    rows = low_precision.row_of("sgd", 4, "bfloat16", [8], low, exact)
    counted = {name: rows[0][name] for name in ("problems", "within", "rounded", "excess")}
    assert counted == {"problems": 4, "within": 1, "rounded": 1, "excess": np.inf}
    (line,) = low_precision.summary(rows).splitlines()[2:]
    assert line == "| sgd | bfloat16 | 4 | 1 | 1 | 2 | inf | inf | 1 |"


def test_the_condition_of_factors_is_measured():
    row = factor_condition.measure("lora", True, steps=3)
    assert row["condition"] > 1
    assert "| lora |" in factor_condition.table([row])
