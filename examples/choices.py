"""Multiple-choice questions for a language model: prompts, answers, and what it holds likeliest.

A model is trained on the answer's tokens after the prompt, and answers a question with the choice
whose tokens it finds likeliest there.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from errors import UserError
from tokenizers import Tokenizer

Answers = Literal["labels", "words"]
"""What a model answers with: "the correct answer is answer2", or the words of answer 2."""

KEYS = ("instruction", "input", "output", "answer")


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, the text that may follow it for each choice, and which one is right."""

    prompt: str
    choices: tuple[str, ...]
    right: int


def is_multiple_choice(source: str | None) -> bool:
    """Whether a --data is a file of questions, by its name."""
    return source is not None and Path(source).suffix == ".json"


def load_questions(
    source: str | None, flag: str = "--data", *, answers: Answers = "labels"
) -> list[Question]:
    """Questions of a JSON file: a list of objects with instruction, input, output and answer.

    The choices are read off the instruction's "Answer format: answer1/answer2/...", as in the
    commonsense data of LLM-Adapters. With labels the prompt is the instruction, and what may follow
    is the output with each choice in the answer's place. With words the prompt is the bare
    question, and what may follow is what the instruction says after each "Answer1: ".
    """
    if source is None:
        raise UserError(f"--task multiple-choice needs {flag} with a JSON file of questions.")
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{flag} {source}: there is no such file.")
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path} ({error}): a JSON list is expected.") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} holds no list of questions.")
    return [_question(path, number, row, answers) for number, row in enumerate(rows)]


def _question(path: Path, number: int, row: Any, answers: Answers) -> Question:
    where = f"{path}, question {number}"
    if not isinstance(row, dict) or any(not isinstance(row.get(key), str) for key in KEYS):
        raise UserError(f"{where}: an object with the texts {', '.join(KEYS)} is expected.")
    found = re.search(r"Answer format: (\S+/\S+)\s*$", row["instruction"])
    if found is None:
        raise UserError(
            f'{where}: its instruction does not end with "Answer format: ...", the choices '
            "divided by /."
        )
    labels = tuple(dict.fromkeys(found[1].split("/")))
    # Some questions have one more choice than their format says.
    labels += () if row["answer"] in labels else (row["answer"],)
    right = labels.index(row["answer"])
    if answers == "words":
        words = _words(row["instruction"][: found.start()], labels)
        if words is None:
            raise UserError(
                f"{where}: its instruction does not say what its answers are, as in "
                f'"{labels[0].capitalize()}: the first". Leave out --answers words to choose among '
                "their labels."
            )
        asked, said = words
        return Question(f"Question: {asked}\nAnswer:", tuple(f" {one}" for one in said), right)
    if row["answer"] not in row["output"]:
        raise UserError(f"{where}: its output does not contain its answer {row['answer']!r}.")
    parts = (row["instruction"], row["input"])
    prompt = "\n".join(part for part in parts if part) + "\n\n"
    choices = tuple(row["output"].replace(row["answer"], label) for label in labels)
    return Question(prompt, choices, right)


def _words(text: str, labels: Sequence[str]) -> tuple[str, list[str]] | None:
    """The question, and what stands after each label, in order; None if one is missing."""
    asked, *said = re.split("|".join(rf"\b{label.capitalize()}: " for label in labels), text)
    said = [one.strip() for one in said]
    # "Please choose the correct answer to the question: ..."
    asked = re.sub(r"^Please choose [^:]*: ", "", asked).strip()
    return (asked, said) if len(said) == len(labels) and all(said) and asked else None


def encode(
    tokenizer: Tokenizer, questions: Sequence[Question], length: int, *, every: bool
) -> dict[str, np.ndarray]:
    """Rows of tokens, a prompt and one of its choices each.

    Args:
        tokenizer: the model's.
        questions: at least one.
        length: predictions of a row. A longer prompt loses its beginning, a shorter row is filled
            up behind the answer, where a causal model cannot see it.
        every: whether there is a row for every choice, or for the right one alone.

    Returns:
        `tokens`, int32 `(rows, length + 1)`; `answer`, bool `(rows, length)`, which predictions are
        of the answer; `question`, int32 `(rows,)`, and `right`, bool `(rows,)`, whose choice it is.
    """
    tokens, answer, question, right = [], [], [], []
    for number, one in enumerate(questions):
        prompt = tokenizer.encode(one.prompt, add_special_tokens=False).ids
        chosen = range(len(one.choices)) if every else (one.right,)
        for choice in chosen:
            said = tokenizer.encode(one.choices[choice], add_special_tokens=False).ids
            if len(said) > length:
                raise UserError(
                    f"An answer has {len(said)} tokens, more than --seq-len {length}: name a "
                    "larger one."
                )
            kept = prompt[-(length + 1 - len(said)) :]
            row = np.zeros(length + 1, np.int32)
            row[: len(kept) + len(said)] = [*kept, *said]
            mask = np.zeros(length + 1, bool)
            mask[len(kept) : len(kept) + len(said)] = True
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


def answer_loss(model: Any, batch: Any) -> jax.Array:
    """Mean nats a token of each row's answer, float32 `(batch,)`."""
    return _nats(model, batch) / batch["answer"].sum(axis=-1)


def answer_nats(model: Any, batch: Any) -> dict[str, jax.Array]:
    """Of each row's answer, the nats and the nats a token, float32 `(batch,)` both."""
    nats = _nats(model, batch)
    return {"nats": nats, "loss": nats / batch["answer"].sum(axis=-1)}


def _nats(model: Any, batch: Any) -> jax.Array:
    tokens = batch["tokens"]
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.where(batch["answer"], losses, 0).sum(axis=-1)


def score(rows: dict[str, np.ndarray], nats: np.ndarray) -> tuple[float, float]:
    """Accuracy, and the mean likelihood of the right choice among a question's choices.

    Args:
        rows: of `encode`, with every choice.
        nats: of each row's answer, float `(rows,)`.
    """
    hits, likelihoods = [], []
    for number in np.unique(rows["question"]):
        of_question = rows["question"] == number
        likelihood = np.exp(nats[of_question].min() - nats[of_question].astype(np.float64))
        right = rows["right"][of_question]
        hits.append(bool(right[likelihood.argmax()]))
        likelihoods.append(float(likelihood[right][0] / likelihood.sum()))
    return float(np.mean(hits)), float(np.mean(likelihoods))
