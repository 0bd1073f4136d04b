"""The script on instruction data: it trains on the answers and generates some."""

import json

import numpy as np
import pytest
from optimizers import hasty_compiler as hasty_compiler

import finetune_llm
from common.data import exact_match
from common.data.chat import TokenizerConfig
from common.errors import UserError
from common.llm_settings import LlmSettings
from common.tasks import language_task
from tests.examples.tiny_llama import byte_tokenizer

SMALL = "--steps 4 --eval-every 2 --batch-size 2 --seq-len 64 --rank 2 --targets q,up"
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"


def questions(count: int) -> list[dict[str, str]]:
    return [{"question": f"{n}+1?", "answer": f"So.\n#### {n + 1}"} for n in range(count)]


@pytest.fixture
def write(tmp_path):
    """Writes JSON Lines and returns the path."""

    def write(rows, name="data"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def task_of(data, **settings):
    config = TokenizerConfig(special={"eos_token": "!"})
    return language_task(LlmSettings(data=data, **settings), byte_tokenizer(), config)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "Some words, again and again: the thin thieves."}, "text"),
        (questions(1)[0], "instructions"),
        ({"prompt": "a", "completion": "b"}, "instructions"),
        ({"instruction": "a", "input": "", "output": "b"}, "instructions"),
        (
            {
                "instruction": "Is it? Answer format: true/false",
                "input": "",
                "output": "the correct answer is true",
                "answer": "true",
            },
            "questions",
        ),
    ],
)
def test_the_fields_decide_the_task(write, row, kind):
    task = task_of(write([row] * 20), seq_len=80)
    assert task.kind == kind
    if kind == "text":  # not JSON syntax
        assert byte_tokenizer().decode(task.train[0].tolist()).startswith("Some words, again")


def test_a_task_can_be_chosen_against_the_fields(write):
    multiple_choice = {
        "instruction": "Is it? Answer format: true/false",
        "input": "",
        "output": "the correct answer is true",
        "answer": "true",
    }
    assert task_of(write([multiple_choice] * 20), task="instructions").kind == "instructions"
    with pytest.raises(UserError, match="line 1: expected the field text, found answer, question"):
        task_of(write(questions(20)), task="text")
    with pytest.raises(UserError, match="line 1: expected an object with the strings"):
        task_of(write(questions(20)), task="multiple-choice")
    with pytest.raises(UserError, match="data are plain text. Known forms: messages"):
        task_of(write([]), task="instructions")
    with pytest.raises(UserError, match="--task instructions needs --data"):
        task_of(None, task="instructions")


@pytest.mark.parametrize(
    ("flag", "settings"),
    [
        ("--generate", {"generate": 3}),
        ("--test-data", {"test_data": ("x",)}),
        ("--chat-template", {"chat_template": "x"}),
        ("--train-on all", {"train_on": "all"}),
        ("--no-packing", {"packing": False}),
    ],
)
def test_flags_without_an_effect_are_refused(write, flag, settings):
    data = write([{"text": "Some words, again and again: the thin thieves."}] * 20)
    with pytest.raises(UserError, match=f"{flag} is for --task instructions.*the task is text"):
        task_of(data, **settings)


def test_only_answers_are_trained_by_default(write):
    data = write(questions(20))
    decode = lambda task: byte_tokenizer().decode(
        task.train["targets"][task.train["weights"] > 0].tolist()
    )
    answers = decode(task_of(data, packing=False))
    assert sorted(answers.split("!")) == sorted(
        [
            "",
            *(
                f" {row['answer']}"
                for place, row in enumerate(questions(20))
                if place not in (9, 19)
            ),
        ]
    )
    everything = decode(task_of(data, packing=False, train_on="all"))
    assert everything.count("uestion: ") == 18 and len(everything) > 1.5 * len(answers)


def test_rows_are_packed_unless_refused(write):
    data = write(questions(200))
    packed, padded = (task_of(data, packing=packing, seq_len=256) for packing in (True, False))
    assert len(padded.train["tokens"]) == 180 > 5 * len(packed.train["tokens"])
    assert packed.train["weights"].sum() >= padded.train["weights"].sum()
    assert (packed.train["segments"] > 0).mean() > 0.9
    assert "in the worst step; 20 held out" in packed.description


def test_what_is_too_long_is_counted(write):
    rows = [*questions(18), {"question": "x" * 300, "answer": "y"}, *questions(2)]
    assert "1 longer than --seq-len: cut, 1 left out" in task_of(write(rows)).description
    with pytest.raises(UserError, match="has an answer within --seq-len 8: use a larger"):
        task_of(write(rows), seq_len=8)


