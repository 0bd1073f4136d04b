"""Markdown tables, and pages whose tables are generated."""

import re
from collections.abc import Callable, Iterable, Sequence

MARKED = re.compile(r"(<!-- (\w+: [\w= -]+?) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


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


def fill(page: str, part: Callable[[str], str]) -> str:
    """A page with the parts between its marks, `<!-- NAME -->` and `<!-- end -->`.

    Example:
      >>> print(fill("<!-- table: a -->\\n<!-- end -->", lambda mark: f"of {mark}"))
      <!-- table: a -->
      <BLANKLINE>
      of table: a
      <BLANKLINE>
      <!-- end -->
    """
    return MARKED.sub(lambda match: f"{match[1]}\n{part(match[2])}\n\n{match[3]}", page)
