"""The language experiments of the LoFT paper as commands of `finetune_llm.py`.

    python examples/recipes.py                       # lists the recipes
    python examples/recipes.py table-2               # prints the commands, data and differences
    python examples/recipes.py table-2 --stand-in    # runs one on a tiny model and made-up data

A recipe has the paper's models, data, methods and hyper-parameters (its Tables 4 and 5 and appendix
E.4, F and H). What differs from the paper is printed with the commands. `--stand-in` shows in
seconds, without a download, that a recipe runs; its scores mean nothing.
"""

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import finetune_llm
from common.errors import UserError, exit_status
from common.stand_in import write_model

LLAMA = {
    "llama-7b": "huggyllama/llama-7b",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-70b": "meta-llama/Meta-Llama-3-70B",
}
"""Hub ids. Those of meta-llama need the acceptance of Meta's licence on the hub, and a login."""

COMMONSENSE_RATES = {"llama-7b": 2e-4, "llama2-7b": 3e-4, "llama3-8b": 1e-4, "llama3-70b": 5e-3}
"""Learning rates by model: Table 4 and appendix F.3."""

_SETS = (
    *("boolq", "piqa", "social_i_qa", "hellaswag"),
    *("winogrande", "ARC-Challenge", "ARC-Easy", "openbookqa"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a recipe: a row of the paper's table."""

    model: str
    """Short name, for the output folder."""
    hub_id: str
    method: str
    flags: str = ""


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
    rows: Callable[[int], dict[str, Any] | str]
    """The n-th made-up example of `--stand-in`, in the form of the data."""
    stand_in: str = ""
    """Flags of `--stand-in` that replace others."""

    def commands(self) -> Iterator[list[str]]:
        """The arguments of `finetune_llm.py` for each run."""
        for run in self.runs:
            flags = ["--model", run.hub_id, "--method", run.method]
            yield [*flags, *shlex.split(run.flags), *shlex.split(self.flags)]


def _adapters(
    models: Sequence[str], ranks: dict[str, Sequence[int]], rates: dict[str, float] | None = None
) -> tuple[Run, ...]:
    """Runs for each model, method and rank; LoRA and DoRA have alpha = 2r, as in the paper."""
    runs = []
    for model in models:
        rate = f" --learning-rate {rates[model]:g}" if rates else ""
        for method, of_method in ranks.items():
            for rank in of_method:
                alpha = 2 * rank if method in ("lora", "dora") else rank
                flags = f"--rank {rank} --alpha {alpha}{rate}"
                runs.append(Run(model, LLAMA[model], method, flags))
    return tuple(runs)


def _question(n: int) -> dict[str, str]:
    label = ("true", "false")[n % 2]
    asked = f"Please answer the following question with true or false, question: is {n} even?"
    return {
        "instruction": f"{asked}\n\nAnswer format: true/false",
        "input": "",
        "output": f"the correct answer is {label}",
        "answer": label,
    }


_WARM_UP = "The learning rate rises over a tenth of the steps"
_NO_DROPOUT = "No dropout"

_COMMONSENSE: dict[str, Any] = {
    # A row for each example, so that a step has 16 of them, as in the paper.
    "flags": "--dtype bfloat16 --remat --task instructions --no-packing --batch-size 16 "
    "--epochs 3 --seq-len 256 "
    "--targets q,k,v,up,down --max-new-tokens 32 --data commonsense_170k.json --test-data "
    + ",".join(f"dataset/{name}/test.json" for name in _SETS),
    "data": "LLM-Adapters (github.com/AGI-Edgerunners/LLM-Adapters): ft-training_set/"
    "commonsense_170k.json, and the folder dataset with the eight test sets.",
    "differs": (
        f"{_WARM_UP}, in the paper over 100 steps.",
        f"{_NO_DROPOUT}, in the paper 0.05.",
        "Answers are generated greedily and compared as a whole; LLM-Adapters uses four beams "
        "and looks for the label.",
    ),
    "rows": _question,
}
_WIKITEXT: dict[str, Any] = {
    "flags": "--epochs 1 --seq-len 1024 --rank 4 --learning-rate 2e-4 "
    "--data Salesforce/wikitext:wikitext-2-raw-v1:train "
    "--eval-data Salesforce/wikitext:wikitext-2-raw-v1:validation --eval-windows 1000",
    "data": "WikiText-2 from the hub (pip install datasets), or text files with --data and "
    "--eval-data.",
    "differs": (
        "Windows of 1024 tokens; the paper does not give their length.",
        f"{_WARM_UP}; the paper gives none.",
        "AdaLoRA and LoRA-GA are missing; `python -m benchmarks.accuracy` compares LoRA-GA.",
    ),
    "rows": lambda n: f"Paragraph {n} has the number {n * 37 % 101}.\n\n" * 3,
    "stand_in": "--eval-windows 2",
}
_CODE: dict[str, Any] = {
    "flags": "--dtype bfloat16 --remat --batch-size 16 --epochs 3 --no-packing "
    "--learning-rate 1e-4 "
    "--targets q,k,v,up,down --data m-a-p/CodeFeedback-Filtered-Instruction",
    "data": "CodeFeedback from the hub (pip install datasets), or a file of records with query and "
    "answer.",
    "differs": (
        "All languages; the paper keeps the records whose lang is python. Filter the file first.",
        "HumanEval is not run: generate completions with `common.models.generate.complete` "
        "(temperature=0.5, ten a problem) and judge them with evalplus.",
        f"{_WARM_UP}, in the paper over 100 steps. {_NO_DROPOUT}.",
    ),
    "rows": lambda n: {"query": f"Write {n} in Python.", "answer": f"print({n})", "lang": "python"},
}


def _gpt2(model: str, batch: int) -> tuple[Run, ...]:
    flags = f"--batch-size {batch}"
    methods = ("full", "lora", "rslora", "lora-pro", "lora+", "loft")
    return tuple(Run(model, f"openai-community/{model}", method, flags) for method in methods)


RECIPES = {
    "table-2": Recipe(
        title="commonsense reasoning, three LLaMA models",
        runs=_adapters(
            ("llama-7b", "llama2-7b", "llama3-8b"),
            {"lora": (16,), "dora": (16,), "loft": (16, 4, 2, 1)},
            COMMONSENSE_RATES,
        ),
        **_COMMONSENSE,
    ),
    "table-10": Recipe(
        title="commonsense reasoning, LoFT and LoFT (simple)",
        runs=_adapters(("llama-7b",), {"loft": (16,), "simple": (16,)}, COMMONSENSE_RATES),
        **_COMMONSENSE,
    ),
    "table-14": Recipe(
        title="perplexity of GPT-2 on WikiText-2", runs=_gpt2("gpt2", 64), **_WIKITEXT
    ),
    "table-15": Recipe(
        title="perplexity of GPT-2 Large on WikiText-2", runs=_gpt2("gpt2-large", 32), **_WIKITEXT
    ),
    "table-16": Recipe(
        title="commonsense reasoning at low rank",
        runs=_adapters(
            ("llama-7b",),
            dict.fromkeys(("lora", "dora", "loft"), (4, 2, 1)),
            COMMONSENSE_RATES,
        ),
        **_COMMONSENSE,
    ),
    # Needs several accelerators: give the flags to `multi_device.py` with a --mesh.
    "table-17": Recipe(
        title="commonsense reasoning, LLaMA-3-70B (with multi_device.py --mesh)",
        runs=_adapters(("llama3-70b",), {"loft": (16, 4, 2, 1)}, COMMONSENSE_RATES),
        **_COMMONSENSE,
    ),
    "figure-9": Recipe(
        title="Orca-Math with base weights in 4 bits",
        runs=_adapters(("llama2-7b", "llama3-8b"), {"lora": (16,), "loft": (16, 8, 4, 1)}),
        flags="--quantize nf4 --remat --no-packing --batch-size 32 --epochs 3 --seq-len 256 "
        "--generate 500 --max-new-tokens 256 --data microsoft/orca-math-word-problems-200k",
        data="Orca-Math from the hub (pip install datasets), or a file of records with question "
        "and answer.",
        differs=(
            "The paper does not give the learning rate; the commands use the default of the "
            "method.",
            "Every tenth record is held out, and 500 of these are answered.",
            "The references have no mark before the final number: compare the last number match.",
        ),
        rows=lambda n: {"question": f"What is {n} plus 1?", "answer": f"{n} plus 1 is {n + 1}."},
    ),
    "table-20": Recipe(
        title="code, by rank",
        runs=_adapters(("llama3-8b",), {"simple": (8, 16, 32, 64, 128, 256), "lora": (8, 64)}),
        **(_CODE | {"flags": _CODE["flags"] + " --seq-len 256"}),
    ),
    "table-21": Recipe(
        title="code, by context length",
        runs=tuple(
            dataclasses.replace(run, flags=f"{run.flags} --seq-len {length}")
            for length in (256, 512)
            for run in _adapters(("llama3-8b",), {"lora": (8,), "loft": (8,)})
        ),
        **_CODE,
    ),
}


def show(name: str, recipe: Recipe) -> str:
    """The commands of a recipe, its data, and what differs from the paper."""
    lines = [f"{name}: {recipe.title}", f"data: {recipe.data}", "differs from the paper:"]
    lines += [f"  - {one}" for one in recipe.differs]
    for arguments in recipe.commands():
        lines.append(f"python examples/finetune_llm.py {shlex.join(arguments)}")
    return "\n".join(lines)


def run_stand_in(recipe: Recipe, output: Path, number: int = 0) -> None:
    """Runs a command of a recipe for two steps, on a tiny random model and made-up data.

    Args:
        recipe: one of `RECIPES`.
        output: a new folder for the results.
        number: of the command.
    """
    arguments = list(recipe.commands())[number]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder / "model")
        rows = [recipe.rows(n) for n in range(40)]
        text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
        (folder / "data").write_text(text)
        replaced = ["--model", model, "--data", folder / "data", "--output", output]
        replaced += shlex.split(
            "--batch-size 2 --seq-len 160 --rank 2 --eval-every 2 --save-every 2 "
            f"--eval-questions 2 --max-new-tokens 4 {recipe.stand_in}"
        )
        for flag in ("--eval-data", "--test-data"):
            replaced += [flag, folder / "data"] if flag in arguments else []
        # An epoch of the paper is many steps: the stand-in has two.
        place = arguments.index("--epochs")
        kept = arguments[:place] + arguments[place + 2 :]
        replaced += ["--steps", "2"]
        replaced += [] if isinstance(rows[0], str) else ["--generate", "2"]
        settings, folder_, resume = finetune_llm.parse_arguments([*kept, *map(str, replaced)])
        finetune_llm.finetune(settings, folder_, resume)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after an error message."""
    parser = argparse.ArgumentParser(description="The paper's language experiments as commands.")
    parser.add_argument("name", nargs="?", help=f"{', '.join(RECIPES)}; default a list of them")
    parser.add_argument(
        "--stand-in", action="store_true", help="run its first command on a tiny model"
    )
    parser.add_argument("--output", type=Path, help="folder of --stand-in; default runs/NAME")
    given = parser.parse_args(argv)

    def work() -> None:
        if given.name is None:
            print("\n".join(f"{name:10} {recipe.title}" for name, recipe in RECIPES.items()))
        elif given.name not in RECIPES:
            raise UserError(f"{given.name!r} is no recipe: choose from {', '.join(RECIPES)}.")
        elif given.stand_in:
            output = given.output or Path("runs") / f"{given.name}-stand-in"
            run_stand_in(RECIPES[given.name], output)
        else:
            print(show(given.name, RECIPES[given.name]))

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
