"""The long runs at a tiny size: they learn, resume and make tables and figures."""

import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import hasty_compiler as hasty_compiler

from benchmarks import records
from benchmarks.longruns import (
    arithmetic,
    bench,
    figures,
    images,
    language,
    report,
    sensing,
    suite,
    table,
    texts,
)
from benchmarks.longruns.low_rank_steps import adamw_of_rank, leading_part
from benchmarks.longruns.methods import METHODS, renewal_of, warmup_cosine
from benchmarks.longruns.transformer import adapted, new_adapters


def test_sensing_approaches_its_target_with_renewals(monkeypatch):
    small = {"SIZE": 8, "TARGET_RANK": 4, "RANK": 1, "STEPS": 40, "SEEDS": 1, "RATES": (0.1, 0.2)}
    for name, value in small.items():
        monkeypatch.setattr(sensing, name, value)
    errors = sensing.measure(METHODS["momentum-5-small"])
    assert errors.shape == (2, 1)
    assert errors.min() < 0.9


def test_a_run_is_recorded_once(monkeypatch, tmp_path):
    short = texts.Texts(*(np.arange(size, dtype=np.uint8) % 7 for size in (250, 99, 99)))
    monkeypatch.setattr(language, "python_sources", lambda: short)
    monkeypatch.setattr(texts, "HELD_OUT_BATCHES", 2)
    (tmp_path / "text").write_bytes(bytes(range(100)))
    arguments = f"train --text {tmp_path}/text --cache {tmp_path}/cache.npz --rate 0.1"
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


def test_a_vision_run_learns_labels_that_the_images_show(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 200).astype(np.uint8)
    grey = np.broadcast_to(25 * labels[:, None, None], (200, 28, 28)).astype(np.uint8)
    for part in ("train", "t10k"):
        for name, header, data in (("images-idx3", 16, grey), ("labels-idx1", 8, labels)):
            content = gzip.compress(bytes(header) + data.tobytes())
            (tmp_path / f"{part}-{name}-ubyte.gz").write_bytes(content)
    sets = images.fashion_mnist(tmp_path)
    assert [len(x["labels"]) for x in sets] == [180, 20, 200]
    for part in sets:
        assert part["images"].shape[1:] == (32, 32, 1)
        np.testing.assert_array_equal(part["images"][:, 16, 16, 0], 25 * part["labels"])
        assert not part["images"][:, 1].any()
    monkeypatch.setattr(images, "digits", lambda: sets.train)
    arguments = f"suite --task vision --images {tmp_path} --cache {tmp_path}/cache.npz --seeds 1"
    arguments += f" --results {tmp_path}/results --method dora --steps 20 --layers 1"
    arguments += " --width 8 --patch 16 --batch 8 --pretraining-steps 2"
    assert main(arguments.split()) == 0
    found = records.read(tmp_path / "results")
    assert min(row["loss"] for row in found) < 2.2
    for row in found:
        assert (row["method"], row["width"], row["patch"], row["batch"]) == ("dora", 8, 16, 8)
        assert 0 <= row["accuracy"] <= 1


def test_sums_are_right_and_none_is_in_two_parts():
    parts = [
        arithmetic.pairs(x) for x in (arithmetic.TRAIN, arithmetic.VALIDATION, arithmetic.TEST)
    ]
    assert sum(map(len, parts)) == len(np.unique(np.concatenate(parts))) == 10**6
    batches = np.asarray(arithmetic.sums(parts[2], np.random.default_rng(0), 3, 2, 40))
    assert batches.shape == (3, 2, 41)
    lines = bytes(batches[0, 0]).decode().split("\n")
    assert len(lines) == 4
    assert len(lines[3]) == 2
    for line in lines[:3]:
        left, right, total = map(int, line.replace("=", "+").split("+"))
        assert left + right == total
        assert 1000 * left + right in parts[2]


def test_a_sum_is_right_where_all_its_digits_are_predicted(monkeypatch):
    pairs = arithmetic.pairs(arithmetic.TRAIN)
    batch = arithmetic.sums(pairs, np.random.default_rng(0), 1, 2, 30)[0]
    predicted = np.asarray(batch[:, 1:]).copy()
    predicted[:, :7] = 0  # of the operands of the first sums
    predicted[0, 9] ^= 1  # a digit of the first answer; two sums are whole in each of two rows
    logits = jax.nn.one_hot(predicted.reshape(-1), 256)
    monkeypatch.setattr(arithmetic.model, "logits", lambda *args: logits)
    assert float(arithmetic.accuracy(None, None, batch)) == 0.75


def test_adapters_are_scaled_and_doras_have_the_magnitude_of_the_weight():
    rng = np.random.default_rng(0)
    shapes = ((2, 5), (5, 4), (5, 2), (2, 4))
    x, kernel, a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    factors = {"lora_a": a, "lora_b": b}
    scale = METHODS["rslora"].scale(2)
    assert scale == pytest.approx(8 / 2**0.5)
    weight = np.asarray(kernel + scale * a @ b)
    np.testing.assert_allclose(adapted(x, kernel, factors, scale), x @ weight, rtol=1e-4)
    params = {"layers": {"up": {"kernel": kernel[None]}}}
    new = new_adapters(jax.random.key(0), params, 2, METHODS["dora"].magnitude)
    dora = {**jax.tree.map(lambda x: x[0], new["layers"]["up"]), **factors}
    expected = x @ (weight / np.linalg.norm(weight, axis=0) * np.linalg.norm(kernel, axis=0))
    np.testing.assert_allclose(adapted(x, kernel, dora, scale), expected, rtol=1e-4)


