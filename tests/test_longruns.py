"""The long runs at a tiny size: they learn, resume and make a table."""

import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import hasty_compiler as hasty_compiler

from benchmarks import records
from benchmarks.longruns import data, language, sensing, suite, table
from benchmarks.longruns.low_rank_steps import adamw_of_rank, leading_part
from benchmarks.longruns.methods import METHODS, warmup_cosine


def test_sensing_approaches_its_target_with_renewals(monkeypatch):
    small = {"SIZE": 8, "TARGET_RANK": 4, "RANK": 1, "STEPS": 40, "SEEDS": 1, "RATES": (0.1, 0.2)}
    for name, value in small.items():
        monkeypatch.setattr(sensing, name, value)
    errors = sensing.measure(METHODS["momentum-5-small"])
    assert errors.shape == (2, 1)
    assert errors.min() < 0.9


def test_a_language_run_is_recorded_once(monkeypatch, tmp_path, capsys):
    texts = data.Texts(*(np.arange(size, dtype=np.uint8) % 7 for size in (250, 99, 99)))
    monkeypatch.setattr(language, "python_sources", lambda: texts)
    monkeypatch.setattr(data, "HELD_OUT_BATCHES", 2)
    (tmp_path / "text").write_bytes(bytes(range(100)))
    arguments = f"language --text {tmp_path}/text --cache {tmp_path}/cache.npz --rate 0.1"
    arguments += f" --results {tmp_path}/results --method full momentum-5 --steps 10 --rank 1"
    arguments += " --layers 1 --width 8 --length 8 --batch 2 --pretraining-steps 2"

    def rows() -> list[records.Row]:
        assert main(arguments.split()) == 0
        return records.read(tmp_path / "results")

    found = rows()
    assert [(row["method"], row["rank"]) for row in found] == [("full", None), ("momentum-5", 1)]
    assert all(row["curve"][-1] == [10, row["loss"]] for row in found)
    assert all(0 < row["validation"] < row["curve"][0][1] for row in found)
    assert rows() == found


def row(loss: float | None) -> records.Row:
    """A result in which validation and test loss are the same."""
    return {"loss": loss, "validation": loss, "seconds": 0.01}


def test_the_suite_searches_a_rate_outward_and_then_runs_the_other_seeds():
    cells = suite.cells_of(suite.Part(title="", methods=("full", "loft")))
    losses = {"full": {0.003: 1.0, 0.001: 1.1, 0.01: 0.9, 0.03: None}, "loft": {0.01: 2.0}}
    rows, order = {}, []
    for run in suite.runs(cells, 2, rows):
        order.append((run.method, run.rate, run.seed))
        rows[run] = row(losses[run.method].get(run.rate, 3.0))
    rates = [(0.003, 0), (0.01, 0), (0.001, 0), (0.03, 0)]
    expected = [("full", *rest) for rest in rates]
    expected += [("loft", rate, 0) for rate in (0.01, 0.03, 0.003)]
    assert order == [*expected, ("full", 0.01, 1), ("loft", 0.01, 1)]
    assert list(suite.runs(cells, 2, rows)) == []


def test_the_table_has_the_part_of_the_gap_that_each_method_closes():
    losses = {
        ("full", None, 0.1): (1.0, 1.1, 1.2),
        ("loft", 4, 0.1): (2.0, 2.1, 2.2),
        ("loft", 4, 0.3): (3.0,),
        ("momentum-100", 4, 0.1): (1.2, 1.4, 1.5, 9.0),
        ("lora", 4, 0.1): (2.0, 2.2),
        ("loft-anew-100", 4, 0.1): (None,),
    }
    rows = {
        language.Run(*key, seed): row(loss)
        for key, found in losses.items()
        for seed, loss in enumerate(found)
    }
    lines = [line.split(" | ") for line in table.table(rows, suite.PARTS["renewal"]).splitlines()]
    cells = {line[0].removeprefix("| "): line[1:] for line in lines}
    renewed = cells["LoFT, renewed every 100: momentum"]
    # Of two tests, full fine-tuning's differences are all equal and so have no p.
    assert renewed[:3] == ["4", "0.1", "3.275 ± 3.819"]
    assert renewed[4:5] + renewed[6:7] == ["-0.733", "73%"]
    assert cells["LoFT, factored"][1] == "0.1"
    assert cells["LoRA"][4:7] == ["+0.050", "", "-5%"]
    assert "inf" in cells["LoFT, drawn anew every 100, without its moments"][2]


def test_the_schedule_rises_and_falls():
    rates = warmup_cosine(2.0, 40)(np.arange(41))
    assert list(rates[:3]) == pytest.approx([1.0, 2.0, 2.0])
    assert rates[-1] == pytest.approx(0.0, abs=1e-6)


def test_steps_of_low_rank_are_the_leading_part_of_adamws():
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(2, n, n)))[0] for n in (7, 5))
    x = (left[..., :5] * 8.0 ** -np.arange(5)) @ right.mT
    expected = (left[..., :2] * 8.0 ** -np.arange(2)) @ right[..., :2].mT
    part, vectors = leading_part(jnp.asarray(x), jnp.eye(5)[None, :, :2].repeat(2, 0))
    np.testing.assert_allclose(part, expected, atol=2e-3)
    np.testing.assert_allclose(leading_part(jnp.asarray(x), vectors)[0], expected, atol=1e-5)
    # With feedback, what was cut off follows: after many zero gradients all of it was applied.
    tx = adamw_of_rank(1, feedback=True)(1.0)
    state, total = tx.init({"w": jnp.zeros((7, 5))}), 0.0
    for _ in range(3):
        updates, state = tx.update(
            {"w": jnp.asarray(x[0], jnp.float32)}, state, {"w": jnp.zeros((7, 5))}
        )
        assert np.linalg.matrix_rank(updates["w"], tol=1e-4) == 1
        total = total + updates["w"]
    np.testing.assert_allclose(total + state[1].rest["w"], -3 * np.sign(x[0]), atol=1e-2)


def main(arguments: list[str]) -> int:
    from benchmarks.command_line import main

    return main("longruns", ["language"], arguments)
