"""From a configuration to examples: those to train on, those held out, and general text."""

from typing import NamedTuple

from peft_jax.data import load_examples
from peft_jax.data.chat import as_turns, wants_chat
from peft_jax.data.sources import DataSet, Example, half_by_hash, load_data_set, sample_by_hash
from peft_jax.errors import PeftJaxError


class Data(NamedTuple):
    """Examples, not tokenised yet. probe: general text, [] without one. unused: columns of the data that no example
    holds."""

    train: list[Example]
    held_out: list[Example]
    probe: list[Example]
    unused: tuple[str, ...]


def load_data(config, probe_task=None) -> Data:
    """The examples of ``config.task``, as ``config.eval`` limits them, and those of the general-text ``probe_task``.

    Prints what a person should know of the split. Raises ``PeftJaxError`` where they cannot be had, or where none is
    held out.
    """
    data = data_set(config.task)
    for note in data.notes:
        print(note, flush=True)
    return Data(train=data.train, held_out=_held_out(data.validation, config), unused=data.unused,
                probe=_probe(probe_task, config.eval.probe_limit) if probe_task is not None else [])


def data_set(task) -> DataSet:
    """Both sides of the task's data, as turns of a chat where it wants that."""
    data = load_data_set(task)
    return data._replace(train=as_turns(data.train), validation=as_turns(data.validation)) if wants_chat(task) else data


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
