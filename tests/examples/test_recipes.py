"""The paper's experiments are commands that parse, and that run on a tiny model."""

import json
import re

import pytest
from optimizers import hasty_compiler as hasty_compiler

import recipes
from common import llm_settings, vit_settings

PARSERS = {"finetune_llm.py": llm_settings, "finetune_vit.py": vit_settings}


def settings_of(name, arguments):
    """The settings of a command of a recipe."""
    return PARSERS[recipes.RECIPES[name].script].parse_arguments(arguments)[0]


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_the_commands_parse_and_name_their_differences(name, capsys):
    assert recipes.main([name]) == 0
    printed = capsys.readouterr().out
    found = list(recipes.RECIPES[name].commands())
    script = recipes.RECIPES[name].script
    assert printed.count(f"python examples/{script}") == len(found)
    assert len({tuple(arguments) for arguments in found}) == len(found)
    assert "differs from the paper:\n  - " in printed and "data: " in printed
    for arguments in found:
        settings = settings_of(name, arguments)
        assert settings.epochs in (1, 3) and settings.model and settings.data


def test_the_paper_s_hyper_parameters_are_set():
    of = lambda name, number: settings_of(name, list(recipes.RECIPES[name].commands())[number])
    first, dora, last = (of("table-2", number) for number in (0, 1, -1))
    assert (first.method, first.rank, first.alpha, first.learning_rate) == ("lora", 16, 32, 2e-4)
    assert (dora.method, dora.rank, dora.alpha) == ("dora", 16, 32)
    assert (last.method, last.rank, last.alpha, last.learning_rate) == ("loft", 1, 1, 1e-4)
    assert first.targets == ("q", "k", "v", "up", "down") and first.batch_size == 16
    assert len(first.test_data) == 8 and not first.packing
    assert (first.dropout, first.warmup, first.schedule) == (0.05, 100, "linear")
    assert of("table-14", 0).warmup == 0 and of("table-21", 0).dropout == 0.05
    assert (of("table-14", 0).batch_size, of("table-15", 0).batch_size) == (64, 32)
    assert of("figure-9", 0).quantize == "nf4"
    assert {of("table-21", number).seq_len for number in range(4)} == {256, 512}
    full, lora, last = (of("table-3", number) for number in (0, 1, -1))
    assert (full.method, full.batch_size, full.learning_rate) == ("full", 64, 5e-4)
    assert (lora.method, lora.rank, lora.alpha) == ("lora", 16, 32)
    assert (last.method, last.rank, last.alpha, last.batch_size) == ("loft", 4, 4, 256)
    assert (lora.dropout, last.dropout, full.dropout, lora.warmup) == (0.1, 0.1, 0, 0.1)
    assert len(of("table-18", 0).test_data) == 6 and not full.test_data
    ablations = ["loft", "no-alternation", "no-calibration", "neither"]
    for name, rank in (("table-6", 16), ("table-7", 4)):
        found = [of(name, number) for number in range(4)]
        assert [x.method for x in found] == ablations and {x.rank for x in found} == {rank}
    assert [of("table-19", number).method for number in range(3)] == ["adapter", "vpt", "loft"]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("table-2", 3),
        ("table-3", 0),
        ("table-6", 3),
        ("table-7", 1),
        ("table-10", 1),
        ("table-14", 0),
        ("table-15", 5),
        ("table-16", 3),
        ("table-17", 0),
        ("table-18", 2),
        ("table-19", 1),
        ("figure-9", 1),
        ("table-20", 0),
        ("table-21", 0),
    ],
)
def test_the_stand_in_runs_to_the_end(name, number, tmp_path, capsys):
    if name == "figure-9":
        pytest.importorskip("qwix", reason="the base weights are quantized by qwix")
    recipe = recipes.RECIPES[name]
    recipes.run_stand_in(recipe, tmp_path / "out", number)
    records = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2]
    printed = capsys.readouterr().out
    if recipe.script == "finetune_vit.py":
        tested = [r["tested"] for r in records if "tested" in r]
        assert tested == ["held out", *(["data"] if name == "table-18" else [])]
        assert re.search(r"after 2 steps: held-out accuracy [\d.]+ %", printed)
        return
    answered = [r["answered"] for r in records if "answered" in r]
    # Before and after training; perplexity alone is measured on text.
    assert bool(answered) == (name not in ("table-14", "table-15"))
    assert re.search(r"after 2 steps: held-out loss [\d.]+, perplexity", printed)


def test_the_command_line_lists_the_recipes_and_runs_a_stand_in(tmp_path, capsys):
    assert recipes.main([]) == 0
    assert "table-2 " in capsys.readouterr().out
    assert recipes.main(["table-99"]) == 1
    assert "choose from table-2" in capsys.readouterr().err
