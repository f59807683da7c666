"""Batches of static shape from encoded examples: for training, a pure function of (seed, step).

A batch is a dict of numpy arrays, B rows of S tokens with at most M loss positions each:
    input_ids    (B, S) int32
    lengths      (B,) int32      tokens of a row that holds one example, padded on the right; or, of packed rows,
    segment_ids  (B, S) int32    0 is padding, 1.. which example of the row
    positions    (B, S) int32    from 0 in every example
    loss_index   (B, M) int32    t: the hidden state there predicts ...
    loss_target  (B, M) int32    ... the token at t + 1, always of the same example, or the text's label (float32
                                 where labels are numbers)
    loss_weight  (B, M) float32  1, or 0 where the slot is empty
"""

from collections.abc import Iterator, Sequence

import numpy as np

from peft_jax.data.labelled import Labelled, targets
from peft_jax.data.packing import COLLATIONS, Layout, bucket_layout, round_up
from peft_jax.data.tokenize import Encoded
from peft_jax.errors import PeftJaxError, nearest

Batch = dict[str, np.ndarray]
One = Encoded | Labelled


class Batches:
    """Training batches without end: epoch after epoch, each in a new order, every example once in each.

    ``at(step)`` depends on (seed, step) alone, so a resumed run needs no state. With ``accumulate_steps`` > 1 a step
    has that many micro-batches, stacked on a leading axis and padded to the widest of them; they run on across the
    ends of epochs.

    Args:
      encoded: sequences; none may be empty.
      config: ``collate`` ("pad", "bucket", "pack"), ``batch_size`` (examples per micro-batch), ``width_multiple``
        (widths are multiples of it), ``buckets`` (how many widths "bucket" may use), ``rows`` and ``row_length``
        ("pack"; 0: chosen to waste the least).
      row_multiple: rows of a micro-batch are a multiple of it, empty ones at the end.
    Raises:
      PeftJaxError: unknown collation, a size below 1, no examples, rows too short for the examples.
    """

    def __init__(self, encoded: Sequence[One], config, seed: int = 0, accumulate_steps: int = 1, pad_id: int = 0,
                 row_multiple: int = 1):
        _check(config, accumulate_steps)
        _check_examples(encoded)
        self.encoded, self.seed, self.accumulate_steps, self.pad_id = encoded, seed, accumulate_steps, pad_id
        self.lengths, answers = _sizes(encoded)
        make_layout, self._order_of = COLLATIONS[config.collate]
        self.layout: Layout = make_layout(self.lengths, answers, config, row_multiple)
        self._epoch = (-1, np.empty((0, 0), np.int64))
        self.micro_batches_per_epoch = len(self.order(0))

    @property
    def num_steps_per_epoch(self) -> int:
        """Steps after which every example was seen, rounded up."""
        return -(-self.micro_batches_per_epoch // self.accumulate_steps)

    def num_steps(self, epochs: float) -> int:
        """Steps that make up ``epochs`` passes over the data, at least 1."""
        return max(1, round(epochs * self.micro_batches_per_epoch / self.accumulate_steps))

    def at(self, step: int) -> Batch:
        """The batch of a step; arrays (B, ...), or (accumulate_steps, B, ...) where that is more than 1."""
        first = step * self.accumulate_steps
        micro = [self._micro_batch(first + i) for i in range(self.accumulate_steps)]
        return stack(micro, self.pad_id) if self.accumulate_steps > 1 else micro[0]

    def order(self, epoch: int) -> np.ndarray:
        """(micro-batches, slots) example numbers of an epoch, -1 for an empty slot."""
        if self._epoch[0] != epoch:  # kept because every step asks for it; the same epoch always has the same order
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch = (epoch, self._order_of(rng, self.lengths, self.layout))
        return self._epoch[1]

    def _micro_batch(self, number: int) -> Batch:
        epoch, row = divmod(number, self.micro_batches_per_epoch)
        return fill(self.encoded, self.order(epoch)[row], self.layout, self.pad_id)

    def describe(self) -> dict[str, float]:
        """The first epoch: {"efficiency": real / computed tokens, "rows", "shapes", "widest", "loss_positions"}."""
        widths = [_width(members, self.lengths, self.layout)[0] for members in self.order(0)]
        area = self.layout.num_rows * sum(widths)
        return {
            "efficiency": float(self.lengths.sum() / area),
            "rows": self.layout.num_rows,
            "shapes": len(set(widths)),
            "widest": int(max(widths)),
            "loss_positions": int(self.layout.loss_counts.max()),
        }


def _check(config, accumulate_steps: int) -> None:
    if config.collate not in COLLATIONS:
        raise PeftJaxError(f"data.collate={config.collate!r} is not known; {nearest(config.collate, COLLATIONS)}")
    sizes = {f"data.{key}": getattr(config, key) for key in ("batch_size", "width_multiple", "buckets")}
    for key, value in {**sizes, "accumulate_steps": accumulate_steps}.items():
        if value < 1:
            raise PeftJaxError(f"{key}={value} must be at least 1")


def _check_examples(encoded: Sequence[One]) -> None:
    if not encoded or any(not len(e.input_ids) for e in encoded):
        raise PeftJaxError(
            "an encoded example has no tokens" if encoded else "there are no examples to make batches of"
        )


def _sizes(encoded: Sequence[One]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) tokens and (n,) loss positions of each example."""
    lengths = np.array([len(e.input_ids) for e in encoded])
    return lengths, np.array([len(targets(e)[0]) for e in encoded])


def _width(members: np.ndarray, lengths: np.ndarray, layout: Layout) -> tuple[int, int]:
    """(row width, loss positions) of the step that holds ``members``."""
    sizes = np.where(members >= 0, lengths[members], 0)
    longest = np.bincount(layout.slot_row, weights=sizes).max()
    k = int(np.searchsorted(layout.widths, longest))
    return int(layout.widths[k]), int(layout.loss_counts[k])


def fill(encoded: Sequence[One], members: np.ndarray, layout: Layout, pad_id: int) -> Batch:
    """Write the examples ``members`` (slots,) (-1: none) into a new batch of the layout's shape."""
    lengths = np.array([len(encoded[i].input_ids) if i >= 0 else 0 for i in members])
    kind = targets(encoded[0])[1].dtype
    batch = _empty(layout.num_rows, *_width(np.arange(len(members)), lengths, layout), pad_id, kind, layout.packed)
    used = np.zeros((layout.num_rows, 3), np.int64)  # per row: tokens, segments, loss positions
    for member, row in zip(members, layout.slot_row, strict=True):
        if member >= 0:
            start, segments, losses = used[row]
            used[row] += _place(batch, row, start, segments, losses, encoded[member])
    return batch


def _empty(rows: int, width: int, loss_count: int, pad_id: int, kind: np.dtype, packed: bool) -> Batch:
    return {
        "input_ids": np.full((rows, width), pad_id, np.int32),
        **({"segment_ids": np.zeros((rows, width), np.int32)} if packed else {"lengths": np.zeros(rows, np.int32)}),
        "positions": np.zeros((rows, width), np.int32),
        "loss_index": np.zeros((rows, loss_count), np.int32),
        "loss_target": np.zeros((rows, loss_count), kind),
        "loss_weight": np.zeros((rows, loss_count), np.float32),
    }


def _place(batch: Batch, row: int, start: int, segments: int, losses: int, example: One) -> tuple[int, int, int]:
    """Write one example into a row from token ``start`` on; returns (tokens, segments, loss positions) written."""
    length, (index, target) = len(example.input_ids), targets(example)
    tokens, slots = slice(start, start + length), slice(losses, losses + len(index))
    batch["input_ids"][row, tokens] = example.input_ids
    if "segment_ids" in batch:
        batch["segment_ids"][row, tokens] = segments + 1
    else:
        batch["lengths"][row] = length
    batch["positions"][row, tokens] = np.arange(length)
    batch["loss_index"][row, slots] = start + index
    batch["loss_target"][row, slots] = target
    batch["loss_weight"][row, slots] = 1.0
    return length, 1, len(index)


def stack(batches: Sequence[Batch], pad_id: int = 0) -> Batch:
    """Micro-batches (B, ...) as one batch (n, B, ...), each padded on the right to the widest."""

    def widest(key):
        if batches[0][key].ndim == 1:  # lengths
            return np.stack([batch[key] for batch in batches])
        size = max(batch[key].shape[1] for batch in batches)
        fill_with = pad_id if key == "input_ids" else 0
        pads = [((0, 0), (0, size - batch[key].shape[1])) for batch in batches]
        return np.stack([np.pad(b[key], p, constant_values=fill_with) for b, p in zip(batches, pads, strict=True)])

    return {key: widest(key) for key in batches[0]}


def eval_batches(encoded: Sequence[One], config, pad_id: int = 0) -> Iterator[Batch]:
    """Every example once, in order: row b of batch i is example ``i * batch_size + b``; missing rows weigh nothing.

    Padded to one of ``buckets`` widths. Sort ``encoded`` by length first to pad little; ``Encoded.example`` says which
    is which.

    Args:
      config: ``batch_size``, ``width_multiple``, ``buckets`` (all at least 1).
    """
    _check_examples(encoded)
    lengths, answers = _sizes(encoded)
    layout = bucket_layout(lengths, answers, config, 1)
    for start in range(0, len(encoded), config.batch_size):
        members = np.arange(start, start + config.batch_size)
        yield fill(encoded, np.where(members < len(encoded), members, -1), layout, pad_id)


def prompt_batches(
    prompts: Sequence[np.ndarray], batch_size: int, width_multiple: int = 16, pad_id: int = 0
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Left-padded prompts for generation, similar lengths together.

    Yields (numbers, batch): (batch_size,) int32, which prompt each row is; {"input_ids": (batch_size, S) int32,
    "attention_mask": (batch_size, S) int32, 1 = real}, S a multiple of ``width_multiple``. Rows that are missing in the
    last batch repeat a prompt (a row without any token has nothing to attend to) and have number -1.
    """
    by_length = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    for start in range(0, len(prompts), batch_size):
        members = by_length[start : start + batch_size]
        missing = batch_size - len(members)
        rows = [prompts[i] for i in [*members, *[members[-1]] * missing]]
        width = int(round_up(max(map(len, rows)), width_multiple))
        ids, mask = np.full((batch_size, width), pad_id, np.int32), np.zeros((batch_size, width), np.int32)
        for row, prompt in enumerate(rows):
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
        yield np.append(members, [-1] * missing).astype(np.int32), {"input_ids": ids, "attention_mask": mask}