def test_the_loss_is_the_mean_over_the_tokens_of_all_rows(write):
    task = task_of(write(questions(20)))
    metrics = task.metrics({"nats": np.array([6.0, 1.0]), "weight": np.array([2.0, 5.0])})
    assert metrics == {"eval_loss": 1.0, "eval_perplexity": pytest.approx(np.e)}


def test_the_script_learns_from_messages_and_answers(write, model_folder, tmp_path, capsys):
    pytest.importorskip("jinja2", reason="chat templates need Jinja")
    chats = [
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "#### 7"},
            ]
        }
    ]
    (tmp_path / "template").write_text(TEMPLATE)
    flags = [*SMALL.split(), "--model", str(model_folder), "--data", write(chats * 40)]
    flags += ["--chat-template", str(tmp_path / "template"), "--max-new-tokens", "3"]
    (tmp_path / "boolq").mkdir()
    flags += ["--test-data", write(chats * 3, "boolq/test.json") + "," + write(chats, "siqa.json")]
    folder = tmp_path / "out"
    assert finetune_llm.main([*flags, "--generate", "2", "--output", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "36 training examples in" in printed and "perplexity" in printed
    assert printed.count("2 answers (held out), exact match 0.0 %, last number match") == 2
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "exact_match" in record] == [0, 0, 0, 4, 4, 4]
    assert [r["answered"] for r in records if "answered" in r][3:] == ["held out", "boolq", "siqa"]
    assert printed.count("mean of 3 sets, exact match 0.0 %") == 2
    (first, _) = (folder / "answers-4-held-out.jsonl").read_text().splitlines()
    assert json.loads(first)["reference"] == "#### 7"
    assert json.loads(first)["prompt"] == "[user]Hi;"
    capsys.readouterr()
    assert finetune_llm.main(["--resume", "--output", str(folder)]) == 0
    again = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert again == records


def test_epochs_give_the_number_of_steps(write, model_folder, tmp_path, capsys):
    data = write(questions(200))
    flags = [*SMALL.split(), "--model", str(model_folder), "--data", data, "--epochs", "0.5"]
    assert finetune_llm.main([*flags, "--output", str(tmp_path / "out")]) == 0
    rows = int(capsys.readouterr().out.split(" rows of 64")[0].split()[-1])
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]
    assert settings["steps"] == -(-rows // 4)
    assert finetune_llm.main(["--resume", "--output", str(tmp_path / "out")]) == 0


def test_prompts_that_exceed_the_context_are_refused(write, model_folder, tmp_path, capsys):
    flags = [*SMALL.split(), "--model", str(model_folder), "--data", write(questions(20))]
    flags += ["--generate", "2", "--max-new-tokens", "4090", "--output", str(tmp_path / "out")]
    assert finetune_llm.main(flags) == 1
    assert "exceed the context of tiny-llama, 4096" in capsys.readouterr().err


def test_sets_of_one_name_are_refused(write):
    data = write(questions(20))
    with pytest.raises(UserError, match="two sets of the name data: rename a file"):
        task_of(data, test_data=(data, data))


@pytest.mark.parametrize(
    ("answer", "reference", "exact"),
    [
        ("so 3+4=7\n#### 7", "#### 7", True),
        ("#### $7.00.", "7 apples\n#### 7", True),
        ("#### 1,250", "#### 1250", True),
        ("####\n 7 \nand then", "#### 7", True),
        ("#### -7", "#### 7", False),
        ("7", "#### 7", True),
        ("It is 7", "#### 7", False),
        ("", "#### 7", False),
        ("####", "#### 7", False),
        ("The correct answer is  ANSWER2.", "the correct answer is answer2", True),
        ("the correct answer is answer1", "the correct answer is answer2", False),
        ("#### 7 eggs", "#### 7", True),
        ("#### 75", "#### 7", False),
    ],
)
def test_final_answers_are_compared(answer, reference, exact):
    assert exact_match.score([answer], [reference])["exact_match"] == exact


def test_labels_are_compared_where_the_references_are_labels():
    references = ["the correct answer is answer2", "the correct answer is false"]
    generated = ["Answer2, since answer1 is wrong", "the correct answer is true"]
    found = exact_match.score(generated, references)
    assert found == {"exact_match": 0.0, "label_match": 0.5}
    assert "label_match" not in exact_match.score(["yes"], ["the correct answer is 4"])


def test_last_numbers_are_compared_where_the_references_are_numbers():
    score = exact_match.score(["It is 7", "#### 8 of 9"], ["#### 7", "#### 8"])
    assert score == {"exact_match": 0.5, "last_number_match": 0.5}
    assert set(exact_match.score(["yes"], ["yes"])) == {"exact_match"}
    with pytest.raises(ValueError, match="no answers"):
        exact_match.score([], [])
