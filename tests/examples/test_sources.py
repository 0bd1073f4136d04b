"""Data files are recognized by their content; what is not understood is named with its place."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from common.data import forms, sources
from common.errors import UserError

QA = {"question": "2+2?", "answer": "It is 4.\n#### 4"}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def write(tmp_path):
    """Writes a file and returns its path."""

    def write(content: str | bytes, name: str = "data") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.mark.parametrize(
    ("content", "places"),
    [
        (lines(QA, QA), [1, 2]),
        ("\n" + lines(QA) + "\n\n" + lines(QA), [2, 5]),
        (json.dumps([QA, QA]), [1, 1]),
        (json.dumps([QA, QA], indent=1), [2, 6]),
        (json.dumps(QA, indent=1) + "\n" + json.dumps(QA, indent=1), [1, 5]),
        ("\ufeff" + lines(QA), [1]),
        (lines(QA).replace("\n", "\r\n"), [1]),
    ],
    ids=["lines", "blank_lines", "array", "indented", "objects", "byte_order_mark", "crlf"],
)
@pytest.mark.parametrize("name", ["data", "data.json", "data.jsonl", "data.txt"])
@pytest.mark.parametrize(
    "pack", [str.encode, lambda text: gzip.compress(text.encode())], ids=["plain", "gzip"]
)
def test_json_is_recognized_by_its_content(write, content, places, name, pack):
    path = write(pack(content), name)
    records = sources.read(str(path))
    assert [record.where for record in records] == [f"{path}, line {place}" for place in places]
    assert all(record.fields == QA for record in records)


def test_a_list_in_one_object_is_the_data(write):
    path = write(json.dumps({"version": 1, "data": [QA, QA]}))
    assert [r.where for r in sources.read(str(path))] == [f"{path}, data[0]", f"{path}, data[1]"]
    path = write(json.dumps({"messages": CHAT}))  # one line of JSON Lines
    assert [record.fields for record in sources.read(str(path))] == [{"messages": CHAT}]


@pytest.mark.parametrize("text", ["One.\n\nTwo.", "[Verse 1]\nLa", "{curly} text", "", "3.5"])
def test_other_text_stays_text(write, text):
    assert sources.read(str(write(text))) == text


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (lines(QA) + '{"question": \n', "a", "line 3: it is not valid JSON"),
        ('[{"a": 1}\n {"a": 2}]', "a", "line 2: expected , or \\]"),
        ('[{"a": 1},', "a", "no end; the file is truncated"),
        (lines(QA) + "3\n", "a", "line 2: expected an object with named fields, found 3"),
        ('["one", "two"]', "a.json", "line 1: expected an object.*found 'one'"),
        ("[]", "a.json", "contains no records"),
        ("", "a.jsonl", "contains no records"),
        (b"\xff\xfe\x00", "a.json", "UTF-8"),
        (gzip.compress(lines(QA).encode(), mtime=0)[:-9], "a.jsonl", "compressed by gzip"),
    ],
    ids=["value", "comma", "end", "number", "string", "empty_array", "empty", "not_utf8", "cut"],
)
def test_damaged_data_is_named_with_its_line(write, content, name, message):
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        sources.read(str(write(content, name)))


def test_parquet_is_read_or_needs_pyarrow(write, tmp_path, monkeypatch):
    path = write(b"PAR1 damaged", "data.bin")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(UserError, match="data.bin is a Parquet file: pip install pyarrow"):
            sources.read(str(path))
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet files are not read without pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    with pytest.raises(UserError, match="Cannot read .*data.bin"):
        sources.read(str(path))
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": CHAT}]), tmp_path / "rows")
    (record,) = sources.read(str(tmp_path / "rows"))
    assert forms.example(record).messages == tuple(CHAT)


def test_tables_are_refused_and_missing_files_named(write):
    with pytest.raises(UserError, match="data.csv is a table.*convert it to JSON Lines"):
        sources.read(str(write("a,b\n1,2\n", "data.csv")))
    for name in ("no/data.parquet", "no/data.jsonl", "no/data.csv"):
        with pytest.raises(UserError, match=f"--data {name}: there is no such file"):
            sources.read(name)


def test_a_hub_dataset_needs_a_package_and_the_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="--data openai/gsm8k:main:test .*pip install datasets"):
        sources.read("openai/gsm8k:main:test")


def test_a_hub_dataset_is_read_by_name_configuration_and_split(monkeypatch):
    calls = []

    class Datasets:
        @staticmethod
        def load_dataset(*args, **options):
            calls.append((args, options))
            if args[0] == "a/missing":
                raise ConnectionError("no network\nand more")
            return [QA]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    for source in ("a/b", "a/b:main", "a/b:main:test", "a/b::test"):
        assert [record.fields for record in sources.read(source)] == [QA]
    assert calls == [
        (("a/b", None), {"split": "train"}),
        (("a/b", "main"), {"split": "train"}),
        (("a/b", "main"), {"split": "test"}),
        (("a/b", None), {"split": "test"}),
    ]
    with pytest.raises(UserError, match=r"a/missing.*ConnectionError: no network\)"):
        sources.read("a/missing")


# ------------------------------------------------------------------------------ forms


def record(**fields) -> sources.Record:
    return sources.Record("data, line 7", fields)


def asked(question: str, answer: str):
    return ({"role": "user", "content": question}, {"role": "assistant", "content": answer})


@pytest.mark.parametrize(
    ("fields", "messages", "plain"),
    [
        ({"messages": CHAT}, tuple(CHAT), None),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
            asked("Hi", "Yo"),
            None,
        ),
        ({"conversations": CHAT}, tuple(CHAT), None),
        ({"prompt": "a ", "completion": "b"}, None, ("a ", "b")),
        ({"prompt": "a ", "response": "b"}, None, ("a ", "b")),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, tuple(CHAT), None),
        (QA, asked(QA["question"], QA["answer"]), ("Question: 2+2?\nAnswer:", " " + QA["answer"])),
        (
            {"instruction": "Add.", "input": "2, 2", "output": "4", "text": "all of it"},
            asked("Add.\n\n2, 2", "4"),
            ("### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response:\n", "4"),
        ),
        (
            {"instruction": "Add.", "context": "", "response": "4", "category": "x"},
            asked("Add.", "4"),
            ("### Instruction:\nAdd.\n\n### Response:\n", "4"),
        ),
    ],
)
def test_the_fields_decide_the_form(fields, messages, plain):
    read = forms.example(record(**fields))
    assert read.messages == messages and read.plain == plain and read.where == "data, line 7"


def test_content_in_parts_and_tools_are_read():
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    tools = [{"name": "f"}]
    chat = [CHAT[0], {"role": "assistant", "content": parts, "tool_calls": None}]
    read = forms.example(record(messages=chat, tools=tools))
    assert read.messages == tuple(CHAT) and read.tools == tools
    call = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert forms.example(record(messages=call)).messages[1]["content"] == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": 3, "body": "x"}, "fields body, id are none of the known forms: messages"),
        ({}, r"fields \(none\) are none"),
        ({"question": "x", "answer": None}, "none of the known forms"),
        ({"question": "x", "answer": 4}, "the field answer is a int"),
        ({"instruction": ["x"], "output": "y"}, "the field instruction is a list"),
        ({"messages": "Hi"}, "expected a list of messages, found 'Hi'"),
        ({"messages": []}, "expected a list of messages"),
        ({"messages": [{"content": "Hi"}]}, "message 0: expected role and content"),
        ({"messages": [{"role": "assistant"}]}, "message 0: its content is not a string"),
        ({"messages": CHAT[:1]}, "no message has the role assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text"),
        ({"conversations": [{"from": "bystander", "value": "x"}]}, "speaker 'bystander'"),
        ({"prompt": "x", "completion": 3}, "found str and int"),
        ({"text": "x"}, "expected instructions and answers, found text"),
    ],
)
def test_unknown_forms_are_named(fields, message):
    with pytest.raises(UserError, match=f"data, line 7.*{message}"):
        forms.example(record(**fields))


def test_documents_and_answers_do_not_mix():
    assert forms.document(record(text="x", title="t")) == "x"
    with pytest.raises(UserError, match="line 7: expected the field text, found answer, question"):
        forms.document(record(**QA))
