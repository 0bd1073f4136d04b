"""Training tasks: text, instructions, multiple-choice questions, and image classification."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from tokenizers import Tokenizer

from . import batches
from .data import answers, chat, choices, forms, images, packing, sources, text
from .data.chat import TokenizerConfig
from .data.sources import Record
from .errors import UserError
from .figures import draw_accuracy, draw_perplexity
from .llm_settings import LlmSettings
from .training import Loss, Outputs

T = TypeVar("T")

HELD_OUT = "held out"
"""The name of the examples of `--eval-data`, or of those that are held out from `--data`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts to answer by generation."""

    ids: list[list[int]]
    references: list[str]
    """The right answers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Examples of `--test-data`, which are evaluated as the held-out ones are."""

    examples: Any
    metrics: Callable[[Any], dict[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Data, the loss to minimise, and the metrics to report."""

    kind: Literal["text", "instructions", "questions", "images"]
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
    prompts: Mapping[str, Prompts] = dataclasses.field(default_factory=dict)
    """Prompts to answer before and after training, by the name of their set."""
    tests: Mapping[str, EvaluationSet] = dataclasses.field(default_factory=dict)
    """Sets to evaluate before and after training, by name."""


Content = str | Sequence[Record]
"""What a file contains: plain text, or records."""


def language_modelling(settings: LlmSettings, tokenizer: Tokenizer, content: Content) -> Task:
    """Prediction of the next token in windows of text."""
    documents, evaluated = _split(text.documents, settings, content)
    length = settings.seq_len
    train = text.windows(tokenizer, documents, length, "training")
    held_out = text.windows(tokenizer, evaluated, length, "held-out")
    held_out = batches.spread(held_out, settings.eval_windows)

    def metrics(losses: np.ndarray) -> dict[str, float]:
        return _perplexity(float(losses.mean()))

    return Task(
        kind="text",
        description=f"{len(train)} training windows of {length} tokens, {len(held_out)} held out",
        train=train,
        held_out=held_out,
        units=length,
        loss=text.next_token_loss,
        outputs=text.next_token_loss,
        metrics=metrics,
        sentence=_perplexity_sentence,
        draw=draw_perplexity,
    )


def _perplexity(loss: float) -> dict[str, float]:
    return {"eval_loss": loss, "eval_perplexity": float(np.exp(loss))}


def _perplexity_sentence(m: Mapping[str, float]) -> str:
    return f"held-out loss {m['eval_loss']:.4f}, perplexity {m['eval_perplexity']:.2f}"


