"""What a command leaves for the model and the data to say: whether a head is to tell labels, and which there are."""

from pathlib import Path
from typing import Any

from peft_jax.cli import workdir
from peft_jax.core import run_files
from peft_jax.core.json_shape import misfit
from peft_jax.data.sources import train_rows
from peft_jax.data.tables import LABELLED, MOST_LABELS, keys_of_labels, named_columns
from peft_jax.errors import PeftJaxError, nearest, some
from peft_jax.evaluation.objectives import class_names, objective_of
from peft_jax.hub import families
from peft_jax.hub.model_files import open_model

SETTLED = {"answer": str, "label_names": [str], "num_labels": int}  # of a task here, with their types
ANSWERS = ("word", "class", "score")
FROM_SHAPES = ("plan", "recommend")  # modes that need no data
BEFORE = ("train", "show")  # modes that need no run


def settled(command):
    """The command with the keys of ``config.task`` that follow from its labels.

    The labels of a table are told by a head where the task says so (``answer``), or where the model is an encoder,
    which cannot write, and the table has a column of them. Nothing then measures how the model writes (``eval.probe``).
    The modes that follow a run take what the run took. Other commands come back as they are.

    Raises ``PeftJaxError`` where the data or the model's config are not to be had, or where all labels are the same.
    """
    task = command.config.task
    if "label_names" not in task:
        return command
    changes = _of_run(command)
    if not changes and _may_have_labels(command):
        changes = _of_data(task)
    if changes.get("answer", "word") == "word":
        return command  # an encoder's, to an error in words of whoever misses the labels
    config = command.config.copy_and_resolve_references()
    config.task.update(changes)
    if objective_of(task).writes:
        config.eval.probe = ""
        command = command._replace(probe=None)
    if command.mode in BEFORE:
        print(describe(config.task), flush=True)
    return command._replace(config=config)


def _may_have_labels(command) -> bool:
    if objective_of(command.config.task).writes:
        return bool(families.of(open_model(command.config.model.source, weights=False).config).heads)
    return command.mode not in FROM_SHAPES


def _of_run(command) -> dict[str, Any]:
    """The keys as the run in the workdir has them; {} without one, and for the modes that need none."""
    file = Path(command.workdir) / "config.json"
    if command.mode in (*BEFORE, *FROM_SHAPES) or not file.is_file():
        return {}
    workdir.check_own(file.parent, file.name)
    task = workdir.read_json(file, "task")["task"]
    settled = {key: task[key] for key in SETTLED if key in task}
    if fault := misfit(settled, {key: SETTLED[key] for key in settled}, "task") or _no_answer(settled):
        raise PeftJaxError(f"{file} is damaged, {fault}: {run_files.MEND}")
    return {key: tuple(value) if key == "label_names" else value for key, value in settled.items()}


def _no_answer(task: dict[str, Any]) -> str:
    if task.get("answer", "word") not in ANSWERS:
        return f"task.answer is {task['answer']!r}, {nearest(task['answer'], ANSWERS)}"
    many = not 1 <= task.get("num_labels", 1) <= MOST_LABELS
    return f"task.num_labels is {task['num_labels']}, not 1 to {MOST_LABELS}" if many else ""


def _of_data(task) -> dict[str, Any]:
    """The keys as the training data has them; {} where it has no labels."""
    column = (named_columns(task) or LABELLED).get("label")
    rows, where = train_rows(task)
    if not rows or column not in rows[0]:
        return {}
    changes = keys_of_labels(task, [str(row[column]) for row in rows if row[column] is not None])
    if len(changes.get("label_names", ())) == 1:
        raise PeftJaxError(f"{where}: each label in the column {column!r} is {changes['label_names'][0]!r}, so "
                           "there is nothing to tell apart")
    return changes


def describe(task) -> str:
    """One line about labels that a head tells."""
    names, column = class_names(task), task.label_column or LABELLED["label"]
    what = f"{task.num_labels} classes" if task.answer == "class" else "a number"
    return f"a head tells the column {column!r}: {what}{f' ({some(list(names))})' if names else ''}"
