"""Multiple-choice questions for a language model: prompts, answers, loss and accuracy.

Training minimises the loss of the answer's tokens after the prompt. The model's answer to a
question is the choice whose tokens have the highest likelihood.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from ..errors import UserError
from . import sources
from .sources import Record
from .text import token_losses

Answers = Literal["labels", "words"]
"""The answer format: "the correct answer is answer2", or the words of answer 2."""

KEYS = ("instruction", "input", "output", "answer")

_FORMAT = r"Answer format: (\S+/\S+)\s*$"


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, its possible continuations, and the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    right: int


def load_questions(
    source: str | None, flag: str = "--data", *, answers: Answers = "labels"
) -> list[Question]:
    """The `questions` of a file or a hub dataset."""
    if source is None:
        raise UserError(f"--task multiple-choice needs {flag} with a file of questions.")
    return questions(sources.read(source, flag), answers)


def questions(content: str | Sequence[Record], answers: Answers = "labels") -> list[Question]:
    """The questions in records with instruction, input, output and answer.

    The instruction ends with the choices, "Answer format: answer1/answer2/...", as in the
    commonsense data of LLM-Adapters. With `answers="labels"` the prompt is the instruction, and a
    choice is the output with the answer replaced. With `answers="words"` the prompt is the
    question alone, and a choice is the text that follows "Answer1: " in the instruction.
    """
    if isinstance(content, str):
        raise UserError(
            "--task multiple-choice needs records with the fields "
            f"{', '.join(KEYS)}, but --data is plain text. Remove --task."
        )
    return [_question(record, answers) for record in content]


def is_question(record: Record) -> bool:
    """Whether a record has the fields of a multiple-choice question."""
    instruction = record.fields.get("instruction")
    return all(name in record.fields for name in KEYS) and bool(
        isinstance(instruction, str) and re.search(_FORMAT, instruction)
    )


def _question(record: Record, answers: Answers) -> Question:
    where, row = record.where, record.fields
    if any(not isinstance(row.get(key), str) for key in KEYS):
        raise UserError(f"{where}: expected an object with the strings {', '.join(KEYS)}.")
    found = re.search(_FORMAT, row["instruction"])
    if found is None:
        raise UserError(
            f'{where}: its instruction does not end with "Answer format: ..." and the choices, '
            "separated by /."
        )
    labels = tuple(dict.fromkeys(found[1].split("/")))
    # Some questions have one more choice than their format lists.
    labels += () if row["answer"] in labels else (row["answer"],)
    right = labels.index(row["answer"])
    if answers == "words":
        words = _words(row["instruction"][: found.start()], labels)
        if words is None:
            raise UserError(
                f"{where}: its instruction does not spell out the answers, as in "
                f'"{labels[0].capitalize()}: the first". Remove --answers words to train on the '
                "labels."
            )
        asked, texts = words
        return Question(f"Question: {asked}\nAnswer:", tuple(f" {one}" for one in texts), right)
    if row["answer"] not in row["output"]:
        raise UserError(f"{where}: its output does not contain its answer {row['answer']!r}.")
    parts = (row["instruction"], row["input"])
    prompt = "\n".join(part for part in parts if part) + "\n\n"
    choices = tuple(row["output"].replace(row["answer"], label) for label in labels)
    return Question(prompt, choices, right)


def _words(text: str, labels: Sequence[str]) -> tuple[str, list[str]] | None:
    """The question and the text after each label, in order; None if one is missing."""
    asked, *words = re.split("|".join(rf"\b{label.capitalize()}: " for label in labels), text)
    words = [one.strip() for one in words]
    # "Please choose the correct answer to the question: ..."
    asked = re.sub(r"^Please choose [^:]*: ", "", asked).strip()
    return (asked, words) if len(words) == len(labels) and all(words) and asked else None


def encode(
    tokenizer: Tokenizer, questions: Sequence[Question], length: int, *, every: bool
) -> dict[str, np.ndarray]:
    """Encodes each question as rows of tokens: the prompt followed by a choice.

    Args:
        tokenizer: the model's tokenizer.
        questions: at least one.
        length: predictions per row. A longer prompt loses its beginning. A shorter row is padded
            after the answer, where a causal model ignores the padding.
        every: whether to encode every choice or only the right one.

    Returns:
        `tokens`, int32 `(rows, length + 1)`; `answer`, bool `(rows, length)`, the mask of the
        answer's predictions; `question`, int32 `(rows,)`, the index of the row's question; and
        `right`, bool `(rows,)`, whether the row's choice is right.
    """
    tokens, answer, question, right = [], [], [], []
    for number, one in enumerate(questions):
        prompt = tokenizer.encode(one.prompt, add_special_tokens=False).ids
        chosen = range(len(one.choices)) if every else (one.right,)
        for choice in chosen:
            ids = tokenizer.encode(one.choices[choice], add_special_tokens=False).ids
            if len(ids) > length:
                raise UserError(
                    f"An answer has {len(ids)} tokens, more than --seq-len {length}: use a "
                    "larger --seq-len."
                )
            kept = prompt[-(length + 1 - len(ids)) :]
            row = np.zeros(length + 1, np.int32)
            row[: len(kept) + len(ids)] = [*kept, *ids]
            mask = np.zeros(length + 1, bool)
            mask[len(kept) : len(kept) + len(ids)] = True
            tokens.append(row)
            answer.append(mask[1:])
            question.append(number)
            right.append(choice == one.right)
    return {
        "tokens": np.stack(tokens),
        "answer": np.stack(answer),
        "question": np.array(question, np.int32),
        "right": np.array(right),
    }


def answer_nats(model: Any, batch: Any) -> dict[str, jax.Array]:
    """The answer's loss in nats and per token: `nats` and `loss`, float32 `(batch,)` both."""
    losses = jnp.where(batch["answer"], token_losses(model, batch["tokens"]), 0).sum(axis=-1)
    return {"nats": losses, "loss": losses / batch["answer"].sum(axis=-1)}


def answer_loss(model: Any, batch: Any) -> jax.Array:
    """The answer's loss per token, float32 `(batch,)`."""
    return answer_nats(model, batch)["loss"]


def score(rows: dict[str, np.ndarray], nats: np.ndarray) -> tuple[float, float]:
    """Accuracy, and the mean likelihood of the right choice relative to all of its question.

    Args:
        rows: the result of `encode` with `every=True`.
        nats: the loss of each row's answer in nats, float `(rows,)`.
    """
    hits, likelihoods = [], []
    for number in np.unique(rows["question"]):
        of_question = rows["question"] == number
        likelihood = np.exp(nats[of_question].min() - nats[of_question].astype(np.float64))
        right = rows["right"][of_question]
        hits.append(bool(right[likelihood.argmax()]))
        likelihoods.append(float(likelihood[right][0] / likelihood.sum()))
    return float(np.mean(hits)), float(np.mean(likelihoods))
