"""Matrix factorization at a small size, the costs that docs/methods.md states, and doctests."""

import doctest

import jax
import numpy as np
import optax
import pytest
from optimizers import hasty_compiler as hasty_compiler

from benchmarks import markdown
from benchmarks.accuracy import search, summary
from benchmarks.cost import method_costs
from benchmarks.factorization import exact, figure, measure


def test_matrix_factorization_measures_tables_and_draws(monkeypatch, tmp_path):
    small = {"M": 24, "N": 16, "RANK": 2, "STEPS": 40, "SEEDS": (0, 1)}
    few = ("full fine-tuning", "LoRA", "LoFT", "LoFT, factored", "full, momentum", "full, Muon")
    for name, value in small.items():
        monkeypatch.setattr(measure, name, value)
    for name, value in {"M": 24, "N": 16, "RANK": 2, "STEPS": 4, "WIDTH": 5}.items():
        monkeypatch.setattr(exact, name, value)
    methods = tuple(x for x in measure.METHODS if x.label in few)
    monkeypatch.setattr(measure, "METHODS", methods)
    monkeypatch.setattr(measure, "SWEPT", ("full fine-tuning", "LoFT"))
    monkeypatch.setattr(measure, "SWEEP", (0.1, 0.3))
    grids = {"adam": (0.1, 0.3), "momentum": (0.03,), "muon": (3.0,)}
    monkeypatch.setattr(measure, "GRIDS", grids)

    found = measure.measure()

    assert found["tuned"].keys() == grids.keys()
    assert all(run[:, 0] == pytest.approx(1.0) for run in found["Adam regime"].values())
    lines = measure.table(found).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [x.label for x in methods]
    assert all(x.max() < (1e-9 if "float64" in label else 1e-2) for label, x in found["exact"])
    assert len(measure.verdicts(found)) == 4
    figure.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_verdict_is_the_worst_seed_s():
    full = np.array([[1.0, 1e-14], [1.0, 1e-14]])
    near, small, off = 9e-14, 9e-12, 2e-11
    follows = measure.follows
    assert follows(np.array([[1.0, near], [1.0, small]]), full)
    assert not follows(np.array([[1.0, near], [1.0, off]]), full)
    assert not follows(np.array([[1.0, near], [1.0, np.nan]]), full)


def test_full_muon_is_the_same_on_the_core_of_the_target(monkeypatch):
    monkeypatch.setattr(measure, "RANK", 2)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        target = rng.normal(size=(12, 2)) @ rng.normal(size=(2, 9))  # tall: no factor in Optax
        losses = []
        for x in (target, np.asarray(measure.core_of(target))):
            muon = optax.contrib.muon(0.1, eps=1e-7, nesterov=False)
            w, state, of_run = 0 * x, muon.init(0 * x), []
            for _ in range(6):
                of_run.append(np.sum((w - x) ** 2))
                updates, state = muon.update(w - x, state, w)
                w = w + np.asarray(updates)
            losses.append(of_run)
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-10)


DOCUMENTED = {  # state / (m + n), products in FLOPs / (m + n), at r = 4: docs/methods.md
    "LoRA: optax.adamw": (8, 0),
    "loft_adamw, factored": (2 * 4 + 2, 24 * 16),
    "loft_adamw, diagonal": (3 * 4, 19 * 16),
    "loft_muon": (2 * 4, 29 * 16),
    "loft_sgd": (0, 15 * 16),
    "loft_sgd, momentum": (2 * 4, 19 * 16),
    "lora_plus": (8, 0),
    "scaled_adamw": (8, 4 * 16),
    "scaled_sgd": (0, 4 * 16),
    "lora_fa": (4, 2 * 16),
    "altlora": (8, 8 * 16),
    "altlora_plus": (12, 8 * 16),
    "adalora": (16, 0),
    "lora_rite": (9, 24 * 16),
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_costs_are_those_of_the_programs(name):
    n, r = 4096, 4
    state, products = method_costs.costs(name, n, n, r)
    of_state, of_products = DOCUMENTED[name]
    assert state / (2 * n) == pytest.approx(of_state, rel=2e-3)
    assert 2 * products / (2 * n) == pytest.approx(of_products, rel=2e-2)


def test_documented_costs_of_the_dense_methods():
    n, r, t = 4096, 16, 136
    state, products = method_costs.costs("lora_pro", n, n, r)
    assert state == 2 * n * n
    assert 2 * products == pytest.approx(8 * r * n * n, rel=2e-2)
    state, products = method_costs.costs("loft_adamw, calibrated", n, n, r)
    assert state == (2 * r + t) * 2 * n
    assert 2 * products == pytest.approx(356 * n * n, rel=1e-2)


@pytest.mark.parametrize("module", [markdown, search, summary], ids=lambda x: x.__name__)
def test_examples_in_docstrings(module):
    failed, attempted = doctest.testmod(module)
    assert attempted > 0 == failed
