"""Packing, bucketing and padding: which examples go into which step, and how they lie in it, as pure functions.

A collation is two functions. ``layout`` looks at the lengths once and fixes the shapes of the whole run; rows are a
``multiple``, so that devices can share them, the last ones empty where examples do not fill them. ``order``
shuffles one epoch: an array (steps, slots) of example numbers, -1 for an empty slot, in which every example stands
exactly once.
"""

from typing import NamedTuple

import numpy as np

from peft_jax.errors import PeftJaxError


class Layout(NamedTuple):
    """The shapes of a run: slot s of a step lies in row ``slot_row[s]``, the examples of a row one after another.

    slot_row: (slots,) int. num_rows: rows of a batch. widths: (k,) the row widths that occur, rising; a step takes the
    first that holds its longest row. loss_counts: (k,) loss positions per row at that width. packed: whether a row may
    hold several examples.
    """

    slot_row: np.ndarray
    num_rows: int
    widths: np.ndarray
    loss_counts: np.ndarray
    packed: bool = False


def round_up(lengths, multiple: int):
    """The next multiple, for a number or an array."""
    return -(-np.asarray(lengths) // multiple) * multiple


def _num_steps(num_examples: int, batch_size: int) -> int:
    return -(-num_examples // batch_size)


# Padding: batch_size random examples, one to a row, as wide as the longest.


def pad_layout(lengths: np.ndarray, answers: np.ndarray, config, multiple: int) -> Layout:
    return _one_per_row(lengths, answers, np.unique(round_up(lengths, config.width_multiple)), config, multiple)


def pad_order(rng: np.random.Generator, lengths: np.ndarray, layout: Layout) -> np.ndarray:
    """Batches whose sizes differ by one at most: a short last batch would be a noisy step."""
    slots = len(layout.slot_row)
    steps = _num_steps(len(lengths), slots)
    return _filled(rng.permutation(len(lengths)), slots * steps).reshape(slots, steps).T


def _one_per_row(lengths: np.ndarray, answers: np.ndarray, widths: np.ndarray, config, multiple: int) -> Layout:
    loss_counts = np.array([max(1, answers[lengths <= width].max()) for width in widths])
    return Layout(np.arange(config.batch_size), int(round_up(config.batch_size, multiple)), widths, loss_counts)


def _filled(members: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([members, np.full(size - len(members), -1, members.dtype)])


# Bucketing: few widths; a batch holds random examples of one width.


def bucket_layout(lengths: np.ndarray, answers: np.ndarray, config, multiple: int) -> Layout:
    widths = best_widths(lengths, config.buckets, config.width_multiple)
    return _one_per_row(lengths, answers, widths, config, multiple)


def bucket_order(rng: np.random.Generator, lengths: np.ndarray, layout: Layout) -> np.ndarray:
    """What does not fill a batch of its width moves up to the next one, so one batch of an epoch at most is not
    full.
    """
    slots, bucket = len(layout.slot_row), np.searchsorted(layout.widths, lengths)
    batches, left = [], np.empty(0, np.int64)
    for k in range(len(layout.widths)):
        left = rng.permutation(np.concatenate([left, np.flatnonzero(bucket == k)]))
        full = len(left) // slots * slots
        batches.append(left[:full].reshape(-1, slots))
        left = left[full:]
    if len(left):
        batches.append(_filled(left, slots)[None])
    return rng.permutation(np.concatenate(batches))


def best_widths(lengths: np.ndarray, count: int, multiple: int) -> np.ndarray:
    """The at most ``count`` widths (multiples of ``multiple``) that pad the least: exact, by dynamic programming.

    Each length takes the smallest width that holds it. Returns (k,) rising, the last one holds the longest.
    """
    widths, members = np.unique(round_up(lengths, multiple), return_counts=True)
    total = np.cumsum(members)
    # area[i, j]: examples wider than widths[i] and up to widths[j], all padded to widths[j].
    area = np.where(np.tri(len(widths), dtype=bool), np.inf, widths[None, :] * (total[None, :] - total[:, None]))
    best, came_from = widths * total.astype(np.float64), []
    for _ in range(min(count, len(widths)) - 1):
        options = best[:, None] + area
        came_from.append(np.where(options.min(axis=0) < best, options.argmin(axis=0), -1))
        best = np.minimum(best, options.min(axis=0))
    return widths[_walk_back(len(widths) - 1, came_from)]


def _walk_back(last: int, came_from: list[np.ndarray]) -> list[int]:
    chosen = [last]
    for previous in reversed(came_from):
        if previous[chosen[0]] >= 0:
            chosen.insert(0, int(previous[chosen[0]]))
    return chosen


# Packing: batch_size examples in few full rows, one shape for the whole run.
#
# The examples, sorted by length, are cut into batch_size strata, and every step draws one example from each. So every
# step has the same mix of lengths, and a layout that holds the longest example of every stratum holds every step:
# nothing is ever carried over, dropped or recompiled, and a step still means batch_size examples, as with the other
# collations.


def pack_layout(lengths: np.ndarray, answers: np.ndarray, config, multiple: int) -> Layout:
    strata = _strata(np.argsort(-lengths, kind="stable"), config.batch_size)
    longest = lengths[strata[:, 0]]
    row_of, width = _rows(longest, config, multiple)
    counts = np.bincount(row_of, weights=_most_answers(strata, lengths, answers), minlength=row_of.max() + 1)
    num_rows = int(round_up(max(config.rows, int(row_of.max()) + 1), multiple))
    return Layout(row_of, num_rows, np.array([width]), np.array([max(1, min(int(counts.max()), width))]), True)


def pack_order(rng: np.random.Generator, lengths: np.ndarray, layout: Layout) -> np.ndarray:
    by_length = np.lexsort((rng.random(len(lengths)), -lengths))  # equal lengths in a new order every epoch
    return rng.permuted(_strata(by_length, len(layout.slot_row)), axis=1).T


def _strata(by_length: np.ndarray, batch_size: int) -> np.ndarray:
    """(strata, steps): longest stratum first; only the last, the shortest, may have empty places (-1)."""
    steps = _num_steps(len(by_length), batch_size)
    strata = _num_steps(len(by_length), steps)
    return _filled(by_length, strata * steps).reshape(strata, steps)


def _most_answers(strata: np.ndarray, lengths: np.ndarray, answers: np.ndarray) -> list[int]:
    """Per stratum: examples as long as its ends may lie on either side of the cut, so they count for both."""
    ends = [(lengths[row[0]], lengths[row[row >= 0][-1]]) for row in strata]
    return [answers[(lengths <= high) & (lengths >= low)].max() for high, low in ends]


def _rows(longest: np.ndarray, config, multiple: int) -> tuple[np.ndarray, int]:
    """(row of each stratum, row width). ``config.rows`` and ``config.row_length`` are taken where given (not 0)."""
    options = []
    for rows in [config.rows] if config.rows else range(1, len(longest) + 1):
        row_of, loads = _spread(longest, rows)
        width = int(round_up(loads.max(), config.width_multiple))
        if not config.row_length or loads.max() <= config.row_length:
            options.append((row_of, config.row_length or width, round_up(rows, multiple)))
    if not options:
        needed = _spread(longest, config.rows or len(longest))[1].max()
        raise PeftJaxError(
            f"data.row_length={config.row_length} is too short: {config.batch_size} examples in "
            f"{config.rows or len(longest)} rows need {needed} tokens a row; raise it, or set data.rows or "
            "data.row_length to 0"
        )
    # Area, and attention, whose share grows with the width (in a small model a few thousand tokens equal the rest).
    row_of, width, _ = min(options, key=lambda option: option[1] * option[2] * (1 + option[1] / 4096))
    return row_of, width


def _spread(sizes: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(row of each size, load of each row): the largest first, each into the emptiest row (Graham 1969)."""
    loads, row_of = np.zeros(rows, np.int64), np.zeros(len(sizes), np.int64)
    for i in np.argsort(-sizes, kind="stable"):
        row_of[i] = loads.argmin()
        loads[row_of[i]] += sizes[i]
    return row_of, loads


COLLATIONS = {
    "pad": (pad_layout, pad_order),
    "bucket": (bucket_layout, bucket_order),
    "pack": (pack_layout, pack_order),
}
