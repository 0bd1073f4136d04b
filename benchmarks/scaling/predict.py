"""Predicts memory and traffic of LLaMA-3-70B on 256 chips from the formulas, without compiling.

python -m benchmarks.scaling predict
"""

import argparse

from benchmarks import markdown
from benchmarks.scaling import formulas
from benchmarks.scaling.settings import describe, predicted, share_of_hbm, to_row
from benchmarks.scaling.step import Setting
from benchmarks.scaling.tables import GIB, NAMES


def table(settings: list[Setting]) -> str:
    """The predictions in Markdown, in GiB."""
    heads = [*NAMES, "rank", "base", "adapter, state", "temporaries", "of HBM"]
    return markdown.table([*heads, "model sends", "optimizer sends"], map(_cells, settings))


def _cells(setting: Setting) -> list[object]:
    memory = formulas.memory(setting)
    *of_model, loft = formulas.traffic(setting)
    sizes = (memory.base, memory.adapter + memory.state, memory.temporaries)
    return [
        *describe(to_row(setting)),
        setting.rank,
        *(f"{size / GIB:.2f}" for size in sizes),
        share_of_hbm(setting.target, memory.total),
        f"{sum(of_model) / GIB:.1f}",
        f"{loft / GIB:.2f}",
    ]


def run(options: argparse.Namespace) -> None:
    del options
    print(table(predicted()))
