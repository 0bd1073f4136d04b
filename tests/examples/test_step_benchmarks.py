"""The benchmarks of whole training steps on the tiny model."""

import argparse

import pytest
from optimizers import hasty_compiler as hasty_compiler

from benchmarks.cost import generation, peak_memory, training_step
from examples.common.models import llama_weights


def test_methods_make_their_steps(model_folder):
    chosen = ["LoRA", "calibrated", "factored"]
    rows = training_step.measure(llama_weights.load(str(model_folder)), 2, (2, 8), chosen, 1)
    assert [row["method"] for row in rows] == chosen
    assert all(row["step_ms"][1] > 0 for row in rows)
    state = {row["method"]: row["state_mb"] for row in rows}
    assert state["calibrated"] >= state["factored"] >= state["LoRA"] > 0
    assert len(training_step.table(rows).splitlines()) == 2 + len(chosen)


def test_the_peak_is_that_of_a_process_of_its_own(model_folder):
    row = peak_memory.measure(str(model_folder), "factored", 2, (2, 8), 1)
    low, median, high = row["peak_mb"]
    assert low == median == high > 50
    assert "+0.0%" in peak_memory.table([row])


def test_generation_is_timed_beside_transformers_and_makes_the_same_tokens(model_folder):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    options = argparse.Namespace(model=str(model_folder), batch=[2], prompt=8, new=3, runs=1)
    rows = generation.measure(options)
    assert [row["side"] for row in rows] == ["ours", "transformers"]
    assert all(row["equal_tokens"] == "6 of 6" and row["tokens_per_second"] > 0 for row in rows)
    assert len(generation.table(rows).splitlines()) == 2 + 2
