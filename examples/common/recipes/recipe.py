"""What a recipe is: the commands of one of the paper's experiments."""

import dataclasses
import shlex
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a recipe: a row of the paper's table."""

    model: str
    """Short name, for the output folder."""
    hub_id: str
    method: str
    flags: str = ""


Row = dict[str, Any] | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One experiment of the paper."""

    title: str
    runs: tuple[Run, ...]
    flags: str
    """The flags of all runs."""
    data: str
    """Where the data are, and under which name a command expects them."""
    differs: tuple[str, ...]
    """What a command does not do as the paper does."""
    rows: Callable[[int], Row] | None = None
    """The n-th made-up example of `--stand-in`, in the form of the data; None for images."""
    stand_in: str = ""
    """Flags of `--stand-in` that replace others."""

    @property
    def script(self) -> str:
        """The script whose commands these are."""
        return "finetune_vit.py" if self.rows is None else "finetune_llm.py"

    def commands(self) -> Iterator[list[str]]:
        """The arguments of the script for each run."""
        for run in self.runs:
            flags = ["--model", run.hub_id, "--method", run.method]
            yield [*flags, *shlex.split(run.flags), *shlex.split(self.flags)]
