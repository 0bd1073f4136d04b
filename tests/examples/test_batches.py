"""Batches depend only on the seed and the step; an epoch has every example once."""

import numpy as np

from common import batches


def test_spread_takes_the_first_the_last_and_no_window_twice():
    windows = np.arange(100)[:, None]
    chosen = batches.spread(windows, 7).ravel().tolist()
    assert len(set(chosen)) == 7 and chosen[0] == 0 and chosen[-1] == 99
    assert len(batches.spread(windows, 1000)) == 100


def test_an_epoch_visits_every_window_once():
    windows = np.arange(12)[:, None]
    epochs = [
        np.concatenate(list(batches.batches(windows, 4, 0, range(first, first + 3)))).ravel()
        for first in (0, 3)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert not np.array_equal(*epochs)


def test_a_batch_that_crosses_epochs_is_full():
    windows = np.arange(5)[:, None]
    assert [len(batch) for batch in batches.batches(windows, 4, 0, range(4))] == [4] * 4
    assert len(batches.batch_at(windows, 12, 0, 0)) == 12


def test_batches_depend_on_the_seed_and_the_step_alone():
    windows = np.arange(50)[:, None]
    started_late = list(batches.batches(windows, 4, 1, range(7, 9)))
    np.testing.assert_array_equal(started_late[1], batches.batch_at(windows, 4, 1, 8))
    assert not np.array_equal(
        batches.batch_at(windows, 4, 1, 8), batches.batch_at(windows, 4, 2, 8)
    )


def test_arrays_of_one_tree_are_shuffled_alike():
    examples = {"image": np.arange(10), "label": 2 * np.arange(10)}
    batch = batches.batch_at(examples, 4, 0, 3)
    np.testing.assert_array_equal(batch["label"], 2 * batch["image"])
