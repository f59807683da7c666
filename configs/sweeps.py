"""Many runs that answer one question: what each is, and how much of it there is to be.

A sweep is an experiment file with a second function, ``get_cells(config)``: a list of :class:`Cell`, each a run of its
own configuration. ``config.sweep`` says how large it is.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections.config_dict import ConfigDict

from configs.parse import keys, load_experiment, typed_args
from peft_jax.errors import PeftJaxError, nearest


class Cell(NamedTuple):
    """One run of a sweep.

    name: its own, fit for a file. label: what it is compared as, such as a method. settings: what sets it apart from
    others of its label, by key of the configuration. config: all of it. axes: which keys are the question's.
    best_of: names of cells; the settings of the one that is best on validation data are this one's, too.
    measure: what its result is worth is measured on test data as well; with ``measure.of=base`` nothing is trained.
    """

    name: str
    label: str
    settings: dict[str, Any]
    config: ConfigDict
    axes: tuple[str, ...] = ()
    best_of: tuple[str, ...] = ()
    measure: bool = False

    @property
    def experiment(self) -> str:
        """The name of its record, as Hugging Face peft's method_comparison has it: label/name."""
        return f"{self.label}/{self.name}"

    def having(self, settings: Mapping[str, Any]) -> "Cell":
        """The cell with the chosen ``settings`` beside its own, under the name that a run with all of them has."""
        both = {**settings, **self.settings}
        return cell(self.config, both, self.label, self.axes, measure=self.measure) if settings else self


# How much: "smoke" to see that it runs, "short" for an answer within hours on 2 cores, "long" on a GPU.
BUDGETS = {
    "smoke": {"optim.steps": 2, "task.train_limit": 400, "eval.limit": 16, "eval.buckets": 1, "eval.probe_limit": 4,
              "sweep.seeds": (0,), "sweep.rates": 2, "measure.limit": 16, "measure.neighbour_limit": 16,
              "measure.general_limit": 8, "measure.new_tokens": 8, "measure.repeats": 2},
    "short": {"optim.steps": 30, "eval.limit": 100, "eval.probe_limit": 16, "sweep.seeds": (0, 1, 2), "sweep.rates": 4,
              "measure.limit": 200, "measure.neighbour_limit": 100, "measure.general_limit": 32},
    "long": {"optim.steps": 0, "optim.epochs": 3.0, "eval.limit": 0, "eval.probe_limit": 0,
             "sweep.seeds": (0, 1, 2, 3, 4), "sweep.rates": 4, "measure.limit": 0, "measure.neighbour_limit": 0,
             "measure.general_limit": 0, "measure.repeats": 20},
}
# What some experiments set for themselves, made the same for all, and what a run of many does without.
SAME = {
    "model.dtype": "float32", "model.param_dtype": "float32", "model.remat": False, "data.batch_size": 16,
    "optim.accumulate_steps": 1, "optim.epochs": 0.0, "eval.before": False, "eval.every_epoch": False,
    "checkpoint.every": 0, "checkpoint.every_epoch": False, "checkpoint.keep": 1, "log.tensorboard": False,
}
OWN = ("method", "sweep", "seed", "optim.learning_rate", "optim.rates")  # what a cell of another experiment keeps


def sweep(config: ConfigDict, budget: str, **settings: Any) -> ConfigDict:
    """``config`` as the base of a sweep of that budget. ``settings`` are further keys of ``config.sweep``."""
    if budget not in BUDGETS:
        raise PeftJaxError(f"budget={budget}: {nearest(budget, BUDGETS)}")
    config.sweep = ConfigDict({
        "seeds": (0,),
        "rates": 4,  # how many learning rates of each method, at most
        "metric": metrics_of(config.task)[0],  # the best on validation data is chosen by it, and it is reported
        **settings,
    })  # fmt: skip
    if config.task.answer != "word":  # a head neither writes general text nor answers other tasks' questions
        config.measure.update(neighbours=(), general=())
    for key, value in {**SAME, **BUDGETS[budget]}.items():
        put(config, key, value)
    return config


def metrics_of(task: ConfigDict) -> tuple[str, ...]:
    """The metrics that runs of a task may be compared by, the usual one first; "-" in front of those of which less is
    better."""
    rating = task.kind == "rating"
    return {
        "word": (*(("among_choices", "exact", "spearman") if rating else ()), "-loss", "-perplexity"),
        "class": ("accuracy", *(("spearman",) if rating else ()), "-text_loss"),
        "score": ("spearman", "-rmse"),
    }[task.answer]


