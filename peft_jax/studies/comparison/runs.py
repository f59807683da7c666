"""A record as a ``Run``: each number under one name, whether the record is ours or Hugging Face peft's."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from peft_jax.errors import PeftJaxError

# Accuracy is what peft's records call it; ours name their metric.
PEFT_METRIC = "accuracy"
PHASES = ("prefill", "token")
ASKED = ("model", "method", "task", "data", "optim", "eval", "measure")  # sections that a result depends on


class Run(NamedTuple):
    """One run.

    name: its experiment_name. label: the method, or what else a row is about. variety: all that tells it from other
    runs of its label, except the seed. axes: the settings that its ablation varies, {name: value}. asked: what it was
    told to do, {key of the configuration: value}; {} where the record does not say. chosen: whether it has the learning
    rate that was chosen for its method; None where there was no choice. measured_on: "test", "validation" or "".
    values: see ``values_of``. loss: [(step, training loss in nats per token or None)].
    """

    name: str
    label: str
    variety: str
    axes: dict[str, Any]
    asked: dict[str, Any]
    chosen: bool | None
    status: str
    error: str
    metric: str
    measured_on: str
    model: str
    budget: str
    values: dict[str, float]
    loss: list[tuple[float, float | None]]
    record: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        return self.status == "success"


def run_of(record: Mapping[str, Any]) -> Run:
    """The run that a record tells of; what the record lacks is missing from ``values``.

    Raises ``PeftJaxError`` where the record has no experiment_name, or something of another type than it should have.
    """
    name = nested(record, "run_info", "experiment_name")
    if not isinstance(name, str) or not name.strip("/. "):
        raise PeftJaxError("not the record of a run: it lacks run_info.experiment_name")
    settings = _object(record, "peft_jax", "cell", "settings")
    axes = [axis for axis in map(str, _list(record, "peft_jax", "cell", "axes")) if not _is_seed(axis)]
    _object(record, "meta_info")
    values = values_of(record)
    return Run(
        name=name, label=str(nested(record, "peft_jax", "cell", "label") or name.split("/")[0]),
        variety=_variety(name, settings), axes={axis: settings[axis] for axis in axes if axis in settings},
        asked=_asked(record, "test" in values), chosen=nested(record, "peft_jax", "cell", "chosen"),
        status=_status(record),
        error=str(nested(record, "run_info", "error_msg") or ""), metric=_metric(record),
        measured_on="test" if "test" in values else "validation" if "validation" in values else "",
        model=str(nested(record, "run_info", "train_config", "model_id") or "unknown model"), budget=_budget(record),
        values=values, loss=_losses(record), record=record)  # fmt: skip


def _status(record: Mapping[str, Any]) -> str:
    return str(nested(record, "train_info", "status") or "unknown, the record gives no status")


def _metric(record: Mapping[str, Any]) -> str:
    return str(nested(record, "peft_jax", "metric") or PEFT_METRIC)


def _is_seed(key: str) -> bool:
    return str(key).split(".")[-1] == "seed"


def _variety(name: str, settings: Mapping[str, Any]) -> str:
    """
    >>> _variety("lora/tiny-lr0.001-seed3", {}), _variety("a/b", {"seed": 1, "method.r": 8})
    ('tiny-lr0.001', 'method.r=8')
    """
    if settings:
        return ", ".join(f"{key}={value}" for key, value in sorted(settings.items()) if not _is_seed(key))
    # peft's files of the same experiment run again carry a time.
    return re.sub(r"-?seed\d+|--\d{4}-\d\d-\d\dT[\d:+-]+$", "", name.partition("/")[2])


def _asked(record: Mapping[str, Any], measured: bool) -> dict[str, Any]:
    """How it was to be measured counts only where it was."""
    return {key: value for name, section in _object(record, "peft_jax", "asked").items()
            if name in ASKED and (measured or name != "measure") for key, value in _leaves(section, name).items()}


def _leaves(value: Any, path: str) -> dict[str, Any]:
    """
    >>> _leaves({"r": 8, "of": {"all": [1, 2]}}, "method")
    {'method.r': 8, 'method.of.all': [1, 2]}
    """
    if not isinstance(value, Mapping):
        return {path: value}
    return {key: leaf for name, one in value.items() for key, leaf in _leaves(one, f"{path}.{name}").items()}


def _budget(record: Mapping[str, Any]) -> str:
    steps, rows = (number(record, "run_info", "train_config", key) for key in ("max_steps", "batch_size"))
    if (epochs := number(record, "peft_jax", "asked", "optim", "epochs")) and rows is not None:
        return f"{epochs:g} epochs of {rows:g}"  # as many steps as the data has, the base model's record none
    return "" if steps is None else f"{steps:g} steps" if rows is None else f"{steps:g} steps of {rows:g}"


def values_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record.

    test, validation: the metric; value: the one of both that counts, test if there is;
    (test|validation).(loss|general): held-out loss of the answers and of general text, nats per token; before,
    before.(loss|general): the same on validation before training; base, gain: the base model's metric on test, and
    value minus base; trainable, all, share: parameters and percent; rate: the learning rate; memory.observed,
    memory.compiled, adapter_bytes: bytes; memory: the compiled one where there is one, for what was observed of a
    process holds what compiling took, too; tokens_per_second; seconds: of training;
    latency.(base|unmerged|merged).(prefill|token): seconds, and ratio.(unmerged|merged).*: to the base;
    forgetting.<source>: loss after minus before, nats per token; neighbour.<task>: metric after minus before.
    """
    metric = _metric(record)
    numbers = {
        **{key: number(record, *path) for key, path in PLAIN.items()}, **_from_metrics(record),
        "base": number(record, "peft_jax", "base_test", metric), **_latencies(record),
        **_changes(record, "general", "forgetting"), **_changes(record, "neighbours", "neighbour"),
    }  # fmt: skip
    numbers |= {key: first(*(number(record, *path) for path in paths)) for key, paths in EITHER.items()}
    for on in ("test", "validation", "before"):
        numbers[on] = first(number(record, "peft_jax", on, metric), numbers.get(on))
        numbers |= {f"{on}.{name}": number(record, "peft_jax", on, key) for name, key in LOSSES.items()}
    return _derived({key: value for key, value in numbers.items() if value is not None})


