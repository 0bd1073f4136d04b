"""Chat templates render as in transformers; exactly the tokens of the answers are trained."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from common.data import answers, chat
from common.data.chat import TokenizerConfig
from common.data.forms import Example
from common.errors import UserError

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- ' [INST] ' + message.content | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
REASONING = """{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and loop.index0 < ns.last %}
        {{- '<|im_start|>assistant\n' + message.content.split('</think>')[-1].lstrip('\n') }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
TOOLS = """{% if tools %}
    {% for tool in tools %}
tool {{ tool | tojson }} of {{ strftime_now('%Y') }}
    {% endfor %}
{% endif %}
{% for message in messages %}
    {% if message.role == 'skip' %}{% continue %}{% endif %}
<|im_start|>{{ message.role }}
    {% if message.role == 'assistant' %}
        {% generation %}
{{ message.content }}<|im_end|>
        {% endgeneration %}
    {% else %}
{{ message.content }}<|im_end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
TEMPLATES = {"chatml": CHATML, "inst": INST, "reasoning": REASONING, "tools": TOOLS}

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TURNS = (
    {"role": "user", "content": " What is <2> + 2?\n"},
    {"role": "assistant", "content": "<think>\nAdd.\n</think>\n\nIt is 4.  "},
    {"role": "user", "content": "Éa und 3?"},
    {"role": "assistant", "content": "\n\n5 ✓"},
)


def trained_tokenizer(kind: str) -> Tokenizer:
    """A tokenizer with real merges: GPT-2's byte-level BPE, or LLaMA 2's with added spaces."""
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=kind == "metaspace"))
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet: list[str] = []
    if kind == "byte_level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    text = [message["content"] for message in TURNS] + ["Question: Answer: user assistant\n\n"] * 9
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*text, " [INST] [/INST] 12 3 4 5\n" * 9], trainer)
    return tokenizer


@pytest.fixture(scope="module", params=["byte_level", "metaspace"])
def tokenizer(request) -> Tokenizer:
    return trained_tokenizer(request.param)


@pytest.mark.parametrize("ask", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name, count, ask):
    transformers = pytest.importorskip("transformers", reason="nothing to compare with")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained_tokenizer("byte_level"), chat_template=TEMPLATES[name], **SPECIAL
    )
    tools = [{"type": "function", "function": {"name": "<é>", "parameters": {}}}]
    expected = theirs.apply_chat_template(
        list(TURNS[:count]), tools=tools, add_generation_prompt=ask, tokenize=False
    )
    config = TokenizerConfig(TEMPLATES[name], SPECIAL)
    assert chat.render(config, TURNS[:count], ask=ask, tools=tools) == expected


def one_by_one(tokenizer: Tokenizer, config: TokenizerConfig, turns) -> tuple[list, list]:
    """The prompt and the answer of each turn as text, each from a rendering of its own."""
    pairs = []
    for place in range(1, len(turns), 2):
        prompt = chat.render(config, turns[:place], ask=True)
        pairs.append((prompt, chat.render(config, turns[: place + 1])[len(prompt) :]))
    return pairs


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answers_are_trained_and_nothing_else(tokenizer, name):
    pytest.importorskip("jinja2", reason="chat templates need Jinja")
    config = TokenizerConfig(TEMPLATES[name], SPECIAL)
    texts = answers.write(Example(where="x", messages=TURNS), config)
    pairs = one_by_one(tokenizer, config, TURNS)
    # Only the reasoning template writes an answer in another way when more messages follow.
    assert len(texts) == (2 if name == "reasoning" else 1)
    expected = [pairs] if len(texts) == 1 else [[pair] for pair in pairs]
    encoded = answers.encode(tokenizer, texts, "answers")
    for text, tokens, wanted in zip(texts, encoded, expected, strict=True):
        runs = np.split(tokens.ids, np.flatnonzero(np.diff(tokens.trained)) + 1)
        decoded = [tokenizer.decode(run.tolist(), skip_special_tokens=False) for run in runs]
        assert [part.strip(" ") for part in decoded[1::2]] == [
            answer.strip(" ") for _, answer in wanted
        ]
        assert not tokens.trained[0] and tokens.trained[-1]
        assert len("".join(decoded)) >= len(text.text.replace(" ", ""))


def test_all_tokens_can_be_trained(tokenizer):
    pytest.importorskip("jinja2", reason="chat templates need Jinja")
    (text,) = answers.write(Example(where="x", messages=TURNS), TokenizerConfig(CHATML))
    (tokens,) = answers.encode(tokenizer, [text], "all")
    assert tokens.trained.all()
    assert tokens.ids.tolist() == tokenizer.encode(text.text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Question: 2?\nAnswer:", " 4"),
        ("Answer: ", "4"),  # the tokenizer would join the space and the answer
        ("user\n", "\nassistant"),  # and the two new lines
        ("Ques", "tion"),
        ("", "Answer"),
        ("é", "a ✓ "),
    ],
)
def test_a_token_never_crosses_the_border_of_prompt_and_answer(prompt, completion):
    tokenizer = trained_tokenizer("byte_level")
    config = TokenizerConfig(special=SPECIAL)
    (text,) = answers.write(Example(where="x", plain=(prompt, completion)), config)
    (tokens,) = answers.encode(tokenizer, [text], "answers")
    # The prompt's tokens are those that the model gets when it generates the answer.
    assert tokens.ids[~tokens.trained].tolist() == tokenizer.encode(prompt).ids
    assert tokens.ids[tokens.trained].tolist() == tokenizer.encode(completion + "</s>").ids


def test_smollm2s_own_tokenizer_and_template(smollm2):
    pytest.importorskip("jinja2", reason="chat templates need Jinja")
    tokenizer, config = smollm2
    (text,) = answers.write(Example(where="x", messages=TURNS), config)
    (tokens,) = answers.encode(tokenizer, [text], "answers")
    runs = np.split(tokens.ids, np.flatnonzero(np.diff(tokens.trained)) + 1)
    decoded = [tokenizer.decode(run.tolist(), skip_special_tokens=False) for run in runs]
    assert "".join(decoded) == text.text
    assert decoded[1::2] == [
        f"{turn['content']}<|im_end|>\n" for turn in TURNS if turn["role"] == "assistant"
    ]
    assert decoded[0].startswith("<|im_start|>system\n")
    assert decoded[0].endswith("<|im_start|>assistant\n")
    assert config.stop == ("<|im_end|>",)
    prompt, reference = answers.write_prompt(Example(where="x", messages=TURNS), config)
    assert text.text.startswith(prompt.text) and reference == "5 ✓"


def test_special_tokens_are_added_to_plain_text_only():
    tokenizer = trained_tokenizer("byte_level")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    plain = answers.Text("Question: 4", ((9, 11),), is_template=False)
    written = answers.Text("<s>Question: 4", ((12, 14),), is_template=True)
    encoded = answers.encode(tokenizer, [written, plain, written], "answers")
    assert all(tokens.ids.tolist() == encoded[0].ids.tolist() for tokens in encoded)
    assert all(tokens.trained.tolist() == encoded[0].trained.tolist() for tokens in encoded)
    assert tokenizer.decode(encoded[1].ids[encoded[1].trained].tolist()) == " 4"


def test_long_conversations_are_cut_and_those_without_an_answer_left_out():
    tokens = [
        answers.Tokens(np.arange(n, dtype=np.int32), np.arange(n) >= first)
        for n, first in ((3, 2), (9, 2), (9, 5), (1, 0))
    ]
    cut = answers.cut(tokens, 5)
    assert [one.ids.tolist() for one in cut] == [[0, 1, 2], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "The chat template is not valid Jinja, line 1"),
        ("{{ raise_exception('no!') }}", r"rejects the messages \(no!\)"),
        ("{{ messages[0].content + 3 }}", "rejects the messages"),
        ("{{ messages | length }}", "does not continue its prompt"),
        (None, "messages need a chat template, and the model has none: pass --chat-template"),
    ],
)
def test_unfit_templates_are_named_with_the_record(template, message):
    pytest.importorskip("jinja2", reason="chat templates need Jinja")
    with pytest.raises(UserError, match=f"data, line 3: .*{message}"):
        answers.write(Example(where="data, line 3", messages=TURNS), TokenizerConfig(template))


def test_a_models_folder_gives_its_template_and_special_tokens(tmp_path):
    tokenizer = trained_tokenizer("byte_level")
    assert chat.read_tokenizer_config(tmp_path, tokenizer) == TokenizerConfig()
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "pad_token": None,
        "chat_template": [
            {"name": "tool_use", "template": "a"},
            {"name": "default", "template": "b"},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 3, 99999]}')
    read = chat.read_tokenizer_config(tmp_path, tokenizer)
    assert read == TokenizerConfig("b", SPECIAL, ("</s>", "<|im_end|>"))
    (tmp_path / "chat_template.jinja").write_text("c")
    assert chat.read_tokenizer_config(tmp_path, tokenizer).template == "c"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="Cannot read .*tokenizer_config.json"):
        chat.read_tokenizer_config(tmp_path, tokenizer)
