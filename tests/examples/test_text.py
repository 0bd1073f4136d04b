"""Held-out text stays apart from training text, and batches depend on seed and step alone."""

import gzip

import numpy as np
import pytest
import text
from errors import UserError
from tiny_llama import byte_tokenizer

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


def test_spread_takes_the_first_the_last_and_no_window_twice():
    windows = np.arange(100)[:, None]
    chosen = text.spread(windows, 7).ravel().tolist()
    assert len(set(chosen)) == 7 and chosen[0] == 0 and chosen[-1] == 99
    assert len(text.spread(windows, 1000)) == 100


def test_an_epoch_visits_every_window_once():
    windows = np.arange(12)[:, None]
    epochs = [
        np.concatenate(list(text.batches(windows, 4, 0, range(first, first + 3)))).ravel()
        for first in (0, 3)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert not np.array_equal(*epochs)


def test_a_batch_that_crosses_epochs_is_full():
    windows = np.arange(5)[:, None]
    assert [len(batch) for batch in text.batches(windows, 4, 0, range(4))] == [4] * 4
    assert len(text.batch_at(windows, 12, 0, 0)) == 12


def test_batches_depend_on_the_seed_and_the_step_alone():
    windows = np.arange(50)[:, None]
    started_late = list(text.batches(windows, 4, 1, range(7, 9)))
    np.testing.assert_array_equal(started_late[1], text.batch_at(windows, 4, 1, 8))
    assert not np.array_equal(text.batch_at(windows, 4, 1, 8), text.batch_at(windows, 4, 2, 8))


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
