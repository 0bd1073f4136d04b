"""Conversations as tokens, with a mask of the tokens to train on: the answers, or all.

The mask is exact. A token belongs to an answer if it ends inside the answer's characters. Where a
token would lie across the border of a prompt and its answer, the two are tokenized separately, as
they are when the model generates the answer.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from tokenizers import Encoding, Tokenizer

from ..errors import UserError
from .chat import TokenizerConfig, render
from .forms import Example

TrainOn = Literal["answers", "all"]

Span = tuple[int, int]
"""The first character, and the one after the last."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A conversation as a model reads it."""

    text: str
    answers: tuple[Span, ...]
    is_template: bool
    """Whether a chat template wrote the text; then it contains its special tokens."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A tokenized conversation."""

    ids: np.ndarray
    """int32 `(n,)`."""
    trained: np.ndarray
    """bool `(n,)`: the tokens whose prediction is trained."""


def write(example: Example, config: TokenizerConfig) -> list[Text]:
    """An example as text, usually one.

    A chat template may write an answer in another way when more messages follow; Qwen3's removes
    its reasoning. There is then one text for each answer, as the model sees it when it answers.

    Raises:
        UserError: the model has no chat template and the example has only messages, or the
            template rejects the messages.
    """
    if example.messages is not None and config.template is not None:
        try:
            return _write_messages(example, config)
        except UserError as error:
            raise UserError(f"{example.where}: {error}") from error
    prompt, completion = _plain(example)
    text = prompt + completion + config.special.get("eos_token", "")
    return [Text(text, ((len(prompt), len(text)),), is_template=False)]


def write_prompt(example: Example, config: TokenizerConfig) -> tuple[Text, str]:
    """The text before the last answer, and that answer."""
    if example.messages is None or config.template is None:
        prompt, completion = _plain(example)
        return Text(prompt, (), is_template=False), completion.strip()
    last = _answers(example)[-1]
    try:
        text = render(config, example.messages[:last], ask=True, tools=example.tools)
    except UserError as error:
        raise UserError(f"{example.where}: {error}") from error
    return Text(text, (), is_template=True), example.messages[last]["content"].strip()


def _plain(example: Example) -> tuple[str, str]:
    if example.plain is None:
        raise UserError(
            f"{example.where}: messages need a chat template, and the model has none: pass "
            "--chat-template with a Jinja file, or choose an instruction-tuned --model."
        )
    return example.plain


def _answers(example: Example) -> list[int]:
    """The places of the answers among the messages."""
    messages = example.messages or ()
    return [place for place, message in enumerate(messages) if message["role"] == "assistant"]


def _write_messages(example: Example, config: TokenizerConfig) -> list[Text]:
    assert example.messages is not None
    texts = []
    for place in _answers(example):
        prompt = render(config, example.messages[:place], ask=True, tools=example.tools)
        text = render(config, example.messages[: place + 1], tools=example.tools)
        if not text.startswith(prompt):
            raise UserError(
                "the chat template does not continue its prompt "
                f"({prompt[-40:]!r}) when it adds the answer, so the answer's tokens cannot be "
                "found: pass another --chat-template."
            )
        texts.append(Text(text, ((len(prompt), len(text)),), is_template=True))
    last = texts[-1]
    if all(last.text.startswith(one.text) for one in texts):
        spans = tuple(span for one in texts for span in one.answers)
        return [Text(last.text, spans, is_template=True)]
    return texts


def encode(tokenizer: Tokenizer, texts: Sequence[Text], train_on: TrainOn) -> list[Tokens]:
    """Tokenizes texts and marks the tokens to train on.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> tokenizer = Tokenizer(models.WordLevel({"2+2?": 0, "4": 1}))
        >>> tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> encode(tokenizer, [Text("2+2? 4", ((5, 6),), False)], "answers")[0].trained
        array([False,  True])
    """
    encodings = {}
    for template in (False, True):
        # Chat templates contain the special tokens that the tokenizer would add.
        chosen = [text.text for text in texts if text.is_template == template]
        encodings[template] = iter(tokenizer.encode_batch(chosen, add_special_tokens=not template))
    return [_tokens(tokenizer, text, next(encodings[text.is_template]), train_on) for text in texts]


def _tokens(tokenizer: Tokenizer, text: Text, encoding: Encoding, train_on: TrainOn) -> Tokens:
    if train_on == "all":
        ids = np.array(encoding.ids, np.int32)
        return Tokens(ids, np.ones(len(ids), bool))
    # Only the ends are compared, because byte-level tokenizers drop the space before a token from
    # its beginning.
    ends = [end for _, end in encoding.offsets]
    borders = sorted({border for span in text.answers for border in span})
    if {0, *ends}.issuperset(borders):
        trained = np.zeros(len(ends), bool)
        for first, last in text.answers:
            trained |= (np.array(ends) > first) & (np.array(ends) <= last)
        return Tokens(np.array(encoding.ids, np.int32), trained)
    ids, trained = [], []
    borders = [0, *(border for border in borders if 0 < border < len(text.text)), len(text.text)]
    for first, last in itertools.pairwise(borders):
        special = first == 0 and not text.is_template
        part = tokenizer.encode(text.text[first:last], add_special_tokens=special).ids
        ids += part
        trained += [any(a <= first < b for a, b in text.answers)] * len(part)
    return Tokens(np.array(ids, np.int32), np.array(trained, bool))


def cut(tokens: Sequence[Tokens], length: int) -> list[Tokens]:
    """The first `length` tokens of each, without those in which no prediction is trained."""
    shorter = [Tokens(one.ids[:length], one.trained[:length]) for one in tokens]
    return [one for one in shorter if one.trained[1:].any()]
