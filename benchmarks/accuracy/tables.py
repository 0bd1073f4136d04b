"""The tables of docs/accuracy.md."""

import math

from benchmarks import markdown
from benchmarks.accuracy.config import Experiment, Runs, Task
from benchmarks.accuracy.plan import Results
from benchmarks.accuracy.store import Key
from benchmarks.accuracy.summary import Row, base_of, mean_and_error, paired, rows
from benchmarks.accuracy.variants import VARIANTS

NONE = "—"
COLUMNS = {
    "loss": {"loss": "test loss"},
    "accuracy": {"accuracy": "test accuracy, %", "loss": "test loss"},
    "likelihood": {
        "likelihood": "likelihood of the right answer",
        "accuracy": "test accuracy, %",
        "loss": "test loss",
    },
}
"""The metrics to show, by the metric of the task, which comes first."""
SHORT = {"lora": "LoRA", "full": "full", "loft": "LoFT", "lora-nf4": "QLoRA"}
"""The names of methods in heads of columns."""


def best_rates(results: Results, experiment: Experiment, task: Task) -> str:
    """A row for each method and rank, at its best learning rate."""
    found = rows(results, experiment, task)
    if not found:
        return "No results yet."
    metrics = COLUMNS[task.measure]
    perplexity = task.kind == "text"
    heads = [
        "method",
        "rank",
        *metrics.values(),
        *(["perplexity"] if perplexity else []),
        *(f"minus {SHORT.get(base, base)}'s" for base in experiment.against),
        "seeds",
        "learning rate",
        "trained, M",
        "state, MB",
        *([experiment.paper_column] if experiment.paper_column else []),
    ]
    lines = []
    for row in found:
        key = (row.cell.method, row.cell.rank)
        lines.append(
            [
                row.label,
                str(row.cell.rank or NONE),
                *(with_error(row, metric) for metric in metrics),
                *([_perplexity(row)] if perplexity else []),
                *(
                    difference(row, base_of(found, row, x), task.measure)
                    for x in experiment.against
                ),
                str(len(row.by_seed)),
                rate(row),
                number(row.median("trained_parameters"), 2, 1e-6),
                number(row.median("optimizer_state_bytes"), 1, 1e-6),
                *([experiment.paper.get(key, NONE)] if experiment.paper_column else []),
            ]
        )
    return markdown.table(heads, lines)


def by_rate(results: Results, experiment: Experiment, task: Task) -> str:
    """A row for each method and a column for each learning rate, with the first seed."""
    lines, rates = [], []
    for runs in experiment.runs:
        if runs.task == task.name and runs.rates is not None:
            rates = list(runs.rates)
            lines += _rate_lines(results, runs, task.measure)
    if not lines:
        return "No results yet."
    return markdown.table(["method", *(f"{x:g}" for x in rates)], lines)


def _rate_lines(results: Results, runs: Runs, measure: str) -> list[list[str]]:
    lines = []
    for cell in runs.cells():
        cells = []
        for rate in runs.rates or ():
            record = results.get(Key(cell, rate, runs.seeds[0]))
            test = record["test"] if record else None
            cells.append(NONE if record is None else shown(test[measure], measure) if test else "∞")
        if set(cells) != {NONE}:
            lines.append([VARIANTS[cell.method].label, *cells])
    return lines


def shown(value: float, metric: str, sign: str = "") -> str:
    """Formats a metric: losses with four digits, accuracies in percent."""
    if metric == "accuracy":
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.{3 if metric == 'likelihood' else 4}f}"


def with_error(row: Row, metric: str) -> str:
    """Mean and standard error: '3.1620 ± 0.0030'."""
    values = list(row.values(metric).values())
    if not values:
        return "diverged" if any(not r["finite"] for r in row.by_seed.values()) else NONE
    mean, error = mean_and_error(values)
    return shown(mean, metric) + ("" if error is None else f" ± {shown(error, metric)}")


def difference(row: Row, base: Row | None, metric: str) -> str:
    """Mean difference and p value: '+0.0120 (p = 0.04)'."""
    found = paired(row, base, metric)
    if found is None:
        return NONE
    mean, p = found
    return shown(mean, metric, "+") + ("" if p is None else f" (p = {p:.2g})")


def rate(row: Row) -> str:
    """The best learning rate, with the remark of the search: '0.001 (edge)'."""
    if row.rate is None:
        return NONE
    return f"{row.rate:g}" + (f" ({row.remark})" if row.remark else "")


def number(value: float | None, digits: int, unit: float = 1) -> str:
    """Formats a number in another unit."""
    return NONE if value is None else f"{value * unit:.{digits}f}"


def _perplexity(row: Row) -> str:
    """The perplexity of the mean loss: the geometric mean over seeds."""
    values = list(row.values("loss").values())
    return f"{math.exp(mean_and_error(values)[0]):.2f}" if values else NONE
