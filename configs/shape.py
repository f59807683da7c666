"""Whether a configuration has the sections and keys of configs/base.py, each with a value of its type: an experiment
file is Python, and may make anything."""

from typing import Any

from ml_collections.config_dict import ConfigDict

from configs.base import get_config
from configs.methods import method_config
from configs.tasks import TASKS
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.methods import METHODS

KINDS = {task["kind"]: task for task in TASKS.values()}  # of a task: one that has every key of its kind
NUMBERS = ("task.bins", "task.word_values")  # tuples of numbers
WHOLE = ("sweep.seeds",)  # of whole numbers; all other tuples are of texts
SWEEP = {"seeds": (), "rates": 1, "metric": ""}
MOST_LABELS = 1 << 16  # as in peft_jax/data/tables.py
MOST = 2**31 - 1  # of a whole number: what an int32 holds


def check_shape(config: Any) -> None:
    """Raise ``PeftJaxError``, naming the key, for what is no configuration, lacks a key or has one too many, and for a
    value of another type."""
    if not isinstance(config, ConfigDict):
        raise PeftJaxError(f"get_config returns {_kind(config)}: return the ConfigDict of configs/base.py")
    sections = {name: value for name, value in get_config().items() if name not in ("method", "task")}
    expected = {**sections, "method": ConfigDict(), "task": ConfigDict()}
    _check_keys(config, expected, "", also=("sweep",))
    _check_types(config, expected, "")
    for name, section in sections.items():
        if isinstance(section, ConfigDict):
            _check_section(config[name], section, f"{name}.")
    _check_task(config.task)
    if "sweep" in config:
        _check_sweep(config)
    elif config.measure.of != "base":  # which has no method; that of a sweep is each cell's own
        _check_method(config.method)


def _check_section(config: ConfigDict, expected: ConfigDict, prefix: str) -> None:
    _check_keys(config, expected, prefix)
    _check_types(config, expected, prefix)


def _check_task(task: ConfigDict) -> None:
    for key in ("name", "kind"):
        if not isinstance(task.get(key), str):
            raise PeftJaxError(f"config.task.{key}: expected str, found {_kind(task.get(key))}")
    if task.kind not in KINDS:
        raise PeftJaxError(f"--config.task.kind={task.kind}: {nearest(task.kind, KINDS)}")
    _check_section(task, ConfigDict(KINDS[task.kind]), "task.")
    if not 1 <= task.get("num_labels", 1) <= MOST_LABELS:
        raise PeftJaxError(f"--config.task.num_labels={task.num_labels}: must be 1 to {MOST_LABELS}")
    if task.kind == "rating" and not len(task.words) == len(task.word_values) == len(task.bins) + 1:
        raise PeftJaxError(f"a rating task has as many words as word_values, and one bin fewer: config.task has "
                           f"{len(task.words)}, {len(task.word_values)} and {len(task.bins)}")
    if task.kind == "rating" and (list(task.bins) != sorted(set(task.bins)) or not task.words):
        raise PeftJaxError(f"--config.task.bins={task.bins}: at least one edge between words, in rising order")


def _check_method(method: ConfigDict) -> None:
    """Its values are checked by the method itself, where it is built, and so is a name that is none."""
    if not isinstance(name := method.get("name"), str):
        raise PeftJaxError(f"config.method.name: expected str, found {_kind(name)}")
    if name == "chain":
        order = method.get("order")
        if not isinstance(order, tuple) or not order or not set(order) <= set(METHODS):
            raise PeftJaxError(f"--config.method.order={order!r}: the names of the chain's methods, such as "
                               "('quantize', 'lora')")
        name = "+".join(order)
    if method.name == "chain" or name in METHODS:
        expected = method_config(name)
        _check_section(method, ConfigDict({**expected, "name": "chain", "order": ()}) if "order" in expected
                       else expected, "method.")


def _check_sweep(config: ConfigDict) -> None:
    if not isinstance(config.sweep, ConfigDict):
        raise PeftJaxError(f"config.sweep: expected a section, found {_kind(config.sweep)}")
    expected = ConfigDict(SWEEP)
    _check_keys(config.sweep, expected, "sweep.", also=config.sweep)
    _check_types(config.sweep, expected, "sweep.")


def _check_keys(config: ConfigDict, expected: Any, prefix: str, also: Any = ()) -> None:
    if missing := [name for name in expected if name not in config]:
        raise PeftJaxError(f"the configuration lacks config.{prefix}{missing[0]}: start from configs/base.py")
    if odd := [name for name in config if name not in expected and name not in also]:
        raise PeftJaxError(f"config.{prefix}{odd[0]} is no key; {nearest(odd[0], expected)}")


def _check_types(config: ConfigDict, expected: Any, prefix: str) -> None:
    for name, default in expected.items():
        kind = expected.get_type(name) if isinstance(expected, ConfigDict) else type(default)
        if (wanted := _misfit(f"{prefix}{name}", config[name], kind)):
            raise PeftJaxError(f"--config.{prefix}{name}={str(config[name])[:80]}: expected {wanted}, found "
                               f"{_kind(config[name])}")


def _misfit(key: str, value: Any, kind: type) -> str:
    """What was expected, in words; "" where the value is of the kind."""
    if kind is tuple and isinstance(value, tuple | list):
        one = (int, float) if key in NUMBERS else int if key in WHOLE else str
        words = "numbers" if key in NUMBERS else "whole numbers" if key in WHOLE else "texts"
        return "" if all(isinstance(part, one) and not isinstance(part, bool) for part in value) else words
    if kind is int and isinstance(value, int) and abs(value) > MOST:
        return f"a whole number of at most {MOST}"
    fits = isinstance(value, (int, float) if kind is float else kind)
    return "" if fits and (kind in (bool, object) or not isinstance(value, bool)) else _word(kind)


def _word(kind: type) -> str:
    return "a section" if kind is ConfigDict else kind.__name__


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
