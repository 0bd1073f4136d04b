"""The accuracy study: its search, its store, its settings, and its page."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks import markdown
from benchmarks.accuracy import config, gradient_init, plan, report, run, store, summary, variants
from benchmarks.accuracy.config import Cell, Runs
from benchmarks.accuracy.search import index_of, rate_at, search
from benchmarks.accuracy.store import Key
from benchmarks.command_line import main
from loft_jax.adapters import LoraRule, add_lora

DOCS = Path(__file__).parents[1] / "docs"


def outcome(loss: float | None, task: str = "wikitext2", seconds: float = 10.0) -> dict:
    """What a run leaves, with that loss on both splits; None for one that diverged."""
    split = None
    if loss is not None:
        split = {"loss": loss, "accuracy": 1 / (1 + loss), "likelihood": 0.5, "examples": 8}
    return {
        "settings": config.read_task(task).settings(),
        "train_losses": [4.0, loss],
        "finite": loss is not None,
        "validation": split,
        "test": split,
        "seconds": seconds,
        "step_seconds": 0.5,
        "trained_parameters": 1000,
        "optimizer_state_bytes": 8000,
    }


def bowl(best: float, rate: float, seed: int) -> float:
    """A loss that is lowest at a learning rate."""
    return 3 + 0.1 * math.log10(rate / best) ** 2 + 0.01 * seed


def test_indices_and_rates_are_inverse():
    for index in range(-14, 3):
        assert index_of(rate_at(index)) == index


@pytest.mark.parametrize(
    ("best", "tried", "at_edge"),
    [
        (0, [0, 1, -1, 2, -2], False),  # two tries on each side
        (1, [0, 1, -1, 2, 3], False),
        (-1, [0, 1, -1, -2, -3], False),
        (5, [0, 1, -1, 2, 3], True),  # moves to the better side until the budget is spent
        (-5, [0, 1, -1, -2, -3], True),
    ],
)
def test_search_moves_to_the_better_side_within_its_budget(best, tried, at_edge):
    losses = {place: abs(place - best) - 0.01 * place for place in range(-9, 9)}
    found = search(losses, 0, 5)
    assert sorted(found.tried[1:3]) == [-1, 1]
    assert list(found.tried) == tried or best == 0
    assert sorted(found.tried) == sorted(tried)
    assert found.next_index is None
    assert found.at_edge == at_edge
    # The next index does not depend on losses that the search has not reached.
    known = {}
    for place in found.tried:
        assert search(known, 0, 5).next_index == place
        assert search({**known, 7: -9.0}, 0, 5).next_index == place
        known[place] = losses[place]


def test_search_goes_down_from_divergence():
    losses = {place: math.inf if place > -3 else 1.0 for place in range(-9, 9)}
    assert search(losses, 0, 5).tried == (0, 1, -1, -2, -3)
    assert search(losses, 0, 5).best == -3


def test_search_stops_when_two_on_each_side_are_tried():
    losses = {place: float(place**2) for place in range(-9, 9)}
    assert len(search(losses, 0, 9).tried) == 5


def test_all_files_of_settings_are_understood():
    assert set(config.task_names()) == {"wikitext2", "cifar10", "arc_easy"}
    for name in config.experiment_names():
        experiment = config.read_experiment(name)
        assert {cell.method for _, cell in plan.cells(experiment)} >= set(experiment.against)
        for runs, cell in plan.cells(experiment):
            task = config.read_task(cell.task)
            assert plan.plan({}, cell, runs, task).now
            assert task.kind != "text" or task.validation
            assert all(rate == rate_at(index_of(rate)) for rate in runs.rates or ())


def test_runs_are_made_once_and_the_search_is_resumed(tmp_path, capsys):
    calls = []

    def open_cell(task, cell):
        def make(rate, seed):
            calls.append((cell.method, rate, seed))
            if len(calls) == 4:
                raise KeyboardInterrupt
            return outcome(None if rate > 0.01 else bowl(1e-2, rate, seed))

        return make

    runs = Runs(task="wikitext2", methods=("lora",), ranks=(4,), seeds=(0, 1, 2))
    chosen = [(runs, cell) for cell in runs.cells()]
    with pytest.raises(KeyboardInterrupt):
        run.make_missing(tmp_path, chosen, open_cell)
    assert len((tmp_path / "wikitext2.jsonl").read_text().splitlines()) == 3
    assert run.make_missing(tmp_path, chosen, open_cell) == 4
    assert run.make_missing(tmp_path, chosen, open_cell) == 0
    made = [call for number, call in enumerate(calls) if number != 3]
    assert len(set(made)) == len(made) == 7
    assert made[5:] == [("lora", 0.01, 1), ("lora", 0.01, 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["wikitext2.jsonl"]
    assert len((tmp_path / "wikitext2.jsonl").read_text().splitlines()) == 7
    results = store.read(tmp_path, config.read_task("wikitext2"))
    assert results[Key(chosen[0][1], 0.03, 0)]["test"] is None
    assert run.listed(results, chosen) == ["0.0 h in all"]
    assert "diverged" in capsys.readouterr().out


def test_no_run_is_begun_that_would_pass_the_limit(tmp_path):
    now = [0.0]

    def open_cell(task, cell):
        def make(rate, seed):
            now[0] += 50
            return outcome(bowl(1e-2, rate, seed), seconds=50.0)

        return make

    runs = Runs(task="wikitext2", methods=("lora",), ranks=(4,), seeds=(0,))
    chosen = [(runs, cell) for cell in runs.cells()]
    made = run.make_missing(tmp_path, chosen, open_cell, limit=170, clock=lambda: now[0])
    assert made == 3
    assert run.make_missing(tmp_path, chosen, open_cell, most=1) == 1
    (line, _) = run.listed(store.read(tmp_path), chosen)
    assert line.startswith("wikitext2 lora r=4: 1 runs, 1 min")


def test_results_of_other_settings_are_refused(tmp_path):
    key = Key(Cell("wikitext2", "lora", 4), 1e-2, 0)
    other = outcome(3.0)
    other["settings"] = other["settings"] | {"steps": 21}
    store.append(tmp_path, key, other)
    with pytest.raises(run.UserError, match="other settings"):
        store.read(tmp_path, config.read_task("wikitext2"))


def test_a_line_cut_short_is_ignored_and_then_overwritten(tmp_path):
    keys = [Key(Cell("wikitext2", "lora", 4), 1e-2, seed) for seed in range(3)]
    for key in keys[:2]:
        store.append(tmp_path, key, outcome(3.0))
    path = tmp_path / "wikitext2.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # the writer was killed
    assert list(store.read(tmp_path)) == keys[:1]
    store.append(tmp_path, keys[2], outcome(3.0))
    assert list(store.read(tmp_path)) == [keys[0], keys[2]]


def test_a_line_that_is_not_a_result_is_named(tmp_path):
    (tmp_path / "wikitext2.jsonl").write_text('{"task": "wikitext2"}\n')
    with pytest.raises(run.UserError, match="line 1, is not a result"):
        store.read(tmp_path)


def write_study(root: Path) -> None:
    """Results of the experiments, complete for some methods, one of them diverged everywhere."""
    best = {"lora": 1e-2, "loft": 1e-3, "full": 3e-4}

    def open_cell(task, cell):
        def make(rate, seed):
            loss = 3.5 if rate is None else bowl(best.get(cell.method, 1e-3), rate, seed)
            gone = cell.method == "simple" or (rate or 0) > 0.03
            return outcome(None if gone else loss + 0.001 * seed * len(cell.method), cell.task)

        return make

    for name in config.experiment_names():
        methods = ("full", "lora", "loft", "simple", "zero-shot")
        pairs = plan.cells(config.read_experiment(name), methods)
        run.make_missing(root, pairs, open_cell)


def test_report_of_a_partial_study(tmp_path, monkeypatch):
    names = ["language", "transfer", "vision"]
    monkeypatch.setattr(config, "experiment_names", lambda: names)
    write_study(tmp_path / "results")
    (tmp_path / "images").mkdir()
    page = tmp_path / "page.md"
    text = "Before.\n\n<!-- table: language wikitext2 -->\nold\n<!-- end -->\n\nAfter.\n"
    page.write_text(text)
    options = [f"--{x}={tmp_path / x}" for x in ("results", "images")]
    assert main("accuracy", ("run", "report"), ["report", *options, f"--page={page}"]) == 0
    once = page.read_text()
    assert once.startswith("Before.")
    assert once.endswith("After.\n")
    assert "old" not in once
    lines = [line for line in once.splitlines() if line.startswith("|")]
    of = lambda label: next(line for line in lines if line.startswith(f"| {label} |"))
    assert len(lines) == 2 + 7  # the head; lora at three ranks, the others at one or none
    assert "| 3.5000 |" in of("before training")
    assert "| 0.0003 |" in of("full fine-tuning")
    assert "diverged" in of("LoFT (simple)")
    assert "| 3 | 0.01 |" in of("LoRA")
    assert "34.80" in of("LoRA") or "34.80" in once
    assert report.fill(once, report.make_parts(report.read_all(tmp_path / "results"))) == once
    drawn = {path.name for path in (tmp_path / "images").iterdir()}
    assert drawn == {"accuracy_transfer.png", "accuracy_vision.png"}


def test_figures_of_a_single_run(tmp_path):
    key = Key(Cell("wikitext2", "lora", 4), 1e-2, 0)
    store.append(tmp_path, key, outcome(3.0))
    drawn = report.draw_all(report.read_all(tmp_path), tmp_path)
    expected = ["ranks", "transfer"]
    assert [path.name for path in drawn] == [f"accuracy_{name}.png" for name in expected]


def test_report_of_nothing(tmp_path):
    parts = report.make_parts(report.read_all(tmp_path))
    assert set(parts.values()) == {"No results yet."}


def test_paired_differences_and_their_p():
    def row(method: str, *losses: float | None) -> summary.Row:
        by_seed = {seed: outcome(loss) for seed, loss in enumerate(losses)}
        cell = Cell("wikitext2", method, 4)
        return summary.Row(cell=cell, rate=1.0, remark="", by_seed=by_seed)

    ours, base = row("loft", 1.0, 2.0, 3.5), row("lora", 1.5, 2.0, 4.5)
    mean, p = summary.paired(ours, base, "loss") or (0, 0)
    assert mean == pytest.approx(-0.5)
    assert p == pytest.approx(0.22540333)  # t = -sqrt(3) with 2 degrees of freedom
    assert summary.paired(ours, row("lora", 1.5, None, 4.5), "loss") == (-0.75, None)
    assert summary.paired(ours, row("lora", 2.0, 3.0, 4.5), "loss") == (-1.0, None)
    assert summary.paired(base, base, "loss") is None


def test_the_page_has_the_tables_of_the_results():
    page = (DOCS / "accuracy.md").read_text()
    parts = report.make_parts(report.read_all(config.RESULTS))
    assert report.fill(page, parts) == page, "python -m benchmarks.accuracy report"
    marks = {match[2] for match in markdown.MARKED.finditer(page)}
    # Where a figure's experiment has its own grid, the table by rate stands for that by method.
    assert parts.keys() - marks == {"table: transfer wikitext2", "table: transfer cifar10"}
    for name in marks:
        if name.startswith("figure: ") and "![" in parts[name]:
            assert (DOCS / f"images/accuracy_{name.split()[1]}.png").exists()


def test_committed_results_are_complete_and_each_run_is_there_once():
    paths = sorted(config.RESULTS.iterdir())
    assert [path.name for path in paths] == [f"{name}.jsonl" for name in config.task_names()]
    records = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    assert len(store.read(config.RESULTS)) == len(records) > 400
    for path in paths:
        assert len(store.read(config.RESULTS, config.read_task(path.stem))) > 0
    for record in records:
        assert {"commit", "machine", "jax", "seconds", "peak_memory_bytes"} <= record.keys()


class Tiny(nnx.Module):
    """Two stacked layers, and one apart."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.vmap(lambda key: nnx.Linear(12, 12, rngs=nnx.Rngs(key)))(
            jax.random.split(rngs.params(), 2)
        )
        self.last = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        graphdef, weights = nnx.split(self.layers)
        step = lambda x, w: (jnp.tanh(nnx.merge(graphdef, w)(x)), None)
        return self.last(jax.lax.scan(step, x, weights)[0])


