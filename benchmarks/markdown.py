"""Markdown tables."""

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with a row of heads; None is an empty cell.

    Example:
      >>> print(table(["rank", "step, ms"], [[4, 1.5], [16, None]]))
      | rank | step, ms |
      | --- | --- |
      | 4 | 1.5 |
      | 16 |  |
    """
    lines = [heads, ["---"] * len(heads), *rows]
    shown = lambda cell: "" if cell is None else str(cell)
    return "\n".join(f"| {' | '.join(map(shown, cells))} |" for cells in lines)
