"""What a language model is trained for: the next token of a text, or the answers to questions."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import batches
import choices
import numpy as np
import text
from figure import draw_accuracy, draw_curve
from llm_settings import LlmSettings
from tokenizers import Tokenizer
from training import Loss, Outputs, next_token_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Data, what is minimised on it, and how success is measured and told."""

    what: Literal["text", "questions"]
    description: str
    train: Any
    """Examples, an array or a tree of arrays."""
    held_out: Any
    loss: Loss
    outputs: Outputs
    metrics: Callable[[Any], dict[str, float]]
    """From the outputs of all held-out examples: `eval_loss` and others, by their names in
    metrics.jsonl."""
    sentence: Callable[[Mapping[str, float]], str]
    """What is printed of the metrics."""
    draw: Callable[..., None]
    """(lines of metrics.jsonl, path, title): the learning curve."""


def language_modelling(settings: LlmSettings, tokenizer: Tokenizer) -> Task:
    """Next tokens of windows of text."""
    documents = text.load_documents(settings.data)
    if settings.eval_data is None:
        documents, held_out = text.hold_out(documents)
    else:
        held_out = text.load_documents(settings.eval_data)
    length = settings.seq_len
    train = text.windows(tokenizer, documents, length, "training")
    evaluate = text.windows(tokenizer, held_out, length, "held-out")
    evaluate = batches.spread(evaluate, settings.eval_windows)

    def metrics(losses: np.ndarray) -> dict[str, float]:
        loss = float(losses.mean())
        return {"eval_loss": loss, "eval_perplexity": float(np.exp(loss))}

    return Task(
        what="text",
        description=(
            f"{len(train)} windows of {length} tokens to train on, {len(evaluate)} held out"
        ),
        train=train,
        held_out=evaluate,
        loss=next_token_loss,
        outputs=next_token_loss,
        metrics=metrics,
        sentence=lambda m: (
            f"held-out loss {m['eval_loss']:.4f}, perplexity {m['eval_perplexity']:.2f}"
        ),
        draw=draw_curve,
    )


def multiple_choice(settings: LlmSettings, tokenizer: Tokenizer) -> Task:
    """Answers to questions, of which each has a few to choose from."""
    load = functools.partial(choices.load_questions, answers=settings.answers)
    questions = load(settings.data)
    if settings.eval_data is None:
        questions, held_out = text.hold_out(questions)
    else:
        held_out = load(settings.eval_data, "--eval-data")
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
        what="questions",
        description=f"{len(questions)} questions to train on, {len(held_out)} held out",
        train=train,
        held_out=rows,
        loss=choices.answer_loss,
        outputs=choices.answer_nats,
        metrics=metrics,
        sentence=lambda m: (
            f"held-out accuracy {100 * m['eval_accuracy']:.1f} %, likelihood of the right answer "
            f"{m['eval_answer_likelihood']:.3f}, loss {m['eval_loss']:.4f}"
        ),
        draw=draw_accuracy,
    )


def make_task(settings: LlmSettings, tokenizer: Tokenizer) -> Task:
    """The task that the settings name, or that the data's file name tells."""
    chosen = settings.task or (
        "multiple-choice" if choices.is_multiple_choice(settings.data) else "text"
    )
    make = multiple_choice if chosen == "multiple-choice" else language_modelling
    return make(settings, tokenizer)
