"""What must fit together, seen before anything costly is done: task and model, examples and model, base and file."""

from collections.abc import Sequence

from peft_jax import quant
from peft_jax.core import tree
from peft_jax.data.batches import One
from peft_jax.errors import PeftJaxError
from peft_jax.evaluation.objectives import objective_of
from peft_jax.hub import families
from peft_jax.hub.formats import bitsandbytes as bnb
from peft_jax.method import Method


def check_answers(task, model_config) -> None:
    """Raise ``PeftJaxError`` where the task is answered in words, and the model writes none."""
    if objective_of(task).writes and families.of(model_config).heads:
        raise PeftJaxError(f"a {model_config.model_type} model reads and does not write, and the task {task.name!r} is "
                           "answered in words: take a language model, task=movie_classes or movie_score, or a file "
                           "with the columns text and label (others: --config.task.text_column and .label_column)")


def check_fits(encoded: Sequence[One], model_config, method: Method | None = None) -> None:
    """Raise ``PeftJaxError`` where token ids or lengths, the method's virtual tokens included, are beyond the model's
    vocabulary or positions."""
    highest = max(int(one.input_ids.max()) for one in encoded)
    if highest >= model_config.vocab_size:
        raise PeftJaxError(f"the tokenizer gives the id {highest}, but the model's vocabulary ends at "
                           f"{model_config.vocab_size - 1}: take both from one model.source")
    longest, most = max(len(one.input_ids) for one in encoded), model_config.max_position_embeddings
    n = _virtual_tokens(method) if method else 0
    if longest + n > most:
        virtual = f" and the method puts {n} in front" if n else ""
        raise PeftJaxError(f"an example has {longest} tokens{virtual}, but the model has {most} positions: lower "
                           "--config.data.max_length, and see --config.data.on_too_long")


def _virtual_tokens(method: Method) -> int:
    """How many positions the method takes in front of the text."""
    parts = [part.config for part in method.parts or (method,)]
    return sum(part.get("num_virtual_tokens", 0) for part in parts if part.get("shift_positions", True))


def check_codes(base: tree.Tree) -> None:
    """Raise ``PeftJaxError`` where what is quantised in the base could not be saved so, before any work is done."""
    packed = {path: leaf for path, leaf in tree.flatten(base).items() if quant.is_leaf(leaf)}
    if not packed:
        raise PeftJaxError("--requantize: the base of this run is not quantised: leave it out")
    try:
        bnb.described(packed, ())
    except PeftJaxError as error:
        raise PeftJaxError(f"--requantize: {error} Or leave --requantize out.") from error
