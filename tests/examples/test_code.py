"""Programming problems: programs in generated texts, pass@k, and the files of evalplus."""

import itertools
import json

import pytest
from optimizers import hasty_compiler as hasty_compiler

import evaluate_code
from common.data import code
from common.errors import UserError

PROBLEMS = [
    {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def {name}(x):\n    """Returns {what}."""\n',
        "entry_point": name,
        "canonical_solution": f"    return {what}\n",
        "contract": "",
        "base_input": [[1], [2]],
        "plus_input": [[-3]],
        "atol": 0,
    }
    for number, (name, what) in enumerate([("twice", "2 * x"), ("size", "abs(x)")])
]


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return path


@pytest.mark.parametrize(("total", "right"), [(5, 0), (5, 1), (5, 3), (5, 5), (1, 1), (7, 2)])
def test_pass_at_k_is_the_fraction_of_all_draws_that_contain_a_right_sample(total, right):
    samples = [True] * right + [False] * (total - right)
    for k in range(1, total + 1):
        draws = list(itertools.combinations(samples, k))
        expected = sum(map(any, draws)) / len(draws)
        assert code.pass_at_k(total, right, k) == pytest.approx(expected, abs=1e-12)


def test_the_mean_is_over_problems_that_have_enough_samples():
    counts = [(4, 1), (5, 5)]
    found = code.mean_pass_at_k(counts, (1, 4, 5))
    assert found == {"pass@1": pytest.approx((0.25 + 1) / 2), "pass@4": 1.0}
    with pytest.raises(ValueError, match="pass@3 of 1 right samples among 2"):
        code.pass_at_k(2, 1, 3)


@pytest.mark.parametrize(
    ("text", "continues", "program"),
    [
        ("    return 2 * x\n\ndef other():", True, "    return 2 * x\n"),
        ("    return 2 * x\nprint(twice(1))", True, "    return 2 * x\n"),
        ("    y = 2 * x\n\n    return y", True, "    y = 2 * x\n\n    return y\n"),
        ("```python\n    return 2 * x\n```\nIt doubles.", False, "    return 2 * x\n"),
        ("    return 2 * x", False, "    return 2 * x\n"),
    ],
)
def test_a_body_is_joined_to_the_prompt(problems, text, continues, program):
    problem, _ = code.read_problems(str(problems))
    assert code.solution(problem, text, continues=continues) == problem.prompt + program


@pytest.mark.parametrize(
    "text",
    [
        "Sure:\n```python\ndef twice(x):\n    return x + x\n```\nAnother:\n```\nno\n```",
        "```\ndef twice(x):\n    return x + x",  # cut after the last token
        "def twice(x):\n    return x + x\n",
    ],
)
def test_a_whole_function_stands_alone(problems, text):
    problem, _ = code.read_problems(str(problems))
    assert code.solution(problem, text, continues=False) == "def twice(x):\n    return x + x\n"


def test_samples_of_a_model_are_written_as_evalplus_reads_them(
    problems, model_folder, tmp_path, capsys
):
    output = tmp_path / "out" / "samples.jsonl"
    flags = ["--model", model_folder, "--problems", problems, "--output", output]
    flags += ["--samples", 3, "--max-new-tokens", 4, "--batch-size", 2]
    for mode in ([], ["--plain"]):
        assert evaluate_code.main([str(flag) for flag in [*flags, *mode]]) == 0
        samples = [json.loads(line) for line in output.read_text().splitlines()]
        ids = [sample["task_id"] for sample in samples]
        assert ids == ["HumanEval/0"] * 3 + ["HumanEval/1"] * 3
        assert all(sample.keys() == {"task_id", "solution"} for sample in samples)
        assert samples[0]["solution"].startswith(PROBLEMS[0]["prompt"])
        assert len({sample["solution"] for sample in samples[:3]}) > 1
    assert "6 solutions of 2 problems in" in capsys.readouterr().out


def test_evalplus_judges_the_samples(problems, tmp_path):
    pytest.importorskip("evalplus", reason="the extra code is not installed")
    twice, size = code.read_problems(str(problems))
    bodies = [(twice, "return 2 * x"), (twice, "return x + 1"), (twice, "return")]
    bodies += [(size, "return abs(x)"), (size, "return x"), (size, "oh no")]
    texts = [(problem, f"    {body}") for problem, body in bodies]
    samples = [(problem, code.solution(problem, text, continues=True)) for problem, text in texts]
    path = tmp_path / "samples.jsonl"
    code.write_samples(path, samples)
    for _ in range(2):  # the second time, there are results already
        found = evaluate_code.judge(path, str(problems))
        # `return x` passes HumanEval's tests, but not the one with a negative number.
        assert found["base tests"] == {"pass@1": pytest.approx((1 / 3 + 2 / 3) / 2)}
        assert found["all tests"] == {"pass@1": pytest.approx(1 / 3)}


def test_a_judge_that_is_not_installed_is_named(problems, tmp_path):
    with pytest.raises(UserError, match=r"could not judge .*--judge names another Python"):
        evaluate_code.judge(tmp_path / "samples.jsonl", str(problems), str(tmp_path / "no-python"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--problems", "missing.jsonl"], "--problems missing.jsonl: there is no such file"),
        (["--output", "samples.json"], "evalplus reads files that end with .jsonl"),
        (["--model", "missing"], "--model missing: there is no such folder"),
    ],
)
def test_what_cannot_work_is_explained(problems, capsys, flags, message):
    assert evaluate_code.main(["--problems", str(problems), *flags]) == 1
    assert message in capsys.readouterr().err


def test_other_records_are_refused(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"task_id": "a"}\n')
    assert evaluate_code.main(["--problems", str(tmp_path / "a.jsonl")]) == 1
    assert "line 1: expected an object with task_id, prompt, entry_point" in capsys.readouterr().err
