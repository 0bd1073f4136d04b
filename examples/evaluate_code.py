"""Samples solutions of programming problems from a model, and measures pass@k with evalplus.

    python examples/finetune_llm.py --data code.jsonl --merge --output runs/code
    python examples/evaluate_code.py --model runs/code/merged --problems HumanEvalPlus.jsonl.gz

The problems are those of HumanEval+ (github.com/evalplus/humanevalplus_release). The script writes
ten solutions of each, sampled at temperature 0.5, to `samples.jsonl`. It does not run them.

`--judge` lets evalplus run them in a process of its own, and prints pass@1, pass@5 and pass@10.
**The solutions are programs that a model wrote**: judge them in a container without access to your
files and your network. evalplus needs older versions of some packages, so install it apart:

    python -m venv judge && judge/bin/pip install evalplus
    python examples/evaluate_code.py --problems HumanEvalPlus.jsonl.gz --judge judge/bin/python
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.data import answers, code, forms
from common.data.sources import Record
from common.errors import UserError, exit_status
from common.models import llama_weights
from common.models.generate import complete
from common.settings import non_negative_float, positive_float, positive_int

KS = (1, 5, 10)


def sample(
    pretrained: llama_weights.Pretrained, problems: Sequence[code.Problem], given: Any
) -> list[tuple[code.Problem, str]]:
    """Solutions of each problem, `given.samples` of them."""
    if given.plain:
        prompts = [pretrained.tokenizer.encode(problem.prompt).ids for problem in problems]
    else:
        prompts = [ask(pretrained, problem) for problem in problems]
    tokenizer, config = pretrained.tokenizer, pretrained.tokenizer_config
    found = complete(
        pretrained.build(given.dtype),
        [ids for ids in prompts for _ in range(given.samples)],
        length=given.max_new_tokens,
        stop=[index for x in config.stop if (index := tokenizer.token_to_id(x)) is not None],
        batch_size=given.batch_size,
        temperature=given.temperature,
        top_p=given.top_p,
        seed=given.seed,
    )
    repeated = [problem for problem in problems for _ in range(given.samples)]
    return [
        (problem, code.solution(problem, tokenizer.decode(ids), continues=given.plain))
        for problem, ids in zip(repeated, found, strict=True)
    ]


def ask(pretrained: llama_weights.Pretrained, problem: code.Problem) -> list[int]:
    """The prompt's tokens, in the form in which `finetune_llm.py` trains questions and answers."""
    fields = {"question": problem.question, "answer": "-"}
    example = forms.example(Record(problem.task_id, fields))
    text, _ = answers.write_prompt(example, pretrained.tokenizer_config)
    (encoded,) = answers.encode(pretrained.tokenizer, [text], "all")
    return encoded.ids.tolist()


def judge(
    samples: Path, problems: str, python: str = sys.executable
) -> dict[str, dict[str, float]]:
    """pass@k by test set; evalplus runs the samples in another process.

    Args:
        samples: written by `code.write_samples`.
        problems: the file of the problems, or another source, for which evalplus has its own.
        python: of the environment in which evalplus is installed.
    """
    environment = dict(os.environ)
    if Path(problems).is_file():
        environment["HUMANEVAL_OVERRIDE_PATH"] = str(Path(problems).resolve())
    results = samples.with_name(f"{samples.stem}_eval_results.json")
    results.unlink(missing_ok=True)  # evalplus would print those of earlier samples
    command = [python, "-m", "evalplus.evaluate", "humaneval", "--samples", str(samples)]
    try:
        subprocess.run(command, env=environment, check=True)
        of_sets = code.read_results(results)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"evalplus could not judge {samples} ({error}): see its messages above. It must be "
            f"installed for {python}; --judge names another Python."
        ) from error
    return {name: code.mean_pass_at_k(counts, KS) for name, counts in of_sets.items()}


def run(given: argparse.Namespace) -> None:
    """Samples solutions, writes them, and judges them if requested."""
    if given.output.suffix != ".jsonl":
        raise UserError(f"--output {given.output}: evalplus reads files that end with .jsonl.")
    problems = code.read_problems(given.problems)
    samples = sample(llama_weights.load(given.model), problems, given)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    code.write_samples(given.output, samples)
    print(f"{len(samples)} solutions of {len(problems)} problems in {given.output}")
    if not given.judge:
        print("judge them with --judge, or: evalplus.evaluate humaneval --samples", given.output)
        return
    for name, found in judge(given.output, given.problems, given.judge).items():
        print(f"{name}: " + ", ".join(f"{k} {100 * value:.1f} %" for k, value in found.items()))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description="Sample solutions of problems, and judge them.")
    add = found.add_argument
    add("--model", help="merged folder of a run, other folder or hub id; default SmolLM2-135M")
    add("--problems", required=True, help="file or hub dataset of HumanEval+")
    add("--plain", action="store_true", help="continue the prompt instead of asking")
    add("--samples", type=positive_int, default=10, help="solutions of each problem; default 10")
    add("--temperature", type=non_negative_float, default=0.5, help="0 is greedy; default 0.5")
    add("--top-p", type=positive_float, default=1.0, help="default 1")
    add("--max-new-tokens", type=positive_int, default=512, help="default 512")
    add("--batch-size", type=positive_int, default=16, help="solutions at a time; default 16")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")
    add("--seed", type=int, default=0, help="default 0")
    add("--output", type=Path, default=Path("samples.jsonl"), help="default samples.jsonl")
    add(
        "--judge",
        nargs="?",
        const=sys.executable,
        metavar="PYTHON",
        help="let evalplus RUN the solutions, installed for this Python; default off",
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 after an error message, 130 if interrupted."""
    given = parser().parse_args(argv)
    return exit_status(lambda: run(given))


if __name__ == "__main__":
    sys.exit(main())
