"""Padding carries no loss, batches are a function of (seed, epoch), and counts are those of the causal shift."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.errors import UserError
from trimtab.data.batches import IGNORED, batches, collate, token_count
from trimtab.data.encode import encode_all
from trimtab.data.encoded import Encoded
from trimtab.data.examples import PromptCompletion

PAD = 2
ROWS = [Encoded([5, 6, 7, 2], [False, False, True, True]), Encoded([8, 2], [True, True])]


def test_right_padding():
    batch = collate(ROWS, PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [8, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 2], [-100, 2, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert "token_type_ids" not in batch
    assert token_count(batch) == 3


def test_left_padding():
    batch = collate(ROWS, PAD, side="left")
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [2, 2, 8, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 2], [-100, -100, -100, 2]]
    assert token_count(batch) == 3


def test_the_end_token_is_trained_though_it_pads(chatml):
    assert chatml.pad_token_id == chatml.eos_token_id
    made = encode_all([PromptCompletion("a", "b"), PromptCompletion("a", "b " * 9)], chatml, max_length=None)
    labels = collate(made, chatml.pad_token_id)["labels"]
    assert (labels == chatml.eos_token_id).sum(1).tolist() == [1, 1]


def test_lengths_are_rounded_up():
    assert collate(ROWS, PAD, pad_to_multiple=8)["input_ids"].shape == (2, 8)
    assert collate(ROWS, PAD, pad_to_multiple=4)["input_ids"].shape == (2, 4)


def test_classes_and_numbers():
    rows = [Encoded([1, 2], [False, False], 1, [0, 1]), Encoded([1], [False], 0, [0])]
    batch = collate(rows, 0)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == torch.int64
    assert batch["token_type_ids"].tolist() == [[0, 1], [0, 0]]
    assert token_count(batch) == 2
    scores = collate([Encoded([1], [False], 0.5), Encoded([1], [False], 2.0)], 0)
    assert scores["labels"].dtype == torch.float32
    assert token_count(scores) == 2


def test_what_cannot_be_collated():
    with pytest.raises(ValueError, match="no sequences"):
        collate([], 0)
    with pytest.raises(ValueError, match="some sequences are labelled"):
        collate([ROWS[0], Encoded([1], [False], 1)], 0)
    with pytest.raises(UserError, match="pad_to_multiple=0"):
        collate(ROWS, 0, pad_to_multiple=0)
    with pytest.raises(UserError, match="unknown side"):
        collate(ROWS, 0, side="top")


SEQUENCES = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12), min_size=1, max_size=6
)


@settings(max_examples=80, deadline=None)
@given(SEQUENCES, st.sampled_from(["left", "right"]), st.integers(1, 9))
def test_padding_changes_nothing_that_counts(sequences, side, multiple):
    rows = [Encoded([token for token, _ in row], [on for _, on in row]) for row in sequences]
    batch = collate(rows, 9, pad_to_multiple=multiple, side=side)
    assert token_count(batch) == sum(row.targets for row in rows)
    assert batch["input_ids"].shape[1] % multiple == 0
    for row, ids, mask, labels in zip(
        rows, batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True
    ):
        assert ids[mask].tolist() == row.ids
        assert (labels[~mask] == IGNORED).all()
        on = labels[mask] != IGNORED
        assert on.tolist() == [False, *row.trained[1:]]
        assert labels[mask][on].tolist() == ids[mask][on].tolist()


def sized(lengths):
    return [Encoded([1] * length, [True] * length) for length in lengths]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 9), st.integers(0, 5), st.booleans(), st.booleans())
def test_every_index_occurs_once(lengths, size, epoch, shuffle, by_length):
    made = batches(sized(lengths), size, 7, epoch, shuffle=shuffle, by_length=by_length)
    assert sorted(index for batch in made for index in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= size for batch in made)
    assert len(made) == -(-len(lengths) // size)
    assert made == batches(sized(lengths), size, 7, epoch, shuffle=shuffle, by_length=by_length)


def test_epochs_and_seeds_differ():
    rows = sized(range(1, 60))
    orders = [batches(rows, 4, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1), (11, 1), (1, 11))]
    assert all(one != two for place, one in enumerate(orders) for two in orders[:place])
    assert batches(rows, 4, 0, 0, shuffle=False) == batches(rows, 4, 3, 5, shuffle=False)
    assert batches(rows, 4, 0, 0, shuffle=False)[0] == [0, 1, 2, 3]


def test_by_length_saves_padding():
    lengths = [(n * 37) % 101 + 1 for n in range(400)]

    def padded(made):
        return sum(len(batch) * max(lengths[index] for index in batch) for batch in made)

    rows = sized(lengths)
    assert padded(batches(rows, 8, 0, 0, by_length=True)) < 0.7 * padded(batches(rows, 8, 0, 0))
    made = batches(rows, 8, 0, 0, by_length=True)
    firsts = [lengths[batch[0]] for batch in made]
    assert firsts != sorted(firsts)
    assert batches(rows, 8, 0, 0, shuffle=False, by_length=True)[0] == sorted(range(400), key=lambda i: lengths[i])[:8]


@pytest.mark.parametrize("size", [0, -1, True])
def test_a_batch_size_is_positive(size):
    with pytest.raises(UserError, match="batch_size"):
        batches(ROWS, size, 0, 0)


def test_the_order_is_pinned():
    rows = sized([3, 1, 2, 5, 4, 8, 7, 6])
    assert batches(rows, 3, 0, 0) == [[0, 2, 1], [4, 6, 7], [3, 5]]
    assert batches(rows, 3, 0, 0, by_length=True) == [[4, 3, 7], [1, 2, 0], [6, 5]]