def instructions(
    settings: LlmSettings, tokenizer: Tokenizer, config: TokenizerConfig, content: Content
) -> Task:
    """Conversations, of which the answers are trained, in packed rows.

    Args:
        settings: of the run.
        tokenizer, config: the model's.
        content: of `--data`.
    """
    if settings.chat_template is not None:
        template = chat.read_template(Path(settings.chat_template))
        config = dataclasses.replace(config, template=template)
    train, held_out = _split(forms.examples, settings, content)
    places = batches.spread(np.arange(len(held_out)), settings.eval_questions)
    rows, description = _rows(settings, tokenizer, config, train, "training")
    worst = 100 * packing.worst_padding(rows, settings.batch_size, settings.seed)
    hint = " (a longer --seq-len has less)" if settings.packing and worst > 10 else ""
    evaluated = [held_out[place] for place in places]
    of_evaluated, _ = _rows(settings, tokenizer, config, evaluated, "held-out")

    def metrics(outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
        return _perplexity(float(outputs["nats"].sum() / outputs["weight"].sum()))

    return Task(
        kind="instructions",
        description=f"{description}, {worst:.1f} % in the worst step{hint}; "
        f"{len(evaluated)} held out",
        train=rows,
        held_out=of_evaluated,
        units=settings.seq_len,
        loss=packing.weighted_loss,
        outputs=packing.weighted_nats,
        metrics=metrics,
        sentence=_perplexity_sentence,
        draw=draw_perplexity,
        prompts=_prompts(settings, tokenizer, config, held_out),
    )


def _rows(
    settings: LlmSettings,
    tokenizer: Tokenizer,
    config: TokenizerConfig,
    examples: Sequence[forms.Example],
    name: str,
) -> tuple[dict[str, np.ndarray], str]:
    """The packed rows of examples, and their description."""
    length = settings.seq_len
    written = [one for example in examples for one in answers.write(example, config)]
    whole = answers.encode(tokenizer, written, settings.train_on)
    kept = answers.cut(whole, length + 1)
    if not kept:
        raise UserError(
            f"No {name} example has an answer within --seq-len {length}: use a larger --seq-len."
        )
    if settings.packing:
        lengths = [len(one.ids) - 1 for one in kept]
        places = packing.pack(lengths, length, settings.seed, repeat=name == "training")
    else:
        places = [[place] for place in range(len(kept))]
    rows = packing.arrange(kept, places, length)
    description = (
        f"{len(kept)} {name} examples in {len(places)} rows of {length} tokens, "
        f"{100 * packing.padding(rows):.1f} % padding"
    )
    if longer := sum(len(one.ids) > length + 1 for one in whole):
        description += f" ({longer} longer than --seq-len: cut, {len(whole) - len(kept)} left out)"
    return rows, description


def _prompts(
    settings: LlmSettings,
    tokenizer: Tokenizer,
    config: TokenizerConfig,
    held_out: Sequence[forms.Example],
) -> dict[str, Prompts]:
    """The prompts of the held-out examples for `--generate`, and those of `--test-data`."""
    sets = {HELD_OUT: held_out} if settings.generate else {}
    sets |= {name: forms.examples(content) for name, content in _test_data(settings).items()}
    found = {}
    for name, examples in sets.items():
        places = batches.spread(np.arange(len(examples)), settings.generate or len(examples))
        pairs = [answers.write_prompt(examples[place], config) for place in places]
        encoded = answers.encode(tokenizer, [text for text, _ in pairs], "all")
        references = [reference for _, reference in pairs]
        found[name] = Prompts(ids=[one.ids.tolist() for one in encoded], references=references)
    return found


def multiple_choice(settings: LlmSettings, tokenizer: Tokenizer, content: Content) -> Task:
    """Multiple-choice questions."""
    load = functools.partial(choices.questions, answers=settings.answers)
    questions, held_out = _split(load, settings, content)
    places = batches.spread(np.arange(len(held_out)), settings.eval_questions)
    held_out = [held_out[place] for place in places]
    train = choices.encode(tokenizer, questions, settings.seq_len, every=False)
    rows = choices.encode(tokenizer, held_out, settings.seq_len, every=True)
    tests = {}
    for name, records in _test_data(settings).items():
        examples = choices.encode(tokenizer, load(records), settings.seq_len, every=True)
        metrics = functools.partial(_choice_metrics, examples)
        tests[name] = EvaluationSet(examples=examples, metrics=metrics)

    return Task(
        kind="questions",
        description=f"{len(questions)} training questions, {len(held_out)} held out",
        train=train,
        held_out=rows,
        units=settings.seq_len,
        loss=choices.answer_loss,
        outputs=choices.answer_nats,
        metrics=functools.partial(_choice_metrics, rows),
        tests=tests,
        sentence=lambda m: (
            f"held-out accuracy {100 * m['eval_accuracy']:.1f} %, likelihood of the right answer "
            f"{m['eval_answer_likelihood']:.3f}, loss {m['eval_loss']:.4f}"
        ),
    )


def _choice_metrics(
    rows: dict[str, np.ndarray], outputs: Mapping[str, np.ndarray]
) -> dict[str, float]:
    accuracy, likelihood = choices.score(rows, outputs["nats"])
    return {
        "eval_loss": float(outputs["loss"][rows["right"]].mean()),
        "eval_accuracy": accuracy,
        "eval_answer_likelihood": likelihood,
    }


def _test_data(settings: LlmSettings) -> dict[str, Content]:
    """The contents of `--test-data`, by the name of the set."""
    found: dict[str, Content] = {}
    for source in settings.test_data:
        if (name := sources.set_name(source)) in (HELD_OUT, *found):
            raise UserError(f"--test-data has two sets of the name {name}: rename a file.")
        found[name] = sources.read(source, "--test-data")
    return found


def language_task(settings: LlmSettings, tokenizer: Tokenizer, config: TokenizerConfig) -> Task:
    """The task of `--task`; by default, the fields of the data determine it."""
    if settings.data is None:
        if settings.task not in (None, "text"):
            raise UserError(f"--task {settings.task} needs --data with a file or hub dataset.")
        content = text.wikipedia()
    else:
        content = sources.read(settings.data)
    task = settings.task or _task_of(content)
    if task != "instructions":
        _refuse_flags_of_answers(settings, task)
    if task == "text":
        return language_modelling(settings, tokenizer, content)
    if task == "multiple-choice":
        return multiple_choice(settings, tokenizer, content)
    return instructions(settings, tokenizer, config, content)


def _refuse_flags_of_answers(settings: LlmSettings, task: str) -> None:
    """Raises an error if a flag is given that has no effect on this task."""
    values = {
        "--generate": settings.generate,
        "--test-data": settings.test_data and task == "text",
        "--chat-template": settings.chat_template,
        "--train-on all": settings.train_on == "all",
        "--no-packing": not settings.packing,
    }
    if given := [flag for flag, value in values.items() if value]:
        raise UserError(
            f"{given[0]} is for --task instructions, but the task is {task}: remove the flag, or "
            "add --task instructions if the data have answers."
        )


def _task_of(content: Content) -> str:
    """The task that fits the first record."""
    if isinstance(content, str) or forms.is_document(content[0]):
        return "text"
    return "multiple-choice" if choices.is_question(content[0]) else "instructions"


def _split(
    load: Callable[[Content], list[T]], settings: LlmSettings, content: Content
) -> tuple[list[T], list[T]]:
    """Training and held-out documents, conversations or questions."""
    examples = load(content)
    if settings.eval_data is None:
        return text.hold_out(examples)
    return examples, load(sources.read(settings.eval_data, "--eval-data"))


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