def test_a_new_adapter_of_dora_keeps_the_weight_and_its_magnitude():
    keys, method = jax.random.split(jax.random.key(0), 4), METHODS["loft-dora-anew-250"]
    base = {"layers": {"up": {"kernel": jax.random.normal(keys[0], (2, 6, 5))}}}
    draw = lambda key: new_adapters(key, base, 2, method.magnitude)
    adapters = jax.tree.map(lambda x: x + 0.5, draw(keys[1]))
    tx = method.optimizer(lambda count: 0.01)
    merged, new, _ = renewal_of(method, draw, tx)(base, adapters, tx.init(adapters), keys[2])
    x = jax.random.normal(keys[3], (3, 6))
    layer = lambda params, adapters, k: adapted(
        x,
        params["layers"]["up"]["kernel"][k],
        jax.tree.map(lambda leaf: leaf[k], adapters["layers"]["up"]),
        1.0,
    )
    for k in range(2):
        np.testing.assert_allclose(layer(merged, new, k), layer(base, adapters, k), rtol=1e-4)
    assert (new["layers"]["up"]["lora_b"] == 0).all()


def test_a_task_refuses_what_it_does_not_have(tmp_path, capsys):
    for arguments, message in (
        ("suite --task vision --length 9", "has no --length"),
        ("suite --part images", "its parts are renewal, kept"),
        ("train --task cifar10 --method full --rate 1", "needs --images"),
        (
            f"train --task vision --images {tmp_path} --method full --rate 1",
            "dataset-fashion-mnist",
        ),
        (f"train --cache {tmp_path}/x --method full --rate 1", "give a --text"),
    ):
        assert main(arguments.split()) != 0
        assert message in capsys.readouterr().err


def row(loss: float | None) -> records.Row:
    """A result in which validation and test loss are the same."""
    return {"loss": loss, "validation": loss, "seconds": 0.01}


def test_the_page_has_the_tables_of_the_results(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(report.PAGE.read_text())
    assert main(["report", "--page", str(page)]) == 0
    assert page.read_text() == report.PAGE.read_text(), "python -m benchmarks.longruns report"
    page.write_text("<!-- table: language apples -->\n<!-- end -->\n")
    assert main(["report", "--page", str(page)]) != 0
    assert "its parts are renewal, kept" in capsys.readouterr().err


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
        bench.Run(*key, seed): row(loss)
        for key, found in losses.items()
        for seed, loss in enumerate(found)
    }
    lines = [
        line.split(" | ")
        for line in table.table(rows, suite.PARTS["language"]["renewal"]).splitlines()
    ]
    cells = {line[0].removeprefix("| "): line[1:] for line in lines}
    renewed = cells["LoFT, renewed every 100: momentum"]
    # Of two tests, full fine-tuning's differences are all equal and so have no p.
    assert renewed[:3] == ["4", "0.1", "3.275 ± 3.819"]
    assert renewed[4:5] + renewed[6:7] == ["-0.733", "73%"]
    assert cells["LoFT, factored"][1] == "0.1"
    assert cells["LoRA"][4:7] == ["+0.050", "", "-5%"]
    assert "inf" in cells["LoFT, drawn anew every 100, without its moments"][2]


def test_the_figure_has_the_curves_the_intervals_and_the_ranks(tmp_path):
    rows = {}
    for method, rank, loss in (
        ("full", None, 1.0), ("loft", 4, 2.0), ("loft", 16, 1.5), ("loft-anew-100", 4, 1.7),
        ("loft-anew-250", 4, 1.9),
    ):  # fmt: skip
        for seed in range(2):
            curve = [[5, loss + 1], [10, loss + 0.1 * seed]]
            run = bench.Run(method, rank, 0.1, seed)
            rows[run] = row(loss + 0.1 * seed) | {"curve": curve}
    steps, losses = figures.curves(rows, "loft")
    np.testing.assert_allclose(losses, [[3, 2], [3, 2.1]])
    assert list(steps) == [5, 10]
    gaps = np.array(figures.gaps_by_interval(rows, r"loft-anew-(\d+)"))
    np.testing.assert_allclose(gaps, [[100, 30, 0], [250, 10, 0]], atol=1e-9)
    assert figures.rates_by_rank(rows, "loft") == [(4, 0.1), (16, 0.1)]
    panels = [figures.curve_panel(rows, ""), figures.interval_panel(rows), figures.rank_panel(rows)]
    figures.draw([panel for panel in panels if panel is not None], tmp_path / "x.png")
    assert None not in panels
    assert (tmp_path / "x.png").stat().st_size > 1000
    assert (
        figures.interval_panel({}) is figures.rank_panel({}) is figures.curve_panel({}, "") is None
    )


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

    return main("longruns", ["report", "suite", "train"], arguments)