def base_of(arg: str, experiment: str, **settings: Any) -> ConfigDict:
    """The base of an ablation of ``experiments/<experiment>.py``, whose file has the arguments model, task, budget."""
    args = typed_args(arg, model="smollm2-135m", task="movie_rating", budget="short")
    config = experiment_config(experiment, model=args["model"], task=args["task"])
    config.eval.part = "validation"
    return sweep(config, args["budget"], **settings)


def experiment_config(experiment: str, **args: str) -> ConfigDict:
    """The configuration of ``experiments/<experiment>.py``, from wherever this is called."""
    file = Path(__file__).parents[1] / "experiments" / f"{experiment}.py"
    return load_experiment(f"{file}:{','.join(f'{key}={value}' for key, value in args.items())}")[0]


def put(config: ConfigDict, key: str, value: Any) -> None:
    """Set ``section.key`` of a configuration."""
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    with config.ignore_type():  # module names may be a tuple or a keyword
        config[name] = value


def grid(config: ConfigDict, axes: Mapping[str, Sequence[Any]], label: str = "") -> list[Cell]:
    """A cell for each combination of the values of ``axes``, by key of the configuration, and each seed."""
    cells = []
    for values in itertools.product(*axes.values(), config.sweep.seeds):
        settings = dict(zip((*axes, "seed"), values, strict=True))
        cells.append(cell(config, settings, label or config.method.name, tuple(axes)))
    return cells


def cell(config: ConfigDict, settings: Mapping[str, Any], label: str, axes: Iterable[str] = (), **more: Any) -> Cell:
    """The cell of ``config`` with ``settings``."""
    own = config.copy_and_resolve_references()
    own.unlock()
    if "sweep" in own:
        del own["sweep"]
    for key, value in settings.items():
        put(own, key, value)
    parts = [f"{key.rpartition('.')[2]}-{short(value)}" for key, value in settings.items()]
    return Cell("-".join((label, *parts)), label, dict(settings), own.lock(), tuple(axes), **more)


def short(value: Any) -> str:
    """A setting in a word, fit for a file's name.

    >>> short(0.0005), short(("q_proj", "v_proj")), short(None), short((0, 1, 2))
    ('0.0005', 'q_proj+v_proj', 'none', '0..2')
    """
    numbers = isinstance(value, list | tuple) and len(value) > 2 and all(isinstance(one, int) for one in value)
    if numbers and tuple(value) == tuple(range(value[0], value[-1] + 1)):
        return f"{value[0]}..{value[-1]}"
    words = "+".join(map(short, value)) if isinstance(value, list | tuple) else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else "".join(c if c.isalnum() or c in "._+" else "_" for c in words)


def as_experiment(config: ConfigDict, experiment: str) -> ConfigDict:
    """The configuration of ``experiments/<experiment>.py`` with all of ``config`` but the method and its rates."""
    own = experiment_config(experiment)
    own.task, own.sweep = config.task.copy_and_resolve_references(), config.sweep.copy_and_resolve_references()
    for key, value in keys(config).items():
        if not f"{key}.".startswith(tuple(f"{name}." for name in (*OWN, "task"))):
            put(own, key, value)
    return own


def best_of(config: ConfigDict, rates: Mapping[str, Sequence[float]]) -> list[Cell]:
    """The cells of a comparison: the base, each experiment at each of its rates, then the best of these with each seed.

    All at their first rate come before any at its second, so that a comparison cut short is balanced.
    """
    base = cell(config, {"measure.of": "base"}, "base", measure=True)._replace(name="base")
    trials: dict[str, list[Cell]] = {name: [] for name in rates}
    for name, values in rates.items():
        own = as_experiment(config, name)
        for rate in values[:config.sweep.rates]:
            settings = {"optim.learning_rate": rate, "seed": config.sweep.seeds[0]}
            trials[name].append(cell(own, settings, name, ("optim.learning_rate",)))
    first = [one for turn in itertools.zip_longest(*trials.values()) for one in turn if one]
    names = {name: tuple(one.name for one in cells) for name, cells in trials.items()}
    last = [cell(cells[0].config, {"seed": seed}, name, best_of=names[name], measure=True)
            ._replace(name=f"{name}-best-seed-{seed}") for seed in config.sweep.seeds for name, cells in trials.items()]
    return [base, *first, *last]
