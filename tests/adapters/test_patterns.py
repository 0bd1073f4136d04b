"""Patterns of adapter_config.json: PEFT's meaning, and a bounded time."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loft_jax.adapters._patterns import check_cost, is_regex, lookup

MODULES = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(32) for part in "qkvo"]
CONFIG = Path("adapter_config.json")


@pytest.mark.parametrize(
    "key",
    [
        "q_proj",
        "model.layers.1.self_attn.q_proj",
        r"^model\.layers\.1\.self_attn\.q_proj",
        r"layers\.\d+\.self_attn\.q_proj",
        ".*q_proj$",
        r"layers\.[0-9]+\.self_attn\.(q_proj|v_proj)",
        r"model.layers.(?:1|2|3).self_attn.*",
        r"h\.\d{1,2}\.mlp",
    ],
)
def test_what_people_write_is_accepted(key):
    check_cost([key] * 4, MODULES, CONFIG)


@pytest.mark.parametrize(
    "key",
    [
        "(ab)+",  # each is harmless by itself, and of a kind that can take exponential time
        "(a|b)*",
        "(?:x){2}",
        "(?=a)b",
        r"(a)\1",
        "a**",
        "(?i:a)",
    ],
)
def test_repeated_groups_and_lookarounds_are_refused_by_name(key):
    with pytest.raises(ValueError, match="could take too long to match. Write the name"):
        check_cost([key], MODULES, CONFIG)


def test_all_keys_together_are_bounded():
    with pytest.raises(ValueError, match="adapter_config.json: matching the keys.*128 modules"):
        check_cost([".*a.*b.*c"], MODULES, CONFIG)
    names = [f"layers.{number}.up" for number in range(100_000)]
    with pytest.raises(ValueError, match="could take too long"):
        check_cost(names, names, CONFIG)


@settings(deadline=None, max_examples=300)
@given(key=st.text("ab.*+?|()[]{}\\1d^$", max_size=12), name=st.text("ab.1", max_size=12))
def test_any_key_is_refused_or_matched(key, name):
    if not is_regex(key):
        return
    try:
        check_cost([key], [name], CONFIG)
    except ValueError as error:
        assert "could take too long" in str(error)
    else:
        assert not re.search(r"\)[*+?{]", key)  # of a group, what can take exponential time
        assert lookup({key: 1}, name, 0) in (0, 1)


def test_the_first_match_in_the_order_of_the_file_counts():
    pattern = {"layers.1.*": 3, "q_proj": 2, r"^model\.layers\.2\.self_attn\.q_proj": 4}
    assert [lookup(pattern, name, 1) for name in (MODULES[0], MODULES[4], MODULES[8])] == [2, 3, 2]
    assert lookup(pattern, "q_proj.x", 1) == lookup(None, "q_proj", 1) == 1
    for key in pattern:
        for name in MODULES:
            peft = re.match(rf"(.*\.)?({key})$", name) is not None
            assert (lookup({key: 1}, name, 0) == 1) == peft
