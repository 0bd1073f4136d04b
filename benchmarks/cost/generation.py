"""Times greedy generation beside transformers, with the same weights and prompts.

    pip install torch transformers
    python -m benchmarks.cost generation --batch 1 --batch 8 --runs 5

Both sides have the same model in float32, SmolLM2-135M unless --model names another folder. A run
reads prompts of --prompt tokens and generates --new tokens for each, without an end of text. The
runs of both sides alternate in one process. PyTorch waits in busy loops, so on a machine with other
work it needs a core of its own: `taskset -c 1 python -m ...` gives both sides one core.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import markdown
from benchmarks.command_line import add_runs
from benchmarks.cost.timing import in_alternation, paired_ratio, quartiles
from benchmarks.records import Row, append
from examples.common.models import llama_weights
from examples.common.models.generate import complete
from examples.common.models.merged import save_language_model

TEXT = (
    "The history of the city begins with a small settlement at the ford of a river, where traders "
    "crossed with salt, cloth and grain. A wall was built in the twelfth century, and with it came "
    "a market, a mint and a school. When the railway arrived, the old gates were taken down. "
)

Complete = Callable[[], list[list[int]]]


def our_side(model: Any, prompts: list[list[int]], new: int) -> Complete:
    """Generation by the examples."""
    return lambda: complete(model, prompts, length=new, batch_size=len(prompts))


def their_side(model: Any, prompts: list[list[int]], new: int) -> Complete:
    """Generation by transformers."""
    import torch

    tokens = torch.tensor(prompts)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    def run() -> list[list[int]]:
        with torch.inference_mode():
            made = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        return made[:, tokens.shape[1] :].tolist()

    return run


def measure(options: argparse.Namespace) -> list[Row]:
    """Measures both sides, two rows for each batch."""
    import torch
    import transformers

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    pretrained = llama_weights.load(options.model)
    ours = pretrained.build()
    with tempfile.TemporaryDirectory() as folder:
        save_language_model(Path(folder), ours, pretrained)
        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs.generation_config.eos_token_id = None
    ids = pretrained.tokenizer.encode(TEXT * (1 + options.prompt // 8)).ids
    rows = []
    for batch in options.batch:
        prompts = [ids[7 * row : 7 * row + options.prompt] for row in range(batch)]
        sides = {
            "ours": our_side(ours, prompts, options.new),
            "transformers": their_side(theirs, prompts, options.new),
        }
        found = {side: run() for side, run in sides.items()}
        pairs = zip(found["ours"], found["transformers"], strict=True)
        equal = sum(a == b for one, other in pairs for a, b in zip(one, other, strict=True))
        times = in_alternation(sides, options.runs, warmup=1)
        rows += [
            {
                "side": side,
                "model": pretrained.name,
                "batch": batch,
                "prompt": options.prompt,
                "new": options.new,
                "ms": quartiles(times[side]),
                "tokens_per_second": round(
                    batch * options.new / quartiles(times[side])[1] * 1e3, 1
                ),
                "ratio": paired_ratio(times[side], times["transformers"]),
                "equal_tokens": f"{equal} of {batch * options.new}",
                "cores": threads,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "runs": options.runs,
            }
            for side in sides
        ]
    return rows


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""

    def cells(row: Row) -> list[object]:
        ratio = "{1:.2f} ({0:.2f} to {2:.2f})".format(*row["ratio"])
        return [row["side"], row["batch"], row["tokens_per_second"], ratio, row["equal_tokens"]]

    heads = ["side", "batch", "tokens/s", "time, ratio (quartiles)", "equal tokens"]
    return markdown.table(heads, map(cells, rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="folder or hub id; default SmolLM2-135M")
    add("--batch", type=int, action="append", help="prompts at a time; default 1 and 8")
    add("--prompt", type=int, default=32, help="tokens of a prompt; default 32")
    add("--new", type=int, default=64, help="tokens to generate; default 64")
    add_runs(parser, 5)


def run(options: argparse.Namespace) -> None:
    options.batch = options.batch or [1, 8]
    rows = measure(options)
    append(options.results, rows)
    print(table(rows))
