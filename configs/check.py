"""What can be wrong in a configuration and is seen without jax, the model or the data: said before any is loaded."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import getitem

from ml_collections.config_dict import ConfigDict

from configs.parse import keys, names
from configs.sweeps import metrics_of
from peft_jax.core.files import expanded
from peft_jax.errors import PeftJaxError, nearest

NAMES = ("layers_to_transform", "layers_pattern", "modules_to_save")  # and every argument that ends in _modules
CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.attn_implementation": ("auto", "xla", "cudnn", "splash"),
    "measure.of": ("trained", "base"),
    "eval.part": ("all", "validation", "test"),
    "data.collate": ("pack", "bucket", "pad"),
    "data.on_too_long": ("error", "truncate_left", "drop", "split"),
    "data.chat_loss": ("all", "last"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "generate.dequantize": ("auto", "always", "never"),
    "recommend.complexity": ("simple", "moderate", "complex"),
    "recommend.latency": ("any", "none"),
    "task.answer": ("word", "class", "score"),  # this and the next, where the task has them
    "task.pooling": ("first", "mean"),
}
AT_LEAST_ONE = (
    "data.batch_size", "data.width_multiple", "data.buckets", "optim.accumulate_steps", "optim.loss_chunk",
    "eval.batch_size", "eval.width_multiple", "eval.buckets", "eval.max_new_tokens",
    "checkpoint.keep", "log.every", "generate.max_new_tokens", "measure.rows", "measure.prompt_tokens",
    "measure.new_tokens", "measure.repeats", "recommend.devices", "recommend.tasks",
)  # fmt: skip
NOT_NEGATIVE = (
    "data.rows", "data.row_length", "data.max_length", "optim.learning_rate", "optim.weight_decay", "optim.clip_norm",
    "optim.steps", "optim.epochs", "optim.eps", "seed", "eval.every", "eval.limit", "eval.probe_limit",
    "measure.limit", "measure.neighbour_limit", "measure.general_limit",
    "checkpoint.every", "generate.num_prompts", "generate.temperature", "generate.top_k",
    "recommend.memory_gb",
)  # fmt: skip
LIMITS = ("task.train_limit", "task.validation_limit")
# (which numbers are meant, what is said of others, keys); those of a task count where the task has them
RANGES = (
    (lambda number: 1 <= number < math.inf, "must be a finite number of at least 1", AT_LEAST_ONE),
    (lambda number: 0 <= number < math.inf, "must be a finite number of at least 0", NOT_NEGATIVE),
    (lambda number: 0 <= number < 1, "must lie between 0 and 1, 1 not included", ("optim.b1", "optim.b2")),
    (lambda number: 0 <= number <= 1, "must lie between 0 and 1", ("optim.warmup_ratio", "generate.top_p")),
    (lambda number: number >= 0, "must be at least 0, which is no limit", LIMITS),
)
FOR_SWEEPS = {"eval.part": "validation", "measure.of": "trained"}
PLACEHOLDERS = {  # what a task's templates must hold, or every example would read the same
    "rating": {"prompt_template": "{text}", "completion_template": "{word}"},
    "file": {"prompt_template": "{prompt}", "completion_template": "{completion}"},
    "hub": {"prompt_template": "{prompt}", "completion_template": "{completion}"},
}


def tidy(config: ConfigDict) -> ConfigDict:
    """Give names of modules, however they were written, the one form that methods take."""
    _tidy(config.method)
    return config


def _tidy(method: ConfigDict) -> None:
    for key, value in method.items():
        if isinstance(value, ConfigDict):  # one of several methods
            _tidy(value)
        elif key in NAMES or key.endswith("_modules"):
            method[key] = names(value)


def check(config: ConfigDict) -> None:
    """Raise ``PeftJaxError`` for the first value that cannot be meant. Types are checked where a key is set."""
    flat = keys(config)
    for key, choices in CHOICES.items():
        if key in flat and flat[key] not in choices:
            raise PeftJaxError(f"--config.{key}={flat[key]}: {nearest(str(flat[key]), choices)}")
    for is_meant, words, numbers in RANGES:
        for key in numbers:
            if key in flat and not is_meant(flat[key]):
                raise PeftJaxError(f"--config.{key}={flat[key]}: {words}")
    check_answers(config)
    check_templates(config.task)
    if bool(config.optim.steps) == bool(config.optim.epochs):
        both = f"optim.steps={config.optim.steps} and optim.epochs={config.optim.epochs}"
        raise PeftJaxError(f"{both}: set exactly one, such as --config.optim.epochs=3")


def check_sweep(config: ConfigDict) -> None:
    """Raise ``PeftJaxError`` for a size of a sweep, or a way to compare its runs, that cannot be meant."""
    seeds, metrics = config.sweep.seeds, metrics_of(config.task)
    if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise PeftJaxError(f"--config.sweep.seeds={','.join(map(str, seeds))}: whole numbers of at least 0, each once, "
                           "such as 0,1,2")
    if config.sweep.rates < 1:
        raise PeftJaxError(f"--config.sweep.rates={config.sweep.rates}: at least one learning rate of each method")
    if config.sweep.metric not in metrics:
        raise PeftJaxError(f"--config.sweep.metric={config.sweep.metric}: runs of the task {config.task.name!r} are "
                           f"compared by {', '.join(metrics)}; more is better, so what should be small has a minus")
    for key, value in FOR_SWEEPS.items():
        if keys(config)[key] != value:
            raise PeftJaxError(f"--config.{key}={keys(config)[key]}: the runs of a sweep are chosen and compared with "
                               f"{key}={value}; what is measured in the end is of test data: leave it out")


def check_cells(cells: Sequence, config: ConfigDict, overridden: Iterable[str]) -> None:
    """Raise ``PeftJaxError`` where two cells of a sweep share a name, or the sweep sets an ``overridden`` key."""
    names = Counter(cell.name for cell in cells)
    if names and max(names.values()) > 1:
        raise PeftJaxError(f"{names.most_common(1)[0][1]} cells of this sweep are called {names.most_common(1)[0][0]}: "
                           "their settings must differ in letters and digits")
    of_cells = [keys(cell.config) for cell in cells]
    for key in overridden:
        value = reduce(getitem, key.split("."), config)
        if own := [one[key] for one in of_cells if key in one and one[key] != value]:
            shown = ", ".join(dict.fromkeys(map(str, own)))
            raise PeftJaxError(f"--config.{key}={value}: this sweep sets that itself, to {shown}")


def check_folder(flag: str, folder: str | None) -> None:
    """Raise ``PeftJaxError`` where no folder can have the name that ``flag`` gives; whether there is one is another
    matter."""
    try:
        os.lstat(expanded(folder or "."))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except OSError as error:
        raise PeftJaxError(f"--{flag}={folder}: {error.strerror}: choose another folder") from error


def check_answers(config: ConfigDict) -> None:
    """Raise ``PeftJaxError`` where a head lacks the columns that it learns from, or is asked to write."""
    task = config.task
    if task.answer == "word":
        return
    if config.eval.probe:
        raise PeftJaxError(f"eval.probe={config.eval.probe} measures how a model writes, and with task.answer="
                           f"{task.answer} it does not write: set --config.eval.probe=")
    columns = ("text_column", "label_column", "prompt_column", "completion_column", "messages_column")
    named = [name for name in columns if task.get(name)]
    if named not in ([], ["text_column", "label_column"]):  # without any they are text and label
        raise PeftJaxError(f"task.answer={task.answer} needs --config.task.text_column and --config.task.label_column, "
                           "or no named column")


def check_templates(task: ConfigDict) -> None:
    """Raise ``PeftJaxError`` where a template lacks the placeholder that the example's text goes into."""
    for key, placeholder in PLACEHOLDERS.get(task.kind, {}).items():
        if placeholder not in task[key]:
            raise PeftJaxError(f"--config.task.{key}={task[key]!r}: write {placeholder} where the text goes")
