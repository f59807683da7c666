"""From a configuration to examples: those to train on, those held out, and general text."""

from typing import NamedTuple

from peft_jax.data import load_examples
from peft_jax.data.chat import as_turns, wants_chat
from peft_jax.data.sources import Example, half_by_hash, sample_by_hash
from peft_jax.errors import PeftJaxError


class Data(NamedTuple):
    """Examples, not tokenised yet. probe: general text, [] without one."""

    train: list[Example]
    held_out: list[Example]
    probe: list[Example]


def load_data(config, probe_task=None) -> Data:
    """The examples of ``config.task``, as ``config.eval`` limits them, and those of the general-text ``probe_task``.

    Raises ``PeftJaxError`` where they cannot be had, or where none is held out.
    """
    examples = load_examples(config.task)
    if wants_chat(config.task):
        examples = {part: as_turns(some) for part, some in examples.items()}
    return Data(train=examples["train"], held_out=_held_out(examples["validation"], config),
                probe=_probe(probe_task, config.eval.probe_limit) if probe_task is not None else [])


def _held_out(examples: list[Example], config) -> list[Example]:
    if not examples:
        raise PeftJaxError(
            f"task {config.task.name!r} holds nothing out to evaluate on; set --config.task.validation_fraction"
        )
    half = half_by_hash(examples, config.eval.part)
    if not half:
        raise PeftJaxError(f"of the {len(examples)} held-out examples none is in the half {config.eval.part!r}: set "
                           "--config.eval.part=all, or hold more out")
    return sample_by_hash(half, config.eval.limit)


def _probe(task, limit: int) -> list[Example]:
    try:
        return sample_by_hash(load_examples(task)["validation"], limit)
    except PeftJaxError as error:
        raise PeftJaxError(f"general text: {error} (--config.eval.probe= evaluates without it)") from error
