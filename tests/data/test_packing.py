"""The shapes of a run and the order of its epochs: how many rows, how wide, how many answers, what changes."""

import numpy as np
import pytest

from peft_jax.data import Batches, Encoded
from peft_jax.errors import PeftJaxError
from tests.data.test_batches import COLLATIONS, check_losses, config, made, segments


def sequences(lengths, answers):
    """One sequence of each length, whose last tokens are its answer."""
    return [Encoded(np.full(n, i + 1, np.int32), np.arange(n) >= n - m, i)
            for i, (n, m) in enumerate(zip(lengths, answers, strict=True))]


def test_packing_has_room_for_the_longest_answers_that_may_meet():
    """All of one length, so that any of them may meet in a row in a later epoch: the many answers as well."""
    encoded = sequences([10] * 16, [1] * 8 + [9] * 8)
    batches = Batches(encoded, config("pack", batch_size=4, rows=2))
    assert batches.describe()["loss_positions"] == 9 + 9
    most = 0
    for step in range(20 * batches.num_steps_per_epoch):
        batch = batches.at(step)
        check_losses(batch)
        assert len(segments(batch)) == 4
        most = max(most, int(batch["loss_weight"].sum(axis=1).max()))
    assert most == 18  # it did happen


def test_packing_has_no_more_room_for_answers_than_lengths_allow():
    """The short ones have long answers, but where a row's strata are long ones there is one answer each."""
    encoded = sequences([20, 20, 20, 20, 8, 8, 8, 8], [1, 1, 1, 1, 7, 7, 7, 7])
    batches = Batches(encoded, config("pack", batch_size=2, rows=2))
    assert batches.layout.slot_row.tolist() == [0, 1] and batches.describe()["loss_positions"] == 7
    alone = Batches(encoded, config("pack", batch_size=2, rows=1)).describe()
    assert (alone["loss_positions"], alone["widest"], alone["rows"]) == (1 + 7, 32, 1)


@pytest.mark.parametrize("collate", COLLATIONS)
def test_examples_without_an_answer_weigh_nothing(collate):
    batch = Batches([Encoded(np.array([5, 6], np.int32), np.zeros(2, bool))], config(collate)).at(0)
    assert batch["loss_weight"].shape[1] == 1 and not batch["loss_weight"].any()


@pytest.mark.parametrize("collate", COLLATIONS)
def test_rows_are_a_multiple_with_empty_ones_at_the_end(collate):
    plain, even = (Batches(made(), config(collate, batch_size=5, rows=3), row_multiple=n) for n in (1, 4))
    rows = plain.layout.num_rows
    assert rows == (3 if collate == "pack" else 5) and even.layout.num_rows == (4 if collate == "pack" else 8)
    for step in range(3):
        for name, leaf in even.at(step).items():
            np.testing.assert_array_equal(leaf[:rows], plain.at(step)[name])
            assert not leaf[rows:].any()


def test_packing_takes_more_rows_than_it_needs_and_rows_that_fit_to_the_token():
    assert Batches(made(), config("pack", batch_size=2, rows=4)).at(0)["input_ids"].shape[0] == 4
    encoded = sequences([10] * 8, [1] * 8)
    assert Batches(encoded, config("pack", batch_size=4, rows=2, row_length=20)).at(0)["input_ids"].shape == (2, 20)
    with pytest.raises(PeftJaxError, match="row_length=19 is too short: 4 examples in 2 rows need 20 tokens"):
        Batches(encoded, config("pack", batch_size=4, rows=2, row_length=19))


def test_packing_counts_rows_that_devices_would_leave_empty():
    """One sequence of 16 tokens and five of 8: one row of 56; where three devices share the rows, three of 24."""
    encoded = sequences([16] * 2 + [8] * 10, [1] * 12)
    for multiple, shape in ((1, (1, 56)), (3, (3, 24))):
        found = Batches(encoded, config("pack", batch_size=6), row_multiple=multiple).at(0)["input_ids"].shape
        assert found == shape


def test_packing_prefers_short_rows_where_they_waste_no_more():
    """Attention is dearer in a long row: eight full rows of 2048 rather than one of 16384."""
    encoded = sequences([2048] * 8, [1] * 8)
    assert Batches(encoded, config("pack", batch_size=8)).at(0)["input_ids"].shape == (8, 2048)


def neighbours(batches, epoch):
    """Which examples share a step, whatever the order of steps and slots."""
    return {frozenset(row[row >= 0].tolist()) for row in batches.order(epoch)}


@pytest.mark.parametrize("collate", COLLATIONS)
def test_examples_meet_others_in_each_epoch(collate):
    """Also where every length is its own, so that packing has no ties to break."""
    batches = Batches(sequences(range(10, 42), [1] * 32), config(collate, batch_size=4))
    assert not neighbours(batches, 0) & neighbours(batches, 1)
    equal = Batches(sequences([10] * 32, [1] * 32), config(collate, batch_size=4))
    assert not neighbours(equal, 0) & neighbours(equal, 1)


def test_steps_of_packing_do_not_run_from_long_to_short():
    """Each step draws from each stratum; were all drawn alike, some step would hold the shortest of every stratum."""
    batches = Batches(sequences(range(10, 42), [1] * 32), config("pack", batch_size=4))
    lengths = np.sort(batches.lengths[batches.order(0)].sum(axis=1))
    assert lengths[0] > sum((10, 18, 26, 34)) and lengths[-1] < sum((17, 25, 33, 41))


def test_packing_draws_anew_among_equal_lengths():
    """Two strata of one length: which example is in which stratum changes, so the first slot sees all of them."""
    batches = Batches(sequences([10] * 8, [1] * 8), config("pack", batch_size=2))
    assert {example for epoch in range(20) for example in batches.order(epoch)[:, 0].tolist()} == set(range(8))


def test_widths_of_buckets_come_in_mixed_order():
    batches = Batches(made(400), config("bucket"))
    widths = [batches.at(step)["input_ids"].shape[1] for step in range(batches.num_steps_per_epoch)]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)
    assert np.count_nonzero(np.diff(widths)) > 2 * len(set(widths))
