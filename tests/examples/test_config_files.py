"""Settings in files: what a file gives, what a flag overrides, and what is refused."""

import dataclasses
import json

import pytest

from common import llm_settings, vit_settings
from common.errors import UserError

FLAGS = "--rank 4 --targets q,v --learning-rate 1e-3 --remat --no-packing --dropout 0.1 --prompt"


def settings_of(*arguments, of=llm_settings):
    return of.parse_arguments([str(argument) for argument in arguments])[0]


def test_a_toml_file_gives_what_flags_give(tmp_path):
    (tmp_path / "run.toml").write_text(
        """
        rank = 4
        targets = ["q", "v"]
        learning-rate = 1e-3
        remat = true
        packing = false
        dropout = 0.1
        prompt = "- a dash"
        """
    )
    found = settings_of("--config", tmp_path / "run.toml")
    assert found == settings_of(*FLAGS.split()[:-1], "--prompt=- a dash")
    assert found != llm_settings.LlmSettings()


def test_flags_take_precedence_over_the_file(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"rank": 4, "remat": True, "packing": False}))
    config = ["--config", tmp_path / "run.json"]
    found = settings_of("--rank", 2, *config, "--no-remat", "--packing")
    assert (found.rank, found.remat, found.packing) == (2, False, True)
    assert settings_of(*config, "--dropout", 0.2).rank == 4


# A value of another kind for each setting, so that no setting of the two scripts is forgotten.
OTHERS = {
    "method": "lora", "model": "m", "data": "d", "eval_data": "e", "test_data": ("a", "b"),
    "rank": 3, "alpha": 5.0, "targets": ("q",), "dropout": 0.25, "learning_rate": 1e-3,
    "warmup": 100.0, "schedule": "cosine", "weight_decay": 0.1, "clip": 0.0, "steps": 7,
    "epochs": 1.5, "batch_size": 6, "accumulate": 2, "eval_every": 8, "save_every": 9, "seed": 5,
    "log_to": (), "merge": True,
    "task": "text", "train_on": "all", "packing": False, "chat_template": "c",
    "compare": ("full",), "generate": 4, "max_new_tokens": 11, "answers": "words",
    "second_moment": "factored", "quantize": None, "tile_size": 32, "dtype": "float32",
    "remat": True, "seq_len": 12, "eval_windows": 13, "eval_questions": 14, "prompt": "",
    "image_size": 28, "eval_images": 15, "head_learning_rate": 1e-2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("of", "kind"),
    [(llm_settings, llm_settings.LlmSettings), (vit_settings, vit_settings.VitSettings)],
)
def test_the_file_that_a_run_saves_gives_its_settings(tmp_path, of, kind):
    names = [field.name for field in dataclasses.fields(kind)]
    changed = kind(**{name: OTHERS[name] for name in names})
    for settings in (kind(), changed):
        saved = {"settings": dataclasses.asdict(settings), "data_sha256": "0"}
        (tmp_path / "settings.json").write_text(json.dumps(saved))
        assert settings_of("--config", tmp_path / "settings.json", of=of) == settings


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"rnak": 4}', "'rnak' is no setting of this script"),
        ("a.json", '{"output": "x"}', "'output' is no setting of this script"),
        ("a.json", '{"rank": "four"}', "argument --rank: 'four' is not a positive integer"),
        ("a.json", '{"rank": 2.5}', "argument --rank: '2.5' is not a positive integer"),
        ("a.json", '{"remat": "yes"}', "argument --remat/--no-remat: ignored explicit argument"),
        ("a.json", '{"targets": ["q", "x"]}', "argument --targets: 'x' is none of q,k,v"),
        ("a.json", '{"schedule": "cosin"}', "argument --schedule: invalid choice: 'cosin'"),
        ("a.json", "[1]", "does not contain an object"),
        ("a.json", "rank = 4", "Cannot use --config"),
        ("a.toml", "rank: 4", "Cannot use --config"),
        ("a.json", '{"dropout": 0.1, "method": "full"}', "--dropout is for adapters"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        settings_of("--config", tmp_path / name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"Cannot use --config .*none\.toml"):
        settings_of("--config", tmp_path / "none.toml")
