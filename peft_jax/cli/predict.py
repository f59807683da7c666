"""What a model with a head tells of single texts, in words for people."""

from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from peft_jax.core import tree
from peft_jax.errors import PeftJaxError
from peft_jax.evaluation.evaluate import make_score, score_all
from peft_jax.evaluation.objectives import class_names, objective_of


def predictor(config, texts: Sequence[str], tokenizer, mesh: Mesh) -> Callable[..., list[str]]:
    """``tell(apply, params, names) -> texts``: of each of ``texts`` its class, or number, as the task asks.

    ``names`` are those of the classes; () takes the task's own. Raises ``PeftJaxError`` for a text that is too long.
    """
    objective, task = objective_of(config.task), config.task
    examples = [{"text": text, "label": 0} for text in texts]  # whatever the label is, no loss is asked for
    encoded, counts = objective.encode(examples, tokenizer, config.data)
    if counts["dropped"]:
        raise PeftJaxError(f"a prompt has more tokens than data.max_length={config.data.max_length}: shorten it, or "
                           "raise that")
    choices = np.arange(objective.head(task).num_labels)  # pyright: ignore[reportOptionalMemberAccess]

    def tell(apply: Callable, params: tree.Tree, names: Sequence[str]) -> list[str]:
        score = make_score(apply, config.optim.loss_chunk, objective, mesh)
        _, answers = score_all(score, params, encoded, choices, config.eval, len(texts))
        return objective.tell(answers, names or class_names(task))

    return tell
