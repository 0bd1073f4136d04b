"""Multiple choice: the loss of the answer, and the likeliest choice."""

import json

import numpy as np
import pytest
from optimizers import hasty_compiler as hasty_compiler

import finetune_llm
from common.data import choices, exact_match
from common.errors import UserError
from tests.examples.tiny_llama import byte_tokenizer

SMALL = "--steps 4 --eval-every 2 --batch-size 2 --seq-len 48 --rank 2 --targets q,up"


def row(answer: str, question: str = "Which?") -> dict[str, str]:
    instruction = f"Choose: {question}\n\nAnswer format: answer1/answer2/answer3"
    output = f"the correct answer is {answer}"
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


@pytest.fixture
def write(tmp_path):
    """Writes a file of questions and gives its path."""

    def write(rows):
        (tmp_path / "questions.json").write_text(json.dumps(rows))
        return str(tmp_path / "questions.json")

    return write


def test_choices_are_those_of_the_format_and_the_answer(write):
    first, second = choices.load_questions(write([row("answer2"), row("answer4")]))
    assert first.choices == tuple(f"the correct answer is answer{n}" for n in (1, 2, 3))
    assert first.right == 1
    assert len(second.choices) == 4 and second.right == 3


# The instructions of the eight commonsense sets of LLM-Adapters, by the kind of their labels.
COMMONSENSE = {
    "boolq": ("Please answer the following question with true or false, question: is it?", "", 2),
    "piqa": ("Please choose the correct solution to the question: how?", "solution", 2),
    "social_i_qa": ("Please choose the correct answer to the question: why?", "answer", 3),
    "hellaswag": ("Please choose the correct ending to complete the sentence: A.", "ending", 4),
    "winogrande": ("Please choose the correct answer to fill in the blank: A _ B.", "option", 2),
    "ARC-Challenge": ("Please choose the correct answer to the question: why?", "answer", 4),
    "ARC-Easy": ("Please choose the correct answer to the question: what?", "answer", 5),
    "openbookqa": ("Please choose the correct answer to the question: who?", "answer", 4),
}


@pytest.mark.parametrize("name", COMMONSENSE)
def test_the_commonsense_sets_are_read_by_likelihood_and_by_generated_answer(write, name):
    asked, kind, count = COMMONSENSE[name]
    labels = [f"{kind}{n}" for n in range(1, count + 1)] if kind else ["true", "false"]
    said = " ".join(f"{label.capitalize()}: number {label}" for label in labels) if kind else ""
    rows = [
        row(label) | {"instruction": f"{asked}\n\n{said}\n\nAnswer format: {'/'.join(labels)}"}
        for label in labels
    ]
    questions = choices.load_questions(write(rows))
    assert [question.right for question in questions] == list(range(count))
    for question in questions:
        assert question.choices == tuple(f"the correct answer is {label}" for label in labels)
    references = [one["output"] for one in rows]
    always_first = [f"I think it is {labels[0].capitalize()}."] * count
    found = exact_match.score(always_first, references)
    assert found["label_match"] == 1 / count and found["exact_match"] == 0
    assert exact_match.score(references, references)["label_match"] == 1


def worded(answer: str, *said: str) -> dict[str, str]:
    listed = " ".join(f"Answer{n}: {one}" for n, one in enumerate(said, 1))
    labels = "/".join(f"answer{n}" for n, _ in enumerate(said, 1))
    instruction = (
        f"Please choose the correct answer to the question: Why 1: 2?\n\n{listed}\n\n"
        f"Answer format: {labels}"
    )
    return row(answer) | {"instruction": instruction}


def test_words_are_what_the_instruction_says_after_each_label(write):
    questions = choices.load_questions(
        write([worded("answer2", "a cat.", "an Answer: no", "2")]), answers="words"
    )
    assert questions == [
        choices.Question(
            "Question: Why 1: 2?\nAnswer:", (" a cat.", " an Answer: no", " 2"), right=1
        )
    ]


@pytest.mark.parametrize(
    "unfit", [row("answer1"), worded("answer3", "x", "y"), worded("answer1", "x", " ")]
)
def test_questions_without_words_are_named(write, unfit):
    with pytest.raises(UserError, match="line 1: its instruction does not spell out the answers"):
        choices.load_questions(write([unfit]), answers="words")


