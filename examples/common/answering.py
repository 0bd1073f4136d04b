"""Right answers: of generated texts, and of the likeliest of several choices."""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from .data import exact_match
from .llm_settings import LlmSettings
from .loop import say
from .models.generate import complete
from .models.llama_weights import Pretrained
from .runs import Run
from .tasks import Prompts, Task
from .training import Trainer


def answer(
    run: Run,
    settings: LlmSettings,
    model: Any,
    pretrained: Pretrained,
    task: Task,
    step: int,
) -> float:
    """Answers the prompts of each set, if any, and logs how many answers are right.

    Returns:
        The seconds that this took.
    """
    if jax.process_count() > 1:  # generation needs the whole model in one process
        return 0.0
    start = time.perf_counter()
    tokenizer, records = pretrained.tokenizer, run.records()
    stop = [tokenizer.token_to_id(token) for token in pretrained.tokenizer_config.stop]
    stop = [index for index in stop if index is not None]
    answered = {r["answered"] for r in records if "answered" in r and r["step"] == step}
    for name, prompts in task.prompts.items():
        if name in answered:  # before the run was resumed
            continue
        began = time.perf_counter()
        ids = complete(model, prompts.ids, length=settings.max_new_tokens, stop=stop)
        seconds = time.perf_counter() - began
        texts = [tokenizer.decode(one) for one in ids]
        file = re.sub(r"[^\w.-]", "-", f"answers-{step}-{name}.jsonl")
        save_answers(run.folder / file, tokenizer, prompts, texts)
        found = exact_match.score(texts, prompts.references)
        run.log({"step": step, "answered": name} | found)
        say(
            f"step {step}: {len(texts)} answers ({name}), {percent(found)} ({seconds:.0f} s, "
            f"{sum(map(len, ids)) / seconds:.0f} tokens/s)"
        )
    if answered < task.prompts.keys() and len(task.prompts) > 1:
        sets = [r for r in run.records() if "answered" in r and r["step"] == step]
        mean = float(np.mean([record["exact_match"] for record in sets]))
        say(f"step {step}: mean of {len(sets)} sets, {percent({'exact_match': mean})}")
    return time.perf_counter() - start


def choose(
    run: Run, settings: LlmSettings, trainer: Trainer, params: Any, task: Task, step: int
) -> None:
    """Logs how often the likeliest choice is right, for each set of multiple-choice questions."""
    tested = {r["tested"]: r for r in run.records() if "tested" in r and r["step"] == step}
    for name, of_set in task.tests.items():
        if name not in tested:  # else the run was resumed
            size = settings.batch_size // settings.accumulate
            found = of_set.metrics(trainer.evaluate(params, of_set.examples, size))
            tested[name] = {"accuracy": found["eval_accuracy"], "loss": found["eval_loss"]}
            run.log({"step": step, "tested": name} | tested[name])
            say(f"step {step}: {name}, accuracy {100 * found['eval_accuracy']:.1f} %")
    if len(task.tests) > 1:
        mean = float(np.mean([tested[name]["accuracy"] for name in task.tests]))
        say(f"step {step}: mean of {len(task.tests)} sets, accuracy {100 * mean:.1f} %")


def save_answers(path: Path, tokenizer: Tokenizer, prompts: Prompts, texts: list[str]) -> None:
    """Writes a line of JSON for each prompt, with its answer and the reference."""
    with path.open("w") as file:
        for prompt, text, right in zip(prompts.ids, texts, prompts.references, strict=True):
            line = {"prompt": tokenizer.decode(prompt), "answer": text, "reference": right}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def percent(metrics: Mapping[str, float]) -> str:
    """'exact match 12.5 %, last number match 20.0 %'."""
    return ", ".join(f"{name.replace('_', ' ')} {100 * x:.1f} %" for name, x in metrics.items())
