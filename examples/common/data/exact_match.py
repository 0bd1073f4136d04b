"""Exact match of generated answers, as GSM8K and similar benchmarks measure it."""

import re
from collections.abc import Sequence

MARK = "####"
"""GSM8K writes the final answer after this mark."""

_LABELLED = re.compile(
    r"the correct answer is (true|false|(?:solution|answer|ending|option)\d+)\.?"
)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def final_answer(text: str) -> str:
    """The line after the last ####, or the whole text if it has none, in a normal form.

    Example:
        >>> final_answer("3 + 4 = 7\\n#### 7")
        '7'
        >>> final_answer(" The correct answer  is answer2. ")
        'the correct answer is answer2'
    """
    if MARK in text:
        text = (text.rsplit(MARK, 1)[1].strip().splitlines() or [""])[0]
        if number := _NUMBER.match(text.lstrip("$ ")):
            return _normal(number[0])  # without its unit
    text = " ".join(text.lower().split()).rstrip(".")
    return _normal(text) if _NUMBER.fullmatch(text) else text


def last_number(text: str) -> str | None:
    """The last number in a text in a normal form; None if there is none.

    Example:
        >>> last_number("It costs $1,250.50, not $3.")
        '3'
        >>> last_number("So 1,000.0")
        '1000'
    """
    numbers = _NUMBER.findall(text)
    return _normal(numbers[-1]) if numbers else None


def label(text: str, like: str) -> str | None:
    """The first label in a text, of the kind of another label, as LLM-Adapters looks for it.

    Example:
        >>> label("The correct answer is solution2, not solution1.", like="solution1")
        'solution2'
        >>> label("It is True.", like="false")
        'true'
    """
    kind = like.rstrip("0123456789")
    pattern = r"\b(?:true|false)\b" if kind == like else rf"\b{kind}\d+\b"
    found = re.search(pattern, text.lower())
    return found[0] if found else None


def _normal(number: str) -> str:
    """'1,000.0' and '1000' have one form."""
    return f"{float(number.replace(',', '')):.10g}"


def score(generated: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """How often generated answers are right.

    Args:
        generated: the texts of a model.
        references: the right answers, as many.

    Returns:
        `exact_match`, the fraction whose final answer is that of the reference. If all references
        contain numbers, also `last_number_match`, the fraction whose last number is that of the
        reference, which does not require a mark before the final answer. If all references are
        "the correct answer is" and a label, as in LLM-Adapters' commonsense data, also
        `label_match`, the fraction whose first label is that of the reference.

    Example:
        >>> score(["2+2 = 4 #### 4", "That is 5."], ["#### 4", "#### 5"])
        {'exact_match': 0.5, 'last_number_match': 1.0}
    """
    if not references:
        raise ValueError("there are no answers to score")
    pairs = list(zip(generated, references, strict=True))
    exact = [final_answer(ours) == final_answer(right) for ours, right in pairs]
    found = {"exact_match": sum(exact) / len(pairs)}
    # Only what is marked counts as the final number of a reference.
    numbers = [last_number(final_answer(right)) for right in references]
    if None not in numbers:
        same = [last_number(ours) == right for (ours, _), right in zip(pairs, numbers, strict=True)]
        found["last_number_match"] = sum(same) / len(pairs)
    labels = [_LABELLED.fullmatch(right.strip().lower()) for right in references]
    if None not in labels:
        right = [match[1] for match in labels if match]
        same = [label(ours, one) == one for (ours, _), one in zip(pairs, right, strict=True)]
        found["label_match"] = sum(same) / len(pairs)
    return found
