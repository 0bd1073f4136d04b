"""The experiments of the LoFT paper as commands of `finetune_llm.py` and `finetune_vit.py`.

    python examples/recipes.py                       # lists the recipes
    python examples/recipes.py table-2               # prints the commands, data and differences
    python examples/recipes.py table-2 --stand-in    # runs one on a tiny model and made-up data

A recipe (`common/recipes`) has the paper's models, data, methods and hyper-parameters. What differs
from the paper is printed with the commands. `--stand-in` shows in seconds, without a download, that
a recipe runs; its scores mean nothing.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import finetune_llm
import finetune_vit
from common.errors import UserError, exit_status
from common.recipes.images import IMAGE_RECIPES
from common.recipes.language import LANGUAGE_RECIPES
from common.recipes.recipe import Recipe
from common.stand_in import write_images, write_model, write_vit

RECIPES = LANGUAGE_RECIPES | IMAGE_RECIPES


def show(name: str, recipe: Recipe) -> str:
    """The commands of a recipe, its data, and what differs from the paper."""
    lines = [f"{name}: {recipe.title}", f"data: {recipe.data}", "differs from the paper:"]
    lines += [f"  - {one}" for one in recipe.differs]
    for arguments in recipe.commands():
        lines.append(f"python examples/{recipe.script} {shlex.join(arguments)}")
    return "\n".join(lines)


def run_stand_in(recipe: Recipe, output: Path, number: int = 0) -> None:
    """Runs a command of a recipe for two steps, on a tiny random model and made-up data.

    Args:
        recipe: one of `RECIPES`.
        output: a new folder for the results.
        number: of the command.
    """
    arguments = list(recipe.commands())[number]
    # An epoch of the paper is many steps: the stand-in has two.
    place = arguments.index("--epochs")
    arguments = arguments[:place] + arguments[place + 2 :]
    arguments += ["--steps", "2", "--eval-every", "2", "--save-every", "2", "--batch-size", "2"]
    arguments += ["--output", str(output)]
    with tempfile.TemporaryDirectory() as folder:
        script = _images if recipe.rows is None else _language
        script(recipe, arguments, Path(folder))


def _language(recipe: Recipe, arguments: list[str], folder: Path) -> None:
    assert recipe.rows is not None
    rows = [recipe.rows(n) for n in range(40)]
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    (folder / "data").write_text(text)
    arguments += _replaced(arguments, write_model(folder / "model"), folder / "data")
    arguments += shlex.split(
        f"--seq-len 160 --rank 2 --eval-questions 2 --max-new-tokens 4 {recipe.stand_in}"
    )
    arguments += [] if isinstance(rows[0], str) else ["--generate", "2"]
    finetune_llm.finetune(*finetune_llm.parse_arguments(arguments))


def _images(recipe: Recipe, arguments: list[str], folder: Path) -> None:
    write_images(folder / "data.npz")
    arguments += _replaced(arguments, write_vit(folder / "model"), folder / "data.npz")
    arguments += shlex.split(f"--image-size 8 --rank 2 {recipe.stand_in}")
    finetune_vit.finetune(*finetune_vit.parse_arguments(arguments))


def _replaced(arguments: Sequence[str], model: Path, data: Path) -> list[str]:
    """Flags that replace the model and all data."""
    flags = [flag for flag in ("--data", "--eval-data", "--test-data") if flag in arguments]
    return ["--model", str(model), *(x for flag in flags for x in (flag, str(data)))]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after an error message."""
    parser = argparse.ArgumentParser(description="The paper's experiments as commands.")
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