PLAIN = {
    "trainable": ("train_info", "num_trainable_params"), "all": ("train_info", "num_total_params"),
    "seconds": ("train_info", "train_time"), "rate": ("run_info", "train_config", "optimizer_kwargs", "lr"),
    "memory.compiled": ("peft_jax", "memory", "compiled"),
}  # fmt: skip
LOSSES = {"loss": "loss", "general": "probe_loss"}
EITHER = {  # the first that is there; cuda_memory_max is what peft called it until 2025
    "memory.observed": (("peft_jax", "memory", "observed"), ("train_info", "accelerator_memory_max"),
                        ("train_info", "cuda_memory_max")),
    "adapter_bytes": (("peft_jax", "adapter_bytes"), ("train_info", "file_size")),
}  # fmt: skip


def _derived(values: dict[str, float]) -> dict[str, float]:
    if "test" in values or "validation" in values:
        values["value"] = values["test"] if "test" in values else values["validation"]
    if (memory := first(values.get("memory.compiled"), values.get("memory.observed"))) is not None:
        values["memory"] = memory
    if "test" in values and "base" in values:  # the base is measured on test only
        values["gain"] = values["test"] - values["base"]
    if "trainable" in values and values.get("all"):
        values["share"] = 100 * values["trainable"] / values["all"]
    for phase in PHASES:
        for state in ("unmerged", "merged"):
            if f"latency.{state}.{phase}" in values and values.get(f"latency.base.{phase}"):
                values[f"ratio.{state}.{phase}"] = (
                    values[f"latency.{state}.{phase}"] / values[f"latency.base.{phase}"])  # fmt: skip
    return values


