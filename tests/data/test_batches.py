from types import SimpleNamespace

import numpy as np
import pytest

from peft_jax.core.rows import real_tokens
from peft_jax.data import Batches, Encoded, eval_batches, prompt_batches
from peft_jax.data.batches import stack
from peft_jax.data.packing import best_widths
from peft_jax.errors import PeftJaxError

COLLATIONS = ("pad", "bucket", "pack")
ROWS = {"pad": "lengths", "bucket": "lengths", "pack": "segment_ids"}  # what says which tokens are real


def config(collate="pad", **changes):
    defaults = {"batch_size": 8, "width_multiple": 8, "buckets": 3, "rows": 0, "row_length": 0}
    return SimpleNamespace(collate=collate, **{**defaults, **changes})


def made(count=101, seed=0, longest=60):
    """Sequences of skewed lengths whose every token says which example and which place it is."""
    rng = np.random.default_rng(seed)
    encoded = []
    for example in range(count):
        length = int(np.clip(rng.gamma(3, 6), 3, longest))
        mask = np.zeros(length, bool)
        mask[rng.integers(1, length) :] = True
        if rng.random() < 0.3:  # as in a chat: several answers
            mask[1 : length // 2] = rng.random(length // 2 - 1) < 0.5
        encoded.append(Encoded(1000 * (example + 1) + np.arange(length, dtype=np.int32), mask, example))
    return encoded


def segments(batch):
    """The sequences that lie in a batch, read back from segment_ids or lengths alone."""
    found = []
    for ids, segment, positions in zip(batch["input_ids"], segments_of(batch), batch["positions"], strict=True):
        for number in range(1, segment.max() + 1):
            (where,) = np.nonzero(segment == number)
            assert (np.diff(where) == 1).all(), "a segment must be contiguous"
            assert positions[where].tolist() == list(range(len(where)))
            found.append(ids[where])
        assert (ids[segment == 0] == 0).all() and (positions[segment == 0] == 0).all()
    return found


def segments_of(batch):
    """segment_ids, of rows of one example each too."""
    return batch["segment_ids"] if "segment_ids" in batch else real_tokens(batch).astype(np.int32)


def check_losses(batch):
    """Every target is the next token of the same segment; empty slots weigh nothing."""
    for row in range(len(batch["input_ids"])):
        real = batch["loss_weight"][row] > 0
        index, target = batch["loss_index"][row][real], batch["loss_target"][row][real]
        assert (batch["input_ids"][row][index + 1] == target).all()
        segment = segments_of(batch)[row]
        assert (segment[index + 1] == segment[index]).all()
        assert (segment[index] > 0).all() and len(set(index.tolist())) == len(index)


def targets(batches):
    return sorted(t for b in batches for t in b["loss_target"][b["loss_weight"] > 0].tolist())


@pytest.mark.parametrize("collate", COLLATIONS)
@pytest.mark.parametrize("count, batch_size", [(101, 8), (64, 8), (17, 16), (3, 8), (1, 4), (50, 1)])
def test_every_example_once_per_epoch_and_never_mixed(collate, count, batch_size):
    encoded = made(count)
    batches = Batches(encoded, config(collate, batch_size=batch_size), seed=3)
    assert batches.num_steps_per_epoch == -(-count // batch_size)
    for epoch in range(3):
        steps = [batches.at(epoch * batches.num_steps_per_epoch + i) for i in range(batches.num_steps_per_epoch)]
        found = [segment for batch in steps for segment in segments(batch)]
        assert sorted(s[0] // 1000 - 1 for s in found) == list(range(count))
        assert all(s.tolist() == encoded[s[0] // 1000 - 1].input_ids.tolist() for s in found)
        assert all(len(segments(batch)) <= batch_size for batch in steps)
        for batch in steps:
            check_losses(batch)
        assert targets(steps) == sorted(t for e in encoded for t in e.input_ids[e.loss_mask].tolist())


@pytest.mark.parametrize("collate", COLLATIONS)
def test_dtypes_and_equal_shapes_within_a_batch(collate):
    for batch in (Batches(made(), config(collate)).at(i) for i in range(5)):
        assert {k: v.dtype for k, v in batch.items()} == {
            **dict.fromkeys(("input_ids", ROWS[collate], "positions", "loss_index", "loss_target"), np.int32),
            "loss_weight": np.float32,
        }
        assert batch["input_ids"].shape == segments_of(batch).shape == batch["positions"].shape
        assert batch[ROWS[collate]].shape == batch["input_ids"].shape[:2 if collate == "pack" else 1]
        assert batch["loss_index"].shape == batch["loss_target"].shape == batch["loss_weight"].shape


@pytest.mark.parametrize("collate", COLLATIONS)
def test_a_step_is_a_function_of_seed_and_step_alone(collate):
    encoded = made()
    straight = Batches(encoded, config(collate), seed=5)
    for step in range(30):
        batch = straight.at(step)
    resumed = Batches(encoded, config(collate), seed=5).at(29)
    assert all((batch[key] == resumed[key]).all() for key in batch)
    other = Batches(encoded, config(collate), seed=6).at(29)
    assert any(batch[key].shape != other[key].shape or (batch[key] != other[key]).any() for key in batch)
    assert not np.array_equal(straight.order(0), straight.order(1))


@pytest.mark.parametrize("collate, most", [("pad", 8), ("bucket", 3), ("pack", 1)])
def test_few_shapes(collate, most):
    batches = Batches(made(400), config(collate), seed=1)
    steps = [batches.at(i) for i in range(3 * batches.num_steps_per_epoch)]
    shapes = {(b["input_ids"].shape, b["loss_index"].shape) for b in steps}
    assert len(shapes) <= most and all(width % 8 == 0 for (_, width), _ in shapes)


def test_packing_wastes_least_and_bucketing_less_than_padding():
    pad, bucket, pack = (Batches(made(2000), config(c, batch_size=16)).describe()["efficiency"] for c in COLLATIONS)
    assert pad < bucket < pack and pack > 0.85


@pytest.mark.parametrize("collate", ("pad", "pack"))
def test_steps_of_an_epoch_have_nearly_equally_many_examples(collate):
    sizes = (Batches(made(101), config(collate)).order(0) >= 0).sum(axis=1)
    assert sizes.max() - sizes.min() <= 1 and sizes.max() <= 8


def test_efficiency_is_what_the_batches_hold():
    batches = Batches(made(), config("bucket"))
    steps = [batches.at(i) for i in range(batches.num_steps_per_epoch)]
    real, area = sum(real_tokens(b).sum() for b in steps), sum(b["input_ids"].size for b in steps)
    assert batches.describe()["efficiency"] == pytest.approx(real / area)
    assert batches.describe()["shapes"] == len({b["input_ids"].shape for b in steps})


def test_packing_holds_when_equal_lengths_have_unequal_answers():
    """A cut between strata may fall among equal lengths; which of them lies on which side changes with the epoch."""
    encoded = [Encoded(np.arange(1, 11, dtype=np.int32), np.arange(10) >= 10 - 1 - 8 * (i % 2), i) for i in range(30)]
    batches = Batches(encoded, config("pack", batch_size=4))
    for step in range(5 * batches.num_steps_per_epoch):
        check_losses(batches.at(step))
        segments(batches.at(step))


def test_packing_takes_rows_and_row_length():
    assert Batches(made(), config("pack", rows=4)).at(0)["input_ids"].shape[0] == 4
    wide = Batches(made(), config("pack", row_length=256)).at(0)["input_ids"]
    assert wide.shape == (1, 256)
    with pytest.raises(PeftJaxError, match="row_length=40 is too short: 8 examples in 8 rows need"):
        Batches(made(), config("pack", row_length=40))
    with pytest.raises(PeftJaxError, match="examples in 1 rows need"):
        Batches(made(), config("pack", rows=1, row_length=64))


def test_best_widths_pads_as_little_as_any_choice():
    import itertools

    lengths = np.array([len(e.input_ids) for e in made(200)])
    candidates = np.unique(-(-lengths // 8) * 8)

    def area(widths):
        return sum(min(w for w in widths if w >= n) for n in lengths)

    for count in (1, 2, 3, 99):
        choices = itertools.combinations(candidates, min(count, len(candidates)))
        least = min(area(c) for c in choices if c[-1] >= lengths.max())
        widths = best_widths(lengths, count, 8)
        assert area(widths) == least and len(widths) <= count and (np.diff(widths) > 0).all()


@pytest.mark.parametrize("collate", COLLATIONS)
def test_accumulation_stacks_consecutive_micro_batches(collate):
    encoded = made()
    plain, stacked = (
        Batches(encoded, config(collate), seed=2),
        Batches(encoded, config(collate), seed=2, accumulate_steps=3),
    )
    assert stacked.num_steps_per_epoch == -(-plain.num_steps_per_epoch // 3)
    for step in range(6):  # past the end of an epoch
        batch, singles = stacked.at(step), [plain.at(3 * step + i) for i in range(3)]
        for i, single in enumerate(singles):
            for key, value in single.items():
                tokens = value.shape[1:]
                assert (batch[key][(i, slice(None), *map(slice, tokens))] == value).all()
                assert not tokens or not batch[key][i, :, tokens[0] :].any()
    assert stacked.num_steps(2) == round(2 * plain.num_steps_per_epoch / 3)


def test_padding_is_the_pad_token_and_weighs_nothing():
    """Rows and micro-batches alike; in all but ids what is added is 0."""
    encoded = [Encoded(np.arange(1, n + 1, dtype=np.int32), np.arange(n) > 0) for n in (3, 5)]
    padded = Batches(encoded, config(width_multiple=8, batch_size=2), pad_id=7).at(0)
    assert sorted(padded["input_ids"].tolist()) == [[1, 2, 3, 4, 5, 7, 7, 7], [1, 2, 3, 7, 7, 7, 7, 7]]
    single = [Batches([one], config(width_multiple=1, batch_size=1), pad_id=7).at(0) for one in encoded]
    both = stack(single, pad_id=7)
    assert both["input_ids"].tolist() == [[[1, 2, 3, 7, 7]], [[1, 2, 3, 4, 5]]]
    assert both["lengths"].tolist() == [[3], [5]]
    assert segments_of(both).tolist() == [[[1, 1, 1, 0, 0]], [[1] * 5]]
    assert both["positions"].tolist() == [[[0, 1, 2, 0, 0]], [[0, 1, 2, 3, 4]]]
    assert both["loss_weight"].tolist() == [[[1, 1, 0, 0]], [[1] * 4]]
    assert both["loss_target"].tolist() == [[[2, 3, 0, 0]], [[2, 3, 4, 5]]]
    stacked = Batches(encoded, config(width_multiple=1, batch_size=1), accumulate_steps=2, pad_id=7).at(0)
    assert sorted(stacked["input_ids"][:, 0].tolist()) == [[1, 2, 3, 4, 5], [1, 2, 3, 7, 7]]


def test_steps_of_a_part_of_an_epoch_are_at_least_one():
    batches = Batches(made(101), config())
    assert [batches.num_steps(epochs) for epochs in (0.01, 0.5, 1, 2.5)] == [1, 6, 13, 32]


def test_describe_tells_the_widest_row_and_the_most_answers():
    encoded = [Encoded(np.ones(n, np.int32), np.arange(n) >= n - m) for n, m in ((4, 3), (4, 1), (20, 9), (20, 2))]
    for collate, most in (("pad", 9), ("bucket", 9)):
        found = Batches(encoded, config(collate, batch_size=2)).describe()
        assert (found["widest"], found["loss_positions"], found["rows"]) == (24, most, 2)
    for seed in range(5):  # an empty slot is as wide as nothing, whichever example the batch leaves out
        found = Batches(encoded[:3], config(batch_size=2, width_multiple=1), seed=seed)
        batches = [found.at(step) for step in range(found.num_steps_per_epoch)]
        assert found.describe()["efficiency"] == pytest.approx(28 / sum(b["input_ids"].size for b in batches))


def test_eval_batches_are_finite_in_order_and_weigh_missing_rows_nothing():
    encoded = made(21)
    batches = list(eval_batches(encoded, SimpleNamespace(batch_size=8, width_multiple=8, buckets=2)))
    assert (
        len(batches) == 3
        and len({b["input_ids"].shape for b in batches}) <= 2
        and all(len(b["input_ids"]) == 8 for b in batches)
    )
    found = [segment[0] // 1000 - 1 for batch in batches for segment in segments(batch)]
    assert found == list(range(21))
    assert not batches[-1]["loss_weight"][5:].any() and not segments_of(batches[-1])[5:].any()
    for batch in batches:
        check_losses(batch)
    assert targets(batches) == sorted(t for e in encoded for t in e.input_ids[e.loss_mask].tolist())


def test_prompts_are_left_padded_and_numbered():
    prompts = [e.input_ids for e in made(21)]
    seen, longest = [], 0
    for numbers, batch in prompt_batches(prompts, 8, width_multiple=16, pad_id=7):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape == (8, ids.shape[1]) and ids.shape[1] % 16 == 0 and ids.dtype == np.int32
        assert (np.diff(mask, axis=1) >= 0).all() and mask[:, -1].all()
        for number, row, real in zip(numbers, ids, mask, strict=True):
            assert number == -1 or row[real == 1].tolist() == prompts[number].tolist()
            assert (row[real == 0] == 7).all()
        real = mask.sum(axis=1)
        assert real.min() >= longest and ids.shape[1] == -(-real.max() // 16) * 16  # like lengths together, tight
        longest = real.max()
        seen += [n for n in numbers.tolist() if n >= 0]
    assert sorted(seen) == list(range(21))


@pytest.mark.parametrize(
    "encoded, changes, message",
    [
        ([], {}, "no examples"),
        ([Encoded(np.zeros(0, np.int32), np.zeros(0, bool))], {}, "no tokens"),
        (made(3), {"collate": "packed"}, "did you mean pack"),
        (made(3), {"batch_size": 0}, "data.batch_size=0 must be at least 1"),
        (made(3), {"width_multiple": 0}, "data.width_multiple=0 must be at least 1"),
        (made(3), {"buckets": 0}, "data.buckets=0 must be at least 1"),
        (made(3), {"accumulate_steps": 0}, "accumulate_steps=0 must be at least 1"),
    ],
)
def test_errors(encoded, changes, message):
    accumulate = changes.pop("accumulate_steps", 1)
    with pytest.raises(PeftJaxError, match=message):
        Batches(encoded, config(**{"collate": "pad", **changes}), accumulate_steps=accumulate)
