"""The data, the pretrained model, the loss and the metrics of a task."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.config import Task
from examples.common import batches
from examples.common.data import choices, images, text
from examples.common.data.images import classification, examples_of
from examples.common.data.text import next_token_loss
from examples.common.errors import UserError
from examples.common.models import llama, llama_weights, vit, vit_weights
from examples.common.training import Loss, Outputs
from loft_jax.adapters import LoraRule

Metrics = Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Examples for evaluation."""

    examples: Any
    """An array or a tree of arrays, in the form that the model takes."""
    count: int
    """The number of windows, images or questions. A question has an example for each choice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What all runs of a task share."""

    base: Callable[[int], Any]
    """The pretrained model; the seed initializes its new head, if it has one."""
    rule: Callable[[int, float], LoraRule]
    """(rank, alpha) -> the rule of plain LoRA."""
    train: Any
    validation: Split
    test: Split
    loss: Loss
    outputs: Outputs
    metrics: Callable[[Split, Any], Metrics]
    """The metrics from the outputs of all examples: loss, and for some tasks others."""
    head: str | None = None
    """The attribute of a new head, or None."""


def load(task: Task, data: Path) -> Workload:
    """Reads the data files of a task in the folder `data`, and the pretrained model."""
    return {"text": _text, "images": _images, "questions": _questions}[task.kind](task, data)


def find(data: Path, name: str) -> str:
    """The path of a data file, or of the same file compressed with gzip."""
    for path in (data / name, data / f"{name}.gz"):
        if path.is_file():
            return str(path)
    raise UserError(f"{data} has no {name} (or {name}.gz): `run --help` lists the data files.")


def _text(task: Task, data: Path) -> Workload:
    assert task.validation is not None
    names = (task.train, task.validation, task.test)
    files = [find(data, name) for name in names]
    pretrained = llama_weights.load(None)
    train, validation, test = (
        text.windows(pretrained.tokenizer, text.load_documents(file), task.length, name)
        for file, name in zip(files, names, strict=True)
    )
    base = pretrained.build()
    return Workload(
        base=lambda seed: base,
        rule=lambda rank, alpha: llama.lora_rule(task.targets, rank, alpha),
        train=train,
        validation=_windows(validation, task.validation_examples),
        test=_windows(test, task.test_examples),
        loss=next_token_loss,
        outputs=next_token_loss,
        metrics=lambda split, losses: {"loss": float(losses.mean())},
    )


def _windows(every: np.ndarray, most: int) -> Split:
    chosen = batches.spread(every, most)
    return Split(examples=chosen, count=len(chosen))


def _images(task: Task, data: Path) -> Workload:
    train = images.load_images(find(data, task.train), task.length)
    test = images.same_classes(train, images.load_images(find(data, task.test), task.length))
    train, validation = images.hold_out(train)
    pretrained = vit_weights.load(None)
    pretrained.check_image_size(task.length)

    def metrics(split: Split, outputs: Any) -> Metrics:
        hits = outputs["prediction"] == split.examples["labels"]
        return {"loss": float(outputs["loss"].mean()), "accuracy": float(hits.mean())}

    return Workload(
        base=lambda seed: pretrained.build(task.length, len(train.classes), seed),
        rule=lambda rank, alpha: vit.lora_rule(task.targets, rank, alpha),
        train=examples_of(train),
        validation=_pictures(validation, task.validation_examples),
        test=_pictures(test, task.test_examples),
        loss=lambda model, batch: classification(model, batch)["loss"],
        outputs=classification,
        metrics=metrics,
        head=vit.CLASSIFIER,
    )


def _pictures(every: images.Images, most: int) -> Split:
    chosen = batches.spread(examples_of(every), most)
    return Split(examples=chosen, count=batches.count(chosen))


def _questions(task: Task, data: Path) -> Workload:
    files = [find(data, name) for name in (task.train, task.test)]
    pretrained = llama_weights.load(None)
    questions, test = (choices.load_questions(file, answers="words") for file in files)
    train, validation = text.hold_out(questions)
    encode = lambda these, every: choices.encode(
        pretrained.tokenizer, these, task.length, every=every
    )

    def split(these: list[choices.Question], most: int) -> Split:
        places = batches.spread(np.arange(len(these)), most)
        rows = encode([these[place] for place in places], True)
        return Split(examples=rows, count=len(places))

    def metrics(split: Split, outputs: Any) -> Metrics:
        accuracy, likelihood = choices.score(split.examples, outputs["nats"])
        loss = float(outputs["loss"][split.examples["right"]].mean())
        return {"loss": loss, "accuracy": accuracy, "likelihood": likelihood}

    base = pretrained.build()
    return Workload(
        base=lambda seed: base,
        rule=lambda rank, alpha: llama.lora_rule(task.targets, rank, alpha),
        train=encode(train, False),
        validation=split(validation, task.validation_examples),
        test=split(test, task.test_examples),
        loss=choices.answer_loss,
        outputs=choices.answer_nats,
        metrics=metrics,
    )
