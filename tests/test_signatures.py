"""Optimizers take the arguments of their counterparts in Optax, in the same order."""

import inspect
import re

import optax
import pytest

import loft_jax
from loft_jax import baselines

COUNTERPARTS = {
    loft_jax.loft_adamw: optax.adamw,
    loft_jax.loft_muon: optax.contrib.muon,
    loft_jax.loft_sgd: optax.sgd,
    loft_jax.scale_by_loft_adam: optax.scale_by_adam,
    loft_jax.scale_by_loft_muon: optax.contrib.scale_by_muon,
    baselines.lora_plus: optax.adamw,
    baselines.scaled_adamw: optax.adamw,
    baselines.scaled_sgd: optax.sgd,
    baselines.lora_fa: optax.adamw,
    baselines.altlora: optax.adam,
    baselines.altlora_plus: optax.adam,
    baselines.lora_pro: optax.adam,
    baselines.lora_rite: optax.adam,
    baselines.scale_by_altlora: optax.scale_by_adam,
    baselines.scale_by_lora_pro: optax.scale_by_adam,
    baselines.scale_by_lora_rite: optax.scale_by_adam,
}
every_counterpart = pytest.mark.parametrize(
    ("ours", "theirs"), COUNTERPARTS.items(), ids=lambda function: function.__name__
)


def parameters_of(function):
    return inspect.signature(function).parameters


@every_counterpart
def test_positional_arguments_are_those_of_optax(ours, theirs):
    positional = lambda function: [
        name for name, x in parameters_of(function).items() if x.kind is x.POSITIONAL_OR_KEYWORD
    ]
    names = positional(ours)
    assert names == positional(theirs)[: len(names)]


@every_counterpart
def test_other_defaults_than_optax_are_documented(ours, theirs):
    """The docstring, or that of the function to which it refers, names Optax's default."""
    texts = [inspect.getdoc(ours)]
    texts += [
        inspect.getdoc(getattr(loft_jax, name, None) or getattr(baselines, name, None))
        for name in set(re.findall(r"`(scale_by_\w+)`", texts[0]))
    ]
    text = " ".join(text.split("Example:")[0] for text in texts if text)
    numbers = {float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", text)}
    defaults = parameters_of(theirs)
    for name, x in parameters_of(ours).items():
        if name in defaults and x.default != (default := defaults[name].default):
            stated = default in numbers if isinstance(default, float) else str(default) in text
            assert re.search(rf"\b{name}\b", text) and stated, (name, default)
