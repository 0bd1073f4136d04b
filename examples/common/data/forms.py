"""The forms of instruction data: what the fields of a record mean.

| fields | form |
|---|---|
| `messages`: a list of `role`, `content` | chat |
| `conversations`: a list of `from`, `value` | chat as ShareGPT writes it |
| `prompt`, `completion` (or `response`) | a text and its continuation, or two lists of messages |
| `instruction`, `output` (or `response`), optional `input` (or `context`) | as Alpaca writes it |
| `question` (or `query`), `answer` | as GSM8K writes it |
| `text` | a document |
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError
from .sources import Record

Messages = tuple[Mapping[str, Any], ...]
"""Chat messages, each with `role` and `content`."""

FORMS = (
    "messages (role, content)",
    "conversations (from, value)",
    "prompt and completion",
    "instruction, input and output",
    "question and answer",
    "text",
)
"""The forms, for error messages."""

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""ShareGPT's names of the speakers, and those of chat templates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A conversation to train on; at least one of `messages` and `plain` is given.

    A model that has a chat template gets the messages. A model without one gets the plain form.
    """

    where: str
    messages: Messages | None = None
    plain: tuple[str, str] | None = None
    """A prompt and its completion."""
    tools: Any = None
    """Descriptions of the tools that an assistant can call, for the chat template."""


def is_document(record: Record) -> bool:
    """Whether a record has a `text` and none of the other forms."""
    return _form(record) == "text"


def document(record: Record) -> str:
    """The text of a record that is a document."""
    if not is_document(record):
        raise UserError(
            f"{record.where}: expected the field text, found {_names(record)}. Use --task "
            "instructions, or give all records the same form."
        )
    return _string(record, "text")


def example(record: Record) -> Example:
    """The conversation in a record.

    Raises:
        UserError: it has none of the forms, or a field has an unexpected type.
    """
    form = _form(record)
    if form == "text":
        raise UserError(
            f"{record.where}: expected instructions and answers, found {_names(record)}. Use "
            "--task text, or give all records the same form."
        )
    return _READERS[form](record)


def examples(content: str | Sequence[Record]) -> list[Example]:
    """The conversations in the records of a file or hub dataset."""
    if isinstance(content, str):
        raise UserError(
            "--task instructions needs records with named fields, but the data are plain text. "
            f"Known forms: {'; '.join(FORMS)}."
        )
    return [example(record) for record in content]


def _form(record: Record) -> str:
    """The name of the record's form, from the fields that are present and not null."""
    has = lambda *names: any(record.fields.get(name) is not None for name in names)
    if has("messages"):
        return "messages"
    if has("conversations"):
        return "conversations"
    if has("prompt") and has("completion", "response"):
        return "completion"
    if has("instruction") and has("output", "response"):
        return "instruction"
    if has("question", "query") and has("answer"):
        return "question"
    if has("text"):
        return "text"
    raise UserError(
        f"{record.where}: the fields {_names(record)} are none of the known forms: "
        f"{'; '.join(FORMS)}."
    )


def _messages(record: Record) -> Example:
    return Example(
        where=record.where,
        messages=_checked(record, record.fields["messages"]),
        tools=record.fields.get("tools"),
    )


def _conversations(record: Record) -> Example:
    turns = record.fields["conversations"]
    if not isinstance(turns, Sequence) or not all(
        isinstance(turn, Mapping) and {"from", "value"} <= turn.keys() for turn in turns
    ):
        # Some collections use this name for messages with role and content.
        return Example(where=record.where, messages=_checked(record, turns))
    if unknown := [turn["from"] for turn in turns if turn["from"] not in _ROLES]:
        raise UserError(
            f"{record.where}: conversations has the unknown speaker {unknown[0]!r}: use "
            f"{', '.join(_ROLES)}."
        )
    messages = [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
    return Example(where=record.where, messages=_checked(record, messages))


def _completion(record: Record) -> Example:
    prompt = record.fields["prompt"]
    completion = record.fields.get("completion")
    completion = record.fields.get("response") if completion is None else completion
    if isinstance(prompt, str) and isinstance(completion, str):
        return Example(where=record.where, plain=(prompt, completion))
    if isinstance(prompt, Sequence) and isinstance(completion, Sequence):
        messages = _checked(record, [*prompt, *completion])
        return Example(where=record.where, messages=messages, tools=record.fields.get("tools"))
    raise UserError(
        f"{record.where}: expected prompt and completion to be two strings or two lists of "
        f"messages, found {type(prompt).__name__} and {type(completion).__name__}."
    )


def _instruction(record: Record) -> Example:
    instruction = _string(record, "instruction")
    given = _string(record, "input", "context", default="")
    output = _string(record, "output", "response")
    asked = f"{instruction}\n\n{given}" if given else instruction
    section = f"### Input:\n{given}\n\n" if given else ""
    return Example(
        where=record.where,
        messages=_exchange(asked, output),
        plain=(f"### Instruction:\n{instruction}\n\n{section}### Response:\n", output),
    )


def _question(record: Record) -> Example:
    question, answer = _string(record, "question", "query"), _string(record, "answer")
    return Example(
        where=record.where,
        messages=_exchange(question, answer),
        # The space belongs to the answer, because tokens begin with spaces.
        plain=(f"Question: {question}\nAnswer:", f" {answer}"),
    )


def _exchange(asked: str, answer: str) -> Messages:
    return ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})


def _string(record: Record, *names: str, default: str | None = None) -> str:
    """The first of the named fields that is present, which must be a string."""
    for name in names:
        value = record.fields.get(name)
        if isinstance(value, str):
            return value
        if value is not None:
            raise UserError(
                f"{record.where}: the field {name} is a {type(value).__name__}: make it a string."
            )
    assert default is not None  # `_form` has checked that the others are present
    return default


def _checked(record: Record, messages: Any) -> Messages:
    """The messages, whose text may be in parts; raises an error if one is malformed."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise UserError(f"{record.where}: expected a list of messages, found {messages!r:.80}.")
    checked = []
    for number, message in enumerate(messages):
        where = f"{record.where}, message {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"{where}: expected role and content, found {message!r:.80}.")
        # Parquet stores absent keys of nested records as None.
        message = {key: value for key, value in message.items() if value is not None}
        content = message.get("content", "" if "tool_calls" in message else None)
        if isinstance(content, Sequence) and not isinstance(content, str):
            content = _joined(where, content)
        if not isinstance(content, str):
            raise UserError(f"{where}: its content is not a string but {content!r:.80}.")
        checked.append({**message, "content": content})
    if not any(message["role"] == "assistant" for message in checked):
        raise UserError(
            f"{record.where}: no message has the role assistant, so there is no answer to train "
            "on. Remove the record."
        )
    return tuple(checked)


def _joined(where: str, parts: Sequence[Any]) -> str:
    """The text of content in parts, [{"type": "text", "text": ...}, ...]."""
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise UserError(
                f"{where}: its content has a part that is not text ({part!r:.80}): remove it, the "
                "models here read text only."
            )
    return "".join(part["text"] for part in parts)


def _names(record: Record) -> str:
    return ", ".join(sorted(map(str, record.fields))) or "(none)"


_READERS = {
    "messages": _messages,
    "conversations": _conversations,
    "completion": _completion,
    "instruction": _instruction,
    "question": _question,
}
