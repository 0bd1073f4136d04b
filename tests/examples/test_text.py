"""Held-out and training text are disjoint; errors name the unreadable file."""

import gzip

import numpy as np
import pytest

from common.data import text
from common.errors import UserError
from tests.examples.tiny_llama import byte_tokenizer

WIKIPEDIA = '<doc id="1" title="A">\nA\n\nFirst.\n\n</doc>\n<doc id="2" title="B">\nB.\n\n</doc>\n'
WIKITEXT = " = A = \n\n First . \n = = Part = = \n more \n = B = \n second \n"


@pytest.mark.parametrize(
    ("raw", "documents"),
    [
        (WIKIPEDIA, ["A\n\nFirst.", "B."]),
        (WIKITEXT, ["= A = \n\n First . \n = = Part = = \n more", "= B = \n second"]),
        ("one\ntwo\n\n\nthree\n", ["one\ntwo", "three"]),
    ],
)
def test_text_splits_into_its_articles_or_paragraphs(raw, documents):
    assert text.split_documents(raw) == documents


@pytest.mark.parametrize("count", [2, 9, 10, 11, 19, 20, 235])
def test_every_document_is_trained_on_or_held_out_but_not_both(count):
    documents = [str(n) for n in range(count)]
    train, held_out = text.hold_out(documents)
    assert sorted(train + held_out) == sorted(documents)
    assert held_out and len(held_out) <= max(1, count / 10)


def test_a_single_document_cannot_be_split():
    with pytest.raises(UserError, match="--eval-data"):
        text.hold_out(["only"])


def test_windows_predict_each_token_once():
    tokenizer = byte_tokenizer()
    documents = ["abcdefghij", "klm"]  # 17 tokens with the empty lines: 16 predictions
    windows = text.windows(tokenizer, documents, 4, "training")
    assert windows.shape == (4, 5) and windows.dtype == np.int32
    ids = tokenizer.encode("abcdefghij\n\nklm\n\n").ids
    assert windows[:, 1:].ravel().tolist() == ids[1:]
    np.testing.assert_array_equal(windows[1:, 0], windows[:-1, -1])


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(UserError, match="held-out text has 5 tokens.*--seq-len"):
        text.windows(byte_tokenizer(), ["abc"], 5, "held-out")


def test_compressed_text_reads_as_plain_text_does(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n\ntwo"))
    assert text.load_documents(str(tmp_path / "a.txt.gz")) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"\xff\xfe\x00"),
        ("b.gz", b"text"),
        ("c.gz", gzip.compress(b"text" * 99, mtime=0)[:-9]),
    ],
    ids=["not_utf8", "not_gzip", "cut"],  # the same in every process
)
def test_unreadable_text_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"Cannot read .*{name}.*UTF-8"):
        text.load_documents(str(tmp_path / name))


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match="--data missing/file.txt: there is no such file"):
        text.load_documents("missing/file.txt")
