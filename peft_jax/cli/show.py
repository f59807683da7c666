"""``--mode=show``: the first training examples as they will be learnt; no weights are read."""

import textwrap
from collections.abc import Sequence

from peft_jax.cli.load_data import data_set
from peft_jax.cli.load_model import model_files
from peft_jax.data.batches import One
from peft_jax.data.preview import WIDTH, preview
from peft_jax.data.tables import LABELLED
from peft_jax.evaluation.objectives import class_names, objective_of
from peft_jax.hub.chat_template import describe_stops
from peft_jax.hub.tokenizer import load_tokenizer

EXAMPLES = 3
READ = 64  # examples that are tokenised to show some: those that are too long may be left out


def job(command) -> int:
    """Print three examples in full, how many there are, and the columns that are not used."""
    config = command.config
    data = data_set(config.task)
    tokenizer = load_tokenizer(config.model.source)
    model_files(config)  # an error where the model cannot answer as the task asks
    encoded, _ = objective_of(config.task).encode(data.train[:READ], tokenizer, config.data)
    for note in data.notes:
        print(note)
    print(f"{len(data.train)} examples to train on, {len(data.validation)} held out\n")
    for number, one in enumerate(encoded[:EXAMPLES], start=1):
        print(preview(one, tokenizer, class_names(config.task), title=f"example {number}") + "\n")
    ends = [describe_stops(tokenizer)] if objective_of(config.task).writes else []
    for line in filter(None, (*ends, *lines_of_unused(config.task, data.unused))):
        print(line)
    return 0


def first_example(task, encoded: Sequence[One], unused: Sequence[str], tokenizer) -> str:
    """A few lines at the start of a run: its first training example as it will be learnt, and ``unused`` columns."""
    return "\n".join((preview(encoded[0], tokenizer, class_names(task), brief=True, title="the first example"),
                      *lines_of_unused(task, unused)))


def lines_of_unused(task, unused: Sequence[str]) -> list[str]:
    """The columns that are not used, by name, and how to use a label that is one of them."""
    line = f"columns that are not used: {', '.join(unused)}"
    lines = textwrap.wrap(line, WIDTH, break_on_hyphens=False) if unused else []
    if LABELLED["label"] in unused and objective_of(task).writes:
        lines.append("to learn 'label', take experiments/minilm_lora.py, or see docs/data.md")
    return lines
