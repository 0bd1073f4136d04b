"""Programming problems as HumanEval writes them: completions, and the estimate of pass@k.

evalplus reads the same files: problems with `task_id`, `prompt` and `entry_point`, and samples with
`task_id` and `solution`. It runs the solutions; nothing here does.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import sources

FIELDS = ("task_id", "prompt", "entry_point")

STOPS = ("\ndef ", "\nclass ", "\nif ", "\nprint(", "\nassert ", "\n@", "\n#", "\n```")
"""What follows a completed function."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A function to write."""

    task_id: str
    prompt: str
    """Its signature and docstring."""
    entry_point: str
    """Its name."""

    @property
    def question(self) -> str:
        """The problem as an instruction, for a model that is trained on instructions."""
        return (
            "Write a Python function that does what its docstring says. Answer with the whole "
            f"function in one block of code.\n```python\n{self.prompt.strip()}\n```"
        )


def read_problems(source: str) -> list[Problem]:
    """The problems of a file (JSON Lines, gzip too) or a hub dataset, such as HumanEval+."""
    content = sources.read(source, "--problems")
    if isinstance(content, str):
        raise UserError(
            f"--problems {source} is plain text: pass records with {', '.join(FIELDS)}."
        )
    found = []
    for record in content:
        values = [value for name in FIELDS if isinstance(value := record.fields.get(name), str)]
        if len(values) < len(FIELDS):
            raise UserError(f"{record.where}: expected an object with {', '.join(FIELDS)}.")
        found.append(Problem(*values))
    return found


def solution(problem: Problem, text: str, *, continues: bool) -> str:
    """The program in a generated text.

    Args:
        problem: which the text solves.
        text: without the prompt.
        continues: whether the text continues the prompt. Otherwise it answers the question, and its
            first block of code counts, or all of it if there is none.

    Example:
        >>> problem = Problem("t/0", "def one():\\n", "one")
        >>> solution(problem, "    return 1\\n\\nprint(one())", continues=True)
        'def one():\\n    return 1\\n'
        >>> solution(problem, "```\\ndef one():\\n    return 1\\n```", continues=False)
        'def one():\\n    return 1\\n'
    """
    if continues:
        ends = [place for stop in STOPS if (place := text.find(stop)) >= 0]
        return problem.prompt + text[: min(ends, default=len(text))].rstrip() + "\n"
    block = re.search(r"```[ \t]*\w*\n(.*?)(?:\n```|\Z)", text, re.DOTALL)
    program = (block[1] if block else text).rstrip() + "\n"
    if re.search(
        rf"^\s*(async\s+)?def\s+{re.escape(problem.entry_point)}\b", program, re.MULTILINE
    ):
        return program
    return problem.prompt + program  # only the body of the function


def write_samples(path: Path, samples: Iterable[tuple[Problem, str]]) -> None:
    """Writes solutions as evalplus reads them: a line of JSON for each."""
    with path.open("w") as file:
        for problem, program in samples:
            file.write(json.dumps({"task_id": problem.task_id, "solution": program}) + "\n")


def pass_at_k(total: int, right: int, k: int) -> float:
    """The probability that at least one of `k` samples is right: an estimate without bias.

    Source: Chen et al., "Evaluating Large Language Models Trained on Code", 2021, eq. (1).

    Args:
        total: the samples of a problem, at least `k`.
        right: how many of them are right.
        k: samples that are drawn from them without replacement.

    Example:
        >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
        (0.25, 0.5, 1.0)
    """
    if not 0 <= right <= total or not 1 <= k <= total:
        raise ValueError(f"pass@{k} of {right} right samples among {total} is not defined")
    return 1 - math.comb(total - right, k) / math.comb(total, k)


def mean_pass_at_k(counts: Sequence[tuple[int, int]], ks: Iterable[int]) -> dict[str, float]:
    """The mean over problems, for each k that all problems have enough samples for.

    Args:
        counts: the samples of each problem, and how many of them are right.
        ks: the k.
    """
    possible = [k for k in ks if all(total >= k for total, _ in counts)]
    return {
        f"pass@{k}": sum(pass_at_k(*count, k) for count in counts) / len(counts) for k in possible
    }


def read_results(path: Path) -> dict[str, list[tuple[int, int]]]:
    """The counts in evalplus' results, by test set: HumanEval's own tests, and all tests."""
    results = json.loads(path.read_text())["eval"].values()

    def counts(passed: Any) -> list[tuple[int, int]]:
        return [(len(of_problem), sum(map(passed, of_problem))) for of_problem in results]

    base = lambda result: result["base_status"] == "pass"
    return {
        "base tests": counts(base),
        "all tests": counts(lambda result: base(result) and result["plus_status"] == "pass"),
    }
