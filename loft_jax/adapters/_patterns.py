"""Looks up values by the patterns of adapter_config.json, in bounded time.

A key is a regular expression that matches the end of a module's name, after a dot or from the
start, as ``get_pattern_key`` of PEFT reads it. The first key that matches counts. Keys may come
from a stranger's file, and some expressions take exponential time in Python's `re`. Only keys whose
time has a small bound are matched.
"""

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

# A step of the matcher takes about 10 ns.
MAX_STEPS = 50_000_000

# What a key may consist of: characters and classes, perhaps repeated, and groups of alternatives.
_ATOM = r"(?:\\[dws.-]|\[\^?[\w.\\-]+\]|[\w.:,/ -])"
_REPEAT = r"(?:[*+?]\??|\{\d{1,3}(?:,\d{0,3})?\}\??)"
_TOKEN = re.compile(
    rf"(?P<repeated>{_ATOM}{_REPEAT})|{_ATOM}|(?P<open>\((?:\?:)?)|(?P<bar>\|)|[)^$]"
)


def lookup(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Returns the value of the first key, in file order, that matches the end of the name.

    Example:
      >>> lookup({"layers.1.q": 2, "q": 3}, "model.layers.1.q", default=4)
      2
    """
    entries = (pattern or {}).items()
    return next((v for key, v in entries if re.fullmatch(rf"(.*\.)?({key})", module)), default)


def is_regex(key: str) -> bool:
    """Returns whether a key is a valid regular expression.

    Example:
      >>> is_regex("q_proj"), is_regex("(")
      (True, False)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of expressions whose meaning will change
        try:
            re.compile(rf"(.*\.)?({key})")
        except (re.error, OverflowError, RecursionError, FutureWarning):
            return False
    return True


def check_cost(keys: Collection[str], modules: Collection[str], path: Path) -> None:
    """Refuses keys that could take long to match.

    Args:
      keys: the regular expressions.
      modules: the names to match them with.
      path: of the file, for the message.

    Raises:
      ValueError: a key has nested repetitions or another construct whose time has no small bound,
        or all keys together could take longer than about a second. The message names the key.

    Example:
      >>> check_cost(["layers.1.q_proj", ".*v_proj"], ["model.layers.1.q_proj"], Path("config"))
    """
    longest = max((len(module) for module in modules), default=0)
    steps = 0
    for key in keys:
        steps += len(modules) * _steps(key, longest, path)
        if steps > MAX_STEPS:
            raise ValueError(
                f"{path}: matching the keys of rank_pattern and alpha_pattern with "
                f"{len(modules)} modules could take too long, at the latest from {key[:80]!r} on. "
                "Write names of modules there instead of regular expressions"
            )


def _steps(key: str, longest: int, path: Path) -> int:
    """Returns a bound of the steps to match a key with a name, by counting the choices."""
    choices, position = longest, 0  # where the name's prefix ends
    while position < len(key):
        token = _TOKEN.match(key, position)
        after = position if token is None else token.end()
        # A repeated group, or a construct that is not in the list, may take exponential time.
        if token is None or (token[0] == ")" and re.match(_REPEAT, key[after:])):
            raise ValueError(
                f"{path}: {key[:80]!r} in rank_pattern or alpha_pattern could take too long to "
                "match. Write the name of a module instead of a regular expression"
            )
        if token["repeated"]:
            choices *= longest
        elif token["bar"]:
            choices *= 2
        position = after
        if choices > MAX_STEPS:
            break
    return max(choices, 1)