def test_lora_ga_starts_from_the_same_function(monkeypatch):
    monkeypatch.setattr(gradient_init, "ITERATIONS", 1)  # to compile less
    model = Tiny(nnx.Rngs(0))
    rule = LoraRule(path="layers", rank=2, alpha=2, rslora=True, batch=(0,))
    adapted = add_lora(model, rule, rngs=nnx.Rngs(1))
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(5, 12)), jnp.float32)
    loss = lambda model, x: jnp.square(model(x) - 1).mean(axis=-1)
    kernel = model.layers.kernel[...]
    started = gradient_init.lora_ga(adapted, loss, batch, rule)
    np.testing.assert_allclose(started(batch), model(batch), atol=1e-5)
    assert np.abs(started.layers.lora_b[...]).min(axis=(1, 2)).max() > 0
    assert np.abs(started.layers.base.kernel[...] - kernel).max() > 0.1
    np.testing.assert_array_equal(adapted.layers.base.kernel[...], kernel)
    assert not adapted.layers.lora_b[...].any()


PARAMS = {
    "layers": {"lora_a": jnp.ones((6, 2)) + jnp.eye(6, 2), "lora_b": jnp.ones((2, 5))},
    "classifier": {"kernel": jnp.zeros((5, 3))},
}


def optimizer_of(name: str) -> tuple[LoraRule, optax.GradientTransformation]:
    """A variant's rule and optimizer, as for images: there is a head, with the rate 0.1."""
    variant = variants.VARIANTS[name]
    plain = lambda rank, alpha: LoraRule(path="layers", rank=rank, alpha=alpha)
    rule = variants.rule_of(variant, plain, 2)
    schedule = lambda step: 0.1
    return rule, variants.make_optimizer(variant, 0.01, rule, 1.0, "classifier", schedule)


@pytest.mark.parametrize("name", sorted(variants.VARIANTS))
def test_every_variant_has_an_optimizer(name):
    rule, tx = optimizer_of(name)
    scales = {"lora-2r": 2, "rslora": 2**0.5, "lora-ga": 2**0.5}
    assert rule.scale == pytest.approx(scales.get(name, 1))
    params = PARAMS
    if not variants.VARIANTS[name].ranked:
        params = {"classifier": PARAMS["classifier"]}
    updates, _ = jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_the_head_has_its_own_learning_rate():
    _, tx = optimizer_of("lora")
    gradients = jax.tree.map(lambda x: jnp.full_like(x, 0.01), PARAMS)
    updates, _ = tx.update(gradients, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["classifier"]["kernel"], -0.1, rtol=1e-3)
    np.testing.assert_allclose(updates["layers"]["lora_b"], -0.01, rtol=1e-3)
