"""The paper's experiments with language models (its Table 4 and appendices E.1, E.4, F and H)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from .recipe import Recipe, Run

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


_COMMONSENSE: dict[str, Any] = {
    # A row for each example, so that a step has 16 of them, as in the paper.
    "flags": "--dtype bfloat16 --remat --task instructions --no-packing --batch-size 16 "
    "--epochs 3 --seq-len 256 "
    "--targets q,k,v,up,down --dropout 0.05 --warmup 100 --max-new-tokens 32 "
    "--data commonsense_170k.json --test-data "
    + ",".join(f"dataset/{name}/test.json" for name in _SETS),
    "data": "LLM-Adapters (github.com/AGI-Edgerunners/LLM-Adapters): ft-training_set/"
    "commonsense_170k.json, and the folder dataset with the eight test sets.",
    "differs": (
        "Answers are generated greedily; LLM-Adapters uses four beams. Compare the label match.",
    ),
    "rows": _question,
}
_WIKITEXT: dict[str, Any] = {
    "flags": "--epochs 1 --seq-len 1024 --rank 4 --learning-rate 2e-4 --warmup 0 "
    "--data Salesforce/wikitext:wikitext-2-raw-v1:train "
    "--eval-data Salesforce/wikitext:wikitext-2-raw-v1:validation --eval-windows 1000",
    "data": "WikiText-2 from the hub (pip install datasets), or text files with --data and "
    "--eval-data.",
    "differs": (
        "Windows of 1024 tokens; the paper does not give their length.",
        "No dropout; the paper says only that LoRA+ has its repository's default.",
        "AdaLoRA and LoRA-GA are missing; `python -m benchmarks.accuracy` compares LoRA-GA.",
    ),
    "rows": lambda n: f"Paragraph {n} has the number {n * 37 % 101}.\n\n" * 3,
    "stand_in": "--eval-windows 2",
}
_CODE: dict[str, Any] = {
    "flags": "--dtype bfloat16 --remat --batch-size 16 --epochs 3 --no-packing "
    "--learning-rate 1e-4 --warmup 100 --dropout 0.05 "
    "--targets q,k,v,up,down --data m-a-p/CodeFeedback-Filtered-Instruction",
    "data": "CodeFeedback from the hub (pip install datasets), or a file of records with query and "
    "answer.",
    "differs": (
        "All languages; the paper keeps the records whose lang is python. Filter the file first.",
        "HumanEval is not run: add --merge, and give the merged folder to evaluate_code.py, whose "
        "defaults are the paper's ten samples at temperature 0.5.",
    ),
    "rows": lambda n: {"query": f"Write {n} in Python.", "answer": f"print({n})", "lang": "python"},
}


def _gpt2(model: str, batch: int) -> tuple[Run, ...]:
    flags = f"--batch-size {batch}"
    methods = ("full", "lora", "rslora", "lora-pro", "lora+", "loft")
    return tuple(Run(model, f"openai-community/{model}", method, flags) for method in methods)


LANGUAGE_RECIPES = {
    "table-2": Recipe(
        title="commonsense reasoning, three LLaMA models",
        runs=_adapters(
            ("llama-7b", "llama2-7b", "llama3-8b"),
            {"lora": (16,), "dora": (16,), "loft": (16, 4, 2, 1)},
            COMMONSENSE_RATES,
        ),
        **_COMMONSENSE,
    ),
    "table-7": Recipe(
        title="commonsense reasoning, LoFT without its parts",
        runs=_adapters(
            ("llama-7b",),
            dict.fromkeys(("loft", "no-alternation", "no-calibration", "neither"), (4,)),
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
