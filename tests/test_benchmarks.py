"""The benchmarks run, and what the documentation says of costs is what the programs do."""

import jax
import matrix_factorization
import matrix_factorization_exact
import matrix_factorization_figure
import method_costs
import numpy as np
import optax
import pytest


def test_matrix_factorization_measures_tables_and_draws(monkeypatch, tmp_path):
    small = {"M": 24, "N": 16, "RANK": 2, "STEPS": 40, "SEEDS": (0, 1)}
    few = ("full fine-tuning", "LoRA", "LoFT", "LoFT, factored", "full, momentum", "full, Muon")
    for name, value in small.items():
        monkeypatch.setattr(matrix_factorization, name, value)
    for name, value in {"M": 24, "N": 16, "RANK": 2, "STEPS": 4, "SIDE": 5}.items():
        monkeypatch.setattr(matrix_factorization_exact, name, value)
    methods = tuple(x for x in matrix_factorization.METHODS if x.label in few)
    monkeypatch.setattr(matrix_factorization, "METHODS", methods)
    monkeypatch.setattr(matrix_factorization, "SWEPT", ("full fine-tuning", "LoFT"))
    monkeypatch.setattr(matrix_factorization, "SWEEP", (0.1, 0.3))
    grids = {"adam": (0.1, 0.3), "momentum": (0.03,), "muon": (3.0,)}
    monkeypatch.setattr(matrix_factorization, "GRIDS", grids)
    monkeypatch.setattr(matrix_factorization_figure, "SWEPT", ("full fine-tuning", "LoFT"))

    found = matrix_factorization.measure()

    assert found["tuned"].keys() == grids.keys()
    assert all(run[:, 0] == pytest.approx(1.0) for run in found["Adam regime"].values())
    lines = matrix_factorization.table(found).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [x.label for x in methods]
    assert all(x.max() < (1e-9 if "float64" in label else 1e-2) for label, x in found["exact"])
    assert len(matrix_factorization.verdicts(found)) == 4
    matrix_factorization_figure.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_verdict_is_the_worst_seed_s():
    full = np.array([[1.0, 1e-14], [1.0, 1e-14]])
    near, small, off = 9e-14, 9e-12, 2e-11
    follows = matrix_factorization.follows
    assert follows(np.array([[1.0, near], [1.0, small]]), full)
    assert not follows(np.array([[1.0, near], [1.0, off]]), full)
    assert not follows(np.array([[1.0, near], [1.0, np.nan]]), full)


def test_full_muon_is_the_same_on_the_core_of_the_target(monkeypatch):
    monkeypatch.setattr(matrix_factorization, "RANK", 2)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        target = rng.normal(size=(12, 2)) @ rng.normal(size=(2, 9))  # tall: no factor in Optax
        losses = []
        for x in (target, np.asarray(matrix_factorization.core_of(target))):
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
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_costs_are_those_of_the_programs(name):
    n, r = 4096, 4
    make = method_costs.OPTIMIZERS[name]
    state, products = method_costs.costs(make(1e-3), n, n, r, values=name == "adalora")
    of_state, of_products = DOCUMENTED[name]
    assert state / (2 * n) == pytest.approx(of_state, rel=2e-3)
    assert 2 * products / (2 * n) == pytest.approx(of_products, rel=2e-2)


def test_documented_costs_of_the_dense_methods():
    n, r, t = 4096, 16, 136
    state, products = method_costs.costs(method_costs.OPTIMIZERS["lora_pro"](1e-3), n, n, r)
    assert state == 2 * n * n
    assert 2 * products == pytest.approx(8 * r * n * n, rel=2e-2)
    make = method_costs.OPTIMIZERS["loft_adamw, calibrated"]
    state, products = method_costs.costs(make(1e-3), n, n, r)
    assert state == (2 * r + t) * 2 * n
    assert 2 * products == pytest.approx(356 * n * n, rel=1e-2)
