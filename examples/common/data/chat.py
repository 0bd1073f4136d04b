"""Chat templates: how a model expects conversations to be written.

A template is a Jinja program that comes with the model. It is rendered in Jinja's sandbox with the
options and functions that Hugging Face transformers gives to templates, and the result is the same
text (compared in the tests).
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import UserError
from .forms import Messages

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """What a model says about its tokens beside the tokenizer itself."""

    template: str | None = None
    """The chat template; None for a model that has none."""
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The special tokens by name: bos_token, eos_token, ..."""
    stop: tuple[str, ...] = ()
    """The tokens that end a generated text."""


def read_tokenizer_config(folder: Path, tokenizer: Tokenizer) -> TokenizerConfig:
    """Reads chat_template.jinja, tokenizer_config.json and generation_config.json, where present.

    Args:
        folder: of the model.
        tokenizer: the model's; it names the ids in generation_config.json.
    """
    config = _read_optional(folder / "tokenizer_config.json")
    special = {}
    for name in _SPECIAL:
        token = config.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            special[name] = token
    stop = [special["eos_token"]] if "eos_token" in special else []
    ids = _read_optional(folder / "generation_config.json").get("eos_token_id", [])
    for index in ids if isinstance(ids, list) else [ids]:
        token = tokenizer.id_to_token(index) if isinstance(index, int) else None
        if token is not None:
            stop.append(token)
    return TokenizerConfig(_read_template(folder, config), special, tuple(dict.fromkeys(stop)))


def render(
    config: TokenizerConfig, messages: Messages, *, ask: bool = False, tools: Any = None
) -> str:
    """The text of a conversation, as transformers' `apply_chat_template` renders it.

    Args:
        config: with a template.
        messages: with role and content.
        ask: whether to end with the beginning of an answer (`add_generation_prompt`).
        tools: descriptions of the tools that an assistant can call, if any.

    Raises:
        UserError: the template cannot be parsed, or it rejects the messages.

    Example:
        >>> config = TokenizerConfig("{{ messages[0].role }}: {{ messages[0].content }}")
        >>> render(config, ({"role": "user", "content": "Hi"},))
        'user: Hi'
    """
    if config.template is None:
        raise ValueError("the model has no chat template")
    template = _compiled(config.template)
    try:
        return template.render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=ask,
            tools=tools,
            documents=None,
            **config.special,
        )
    except Exception as error:  # a template can fail as any program can
        raise UserError(
            f"the chat template rejects the messages ({error}). Change the messages, or pass "
            "another --chat-template."
        ) from error


@functools.cache
def _compiled(template: str) -> Any:
    """The Jinja template, with the functions that templates of models use."""
    try:
        from jinja2 import TemplateError, TemplateSyntaxError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UserError("A chat template needs Jinja: pip install jinja2.") from error

    class Generation(Extension):
        """{% generation %} marks answers for transformers; here it renders its content."""

        tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, **given: Any) -> str:
        # Jinja's own filter escapes for HTML.
        options: dict[str, Any] = {"ensure_ascii": False} | given
        return json.dumps(value, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise UserError(
            f"The chat template is not valid Jinja, line {error.lineno}: {error}. Pass another "
            "--chat-template."
        ) from error


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The folder's default template; a file of its own has precedence."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_template(file)
    template = config.get("chat_template")
    if isinstance(template, Sequence) and not isinstance(template, str):
        # Several templates by name.
        named = {one.get("name"): one.get("template") for one in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def read_template(path: Path) -> str:
    """Reads a file with a chat template."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the chat template {path} ({error}).") from error


def _read_optional(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path} ({error}): fetch it again.") from error
    return content if isinstance(content, dict) else {}