@pytest.mark.parametrize("length", [40, 200])
def test_the_answer_is_marked_whether_the_prompt_is_cut_or_filled_up(write, length):
    tokenizer = byte_tokenizer()
    questions = choices.load_questions(write([row("answer2")]))
    rows = choices.encode(tokenizer, questions, length, every=True)
    assert rows["tokens"].shape == (3, length + 1) and rows["right"].tolist() == [
        False,
        True,
        False,
    ]
    for tokens, answer, said in zip(
        rows["tokens"], rows["answer"], questions[0].choices, strict=True
    ):
        assert tokenizer.decode(tokens[1:][answer].tolist()) == said
    assert len(choices.encode(tokenizer, questions, length, every=False)["tokens"]) == 1


class Recorded:
    """A model with given logits."""

    def __init__(self, logits):
        self.logits = logits

    def hidden(self, tokens, **_):
        return self.logits

    def head(self, hidden):
        return hidden


def test_the_loss_sees_the_answer_alone():
    logits = np.random.default_rng(0).normal(size=(1, 4, 7)).astype(np.float32)
    batch = {
        "tokens": np.array([[1, 2, 3, 4, 5]]),
        "answer": np.array([[False, False, True, True]]),
    }
    losses = np.log(np.exp(logits).sum(-1))[0] - logits[0, range(4), [2, 3, 4, 5]]
    loss = choices.answer_loss(Recorded(logits), batch)
    np.testing.assert_allclose(loss, [losses[2:].mean()], rtol=1e-5)
    nats = choices.answer_nats(Recorded(logits), batch)["nats"]
    np.testing.assert_allclose(nats, [losses[2:].sum()], rtol=1e-5)


def test_the_score_compares_the_choices_of_each_question():
    rows = {
        "question": np.array([0, 0, 1, 1, 1]),
        "right": np.array([True, False, False, False, True]),
    }
    nats = -np.log([0.3, 0.1, 0.2, 0.1, 0.1])
    accuracy, likelihood = choices.score(rows, nats)
    assert accuracy == 0.5
    np.testing.assert_allclose(likelihood, (0.75 + 0.25) / 2)


@pytest.mark.parametrize("answers", ["labels", "words"])
def test_the_script_learns_multiple_choice(write, model_folder, tmp_path, capsys, answers):
    data = write([worded(f"answer{1 + n % 3}", "no", f"number {n}", "yes") for n in range(20)])
    flags = [*SMALL.split(), "--model", str(model_folder), "--data", data, "--answers", answers]
    if answers == "labels":
        for name in ("boolq", "piqa"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "test.json").write_text(json.dumps([row("answer1"), row("answer2")]))
        flags += ["--test-data", f"{tmp_path}/boolq/test.json,{tmp_path}/piqa/test.json"]
    assert finetune_llm.main([*flags, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "18 training questions, 2 held out" in printed and "after 4 steps" in printed
    records = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    measured = [record for record in records if "eval_accuracy" in record]
    assert [record["step"] for record in measured] == [0, 2, 4]
    tested = [(record["step"], record["tested"]) for record in records if "tested" in record]
    sets = ["boolq", "piqa"] if answers == "labels" else []
    assert tested == [(step, name) for step in (0, 4) for name in sets]
    assert ("step 4: mean of 2 sets, accuracy" in printed) == bool(sets)
    assert all(0 < record["eval_answer_likelihood"] < 1 for record in measured)
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "contains no records"),
        ({}, "line 1: expected an object with the strings"),
        (
            [row("answer1"), {"output": 3}],
            "line 1: expected an object with the strings instruction",
        ),
        ([row("answer1") | {"instruction": "Choose!"}], 'does not end with "Answer format'),
        ([row("answer1") | {"output": "yes"}], "does not contain its answer 'answer1'"),
    ],
)
def test_unfit_questions_are_named(write, rows, message):
    path = write(rows)
    with pytest.raises(UserError, match=f"{path}.*{message}"):
        choices.load_questions(path)


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(UserError, match="--data missing.json: there is no such file"):
        choices.load_questions("missing.json")
    (tmp_path / "half.json").write_text('[{"instruction": ')
    with pytest.raises(UserError, match="Cannot read .*half.json"):
        choices.load_questions(str(tmp_path / "half.json"))
    with pytest.raises(UserError, match="--task multiple-choice needs --data"):
        choices.load_questions(None)


def test_an_answer_longer_than_a_row_is_refused(write):
    questions = choices.load_questions(write([row("answer1")]))
    with pytest.raises(UserError, match="more than --seq-len 5"):
        choices.encode(byte_tokenizer(), questions, 5, every=False)
