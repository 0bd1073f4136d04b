"""Training tasks: text, multiple-choice questions, and image classification."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import numpy as np
from tokenizers import Tokenizer

from . import batches
from .data import choices, images, text
from .figures import draw_accuracy, draw_perplexity
from .llm_settings import LlmSettings
from .training import Loss, Outputs

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Data, the loss to minimise, and the metrics to report."""

    kind: Literal["text", "questions", "images"]
    description: str
    train: Any
    """Examples, an array or a tree of arrays."""
    held_out: Any
    unit: str = "tokens"
    """The unit of the reported speed."""
    units: int
    """Units per example."""
    loss: Loss
    outputs: Outputs
    metrics: Callable[[Any], dict[str, float]]
    """Computes the metrics in metrics.jsonl, `eval_loss` among them, from all outputs."""
    sentence: Callable[[Mapping[str, float]], str]
    """Describes the metrics."""
    draw: Callable[..., None] = draw_accuracy
    """Draws the learning curve; arguments as for `draw_accuracy`."""


def language_modelling(settings: LlmSettings, tokenizer: Tokenizer) -> Task:
    """Prediction of the next token in windows of text."""
    documents, evaluated = _load(text.load_documents, settings)
    length = settings.seq_len
    train = text.windows(tokenizer, documents, length, "training")
    held_out = text.windows(tokenizer, evaluated, length, "held-out")
    held_out = batches.spread(held_out, settings.eval_windows)

    def metrics(losses: np.ndarray) -> dict[str, float]:
        loss = float(losses.mean())
        return {"eval_loss": loss, "eval_perplexity": float(np.exp(loss))}

    return Task(
        kind="text",
        description=f"{len(train)} training windows of {length} tokens, {len(held_out)} held out",
        train=train,
        held_out=held_out,
        units=length,
        loss=text.next_token_loss,
        outputs=text.next_token_loss,
        metrics=metrics,
        sentence=lambda m: (
            f"held-out loss {m['eval_loss']:.4f}, perplexity {m['eval_perplexity']:.2f}"
        ),
        draw=draw_perplexity,
    )


def multiple_choice(settings: LlmSettings, tokenizer: Tokenizer) -> Task:
    """Multiple-choice questions."""
    load = functools.partial(choices.load_questions, answers=settings.answers)
    questions, held_out = _load(load, settings)
    places = batches.spread(np.arange(len(held_out)), settings.eval_questions)
    held_out = [held_out[place] for place in places]
    train = choices.encode(tokenizer, questions, settings.seq_len, every=False)
    rows = choices.encode(tokenizer, held_out, settings.seq_len, every=True)

    def metrics(outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
        accuracy, likelihood = choices.score(rows, outputs["nats"])
        return {
            "eval_loss": float(outputs["loss"][rows["right"]].mean()),
            "eval_accuracy": accuracy,
            "eval_answer_likelihood": likelihood,
        }

    return Task(
        kind="questions",
        description=f"{len(questions)} training questions, {len(held_out)} held out",
        train=train,
        held_out=rows,
        units=settings.seq_len,
        loss=choices.answer_loss,
        outputs=choices.answer_nats,
        metrics=metrics,
        sentence=lambda m: (
            f"held-out accuracy {100 * m['eval_accuracy']:.1f} %, likelihood of the right answer "
            f"{m['eval_answer_likelihood']:.3f}, loss {m['eval_loss']:.4f}"
        ),
    )


def language_task(settings: LlmSettings, tokenizer: Tokenizer) -> Task:
    """The task of `--task`; by default, the suffix of `--data` determines it."""
    default = "multiple-choice" if str(settings.data).endswith(".json") else "text"
    if (settings.task or default) == "text":
        return language_modelling(settings, tokenizer)
    return multiple_choice(settings, tokenizer)


def _load(load: Callable[..., list[T]], settings: LlmSettings) -> tuple[list[T], list[T]]:
    """Training and held-out documents or questions."""
    examples = load(settings.data)
    if settings.eval_data is None:
        return text.hold_out(examples)
    return examples, load(settings.eval_data, "--eval-data")


def image_classification(train: images.Images, held_out: images.Images) -> Task:
    """Classification of labelled images."""

    def metrics(outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
        hits = outputs["prediction"] == held_out.labels
        return {"eval_loss": float(outputs["loss"].mean()), "eval_accuracy": float(hits.mean())}

    return Task(
        kind="images",
        description=(
            f"{len(train.labels)} training images of {len(train.classes)} classes, "
            f"{len(held_out.labels)} held out"
        ),
        train=images.examples_of(train),
        held_out=images.examples_of(held_out),
        unit="images",
        units=1,
        loss=images.classification_loss,
        outputs=images.classification,
        metrics=metrics,
        sentence=lambda m: (
            f"held-out accuracy {100 * m['eval_accuracy']:.1f} %, loss {m['eval_loss']:.4f}"
        ),
    )
