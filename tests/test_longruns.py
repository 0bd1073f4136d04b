"""The long runs at a tiny size: they learn, resume and make a table."""

import numpy as np
import pytest
from optimizers import hasty_compiler as hasty_compiler

from benchmarks import records
from benchmarks.longruns import language, sensing, table
from benchmarks.longruns.methods import METHODS, warmup_cosine


def test_sensing_approaches_its_target_with_renewals(monkeypatch):
    small = {"SIZE": 8, "TARGET_RANK": 4, "RANK": 1, "STEPS": 40, "SEEDS": 1, "RATES": (0.1, 0.2)}
    for name, value in small.items():
        monkeypatch.setattr(sensing, name, value)
    errors = sensing.measure(METHODS["momentum-5"])
    assert errors.shape == (2, 1)
    assert errors.min() < 0.9


def test_a_language_run_is_recorded_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(language, "python_sources", lambda: (np.arange(999) % 7, np.arange(99) % 7))
    (tmp_path / "text").write_bytes(bytes(range(100)))
    arguments = f"language --text {tmp_path}/text --cache {tmp_path}/cache.npz --rate 0.1"
    arguments += f" --results {tmp_path}/results --method full momentum-5 --steps 12 --rank 1"
    arguments += " --layers 1 --width 8 --length 8 --batch 2 --pretraining-steps 2"

    def rows() -> list[records.Row]:
        assert main(arguments.split()) == 0
        return records.read(tmp_path / "results")

    monkeypatch.setattr(language, "TEST_BATCHES", 2)
    found = rows()
    assert [row["method"] for row in found] == ["full", "momentum-5"]
    assert all(row["curve"][-1] == [12, row["loss"]] for row in found)
    assert rows() == found


def test_the_table_has_the_part_of_the_gap_that_each_method_closes():
    row = lambda method, rate, seed, loss: {
        "method": method, "rate": rate, "seed": seed, "loss": loss, "seconds": 0.01
    }  # fmt: skip
    rows = [row("full", 0.1, 0, 1.0), row("loft", 0.1, 0, 2.0), row("loft", 0.2, 0, 3.0)]
    rows += [row("momentum-25", 0.1, seed, loss) for seed, loss in ((0, 1.2), (1, 1.4))]
    lines = [line.split(" | ") for line in table.table(rows).splitlines()]
    cells = next(cells for cells in lines if "every 25" in cells[0])
    assert cells[1:4] == ["1.300 ± 0.141", "0.1", "70%"]


def test_the_schedule_rises_and_falls():
    rates = warmup_cosine(2.0, 40)(np.arange(41))
    assert list(rates[:3]) == pytest.approx([1.0, 2.0, 2.0])
    assert rates[-1] == pytest.approx(0.0, abs=1e-6)


def main(arguments: list[str]) -> int:
    from benchmarks.command_line import main

    return main("longruns", ["language", "sensing", "table"], arguments)