def _from_metrics(record: Mapping[str, Any]) -> dict[str, float | None]:
    """What peft keeps in the rows of train_info.metrics."""
    rows = _metric_rows(record)
    rates = [rate for row in rows if (rate := number(row, "tokens / sec")) is not None]
    ours = number(record, "peft_jax", "tokens_per_second")
    general = nested(record, "peft_jax", "general")
    return {
        "validation": last(number(row, "valid accuracy") for row in rows),
        "test": last(number(row, "test accuracy") for row in rows),
        "tokens_per_second": ours if ours is not None else sum(rates) / len(rates) if rates else None,
        **({} if general else {"forgetting.general": last(number(row, "forgetting") for row in rows)}),
    }


def _metric_rows(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return _list(record, "train_info", "metrics")


def _latencies(record: Mapping[str, Any]) -> dict[str, float | None]:
    return {f"latency.{state}.{phase}": number(record, "peft_jax", "latency", state, phase)
            for state in ("base", "unmerged", "merged") for phase in PHASES}  # fmt: skip


def _changes(record: Mapping[str, Any], section: str, name: str) -> dict[str, float | None]:
    """After minus before, of each part of a section."""
    changes = {}
    for key in _object(record, "peft_jax", section):
        before, after = (number(record, "peft_jax", section, key, when) for when in ("before", "after"))
        changes[f"{name}.{key}"] = None if before is None or after is None else after - before
    return changes


def _losses(record: Mapping[str, Any]) -> list[tuple[float, float | None]]:
    pairs = nested(record, "peft_jax", "loss")
    if pairs is None:
        return [(step, number(row, "train loss")) for row in _metric_rows(record)
                if (step := number(row, "step")) is not None and "test accuracy" not in row]  # fmt: skip
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise PeftJaxError(f"peft_jax.train.loss is {_short(pairs)}, not a list of [step, loss]")
    points = [(number({"step": step}, "step"), number({"loss": loss}, "loss")) for step, loss in pairs]
    return [(step, loss) for step, loss in points if step is not None]


def nested(record: Any, *keys: str) -> Any:
    """What lies under nested keys, None where one is missing; ``PeftJaxError`` where something on the way is no object.

    >>> nested({"a": {"b": 1}}, "a", "b"), nested({"a": None}, "a", "b")
    (1, None)
    """
    for depth, key in enumerate(keys):
        if record is None:
            return None
        if not isinstance(record, Mapping):
            raise PeftJaxError(f"{'.'.join(keys[:depth]) or 'the record'} is {_short(record)}, not a JSON object")
        record = record.get(key)
    return record


def number(record: Any, *keys: str) -> float | None:
    """A finite number, None where there is none or it is not finite; ``PeftJaxError`` where it is no number."""
    value = nested(record, *keys)
    if getattr(value, "shape", None) == ():
        value = value.item()
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PeftJaxError(f"{'.'.join(keys)} is {_short(value)}, not a number")
    return value if abs(value) < 1e300 else None


def _object(record: Any, *keys: str) -> Mapping[str, Any]:
    value = first(nested(record, *keys), {})
    if not isinstance(value, Mapping):
        raise PeftJaxError(f"{'.'.join(keys)} is {_short(value)}, not a JSON object")
    return value


def _list(record: Any, *keys: str) -> list:
    value = first(nested(record, *keys), [])
    if not isinstance(value, list | tuple):
        raise PeftJaxError(f"{'.'.join(keys)} is {_short(value)}, not a list")
    return list(value)


def first(*values: Any) -> Any:
    """The first of ``values`` that is not None."""
    return next((value for value in values if value is not None), None)


def last(values: Iterable[Any]) -> Any:
    """The last of ``values`` that is not None."""
    return first(*reversed(list(values)))


def _short(value: Any) -> str:
    return json.dumps(value, default=str)[:40]
