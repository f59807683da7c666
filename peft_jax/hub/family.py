"""What the hub has to know of a family of models: how Hugging Face describes one, and what it calls its parts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flax import linen as nn

from peft_jax.errors import PeftJaxError
from peft_jax.hub.names import Table, without_prefix


class Family(NamedTuple):
    """Model types that share one model class and its names.

    Fields:
      kinds: ``{model_type: the architecture of its plain checkpoints}``, both as Hugging Face writes them.
      read: ``(model_type, config dict) -> config``, which has ``model_type``, ``vocab_size``, ``num_hidden_layers`` and
        ``max_position_embeddings``; raises ``PeftJaxError`` for what is not supported.
      write: ``config -> config dict``, but the fields that every model has.
      model: ``(config, dtype, param_dtype, remat) -> module``.
      modules: what Hugging Face calls each module, by our path.
      prefix: what stands there in front of the model proper; checkpoints of it alone are without.
      tied: the embedding that serves as the head of a model without ``lm_head``; ``None`` where none does.
      heads: modules of which a model has one where it is more than the model proper; () where it always is.
      other_heads: a regex for tensors of heads: they may be absent where a head is asked for that a checkpoint does not
        have, and are passed over where another one is.
    """

    kinds: Mapping[str, str]
    read: Callable[[str, Mapping[str, Any]], Any]
    write: Callable[[Any], dict[str, Any]]
    model: Callable[..., nn.Module]
    modules: Table
    prefix: str
    tied: str | None = None
    heads: tuple[str, ...] = ()
    other_heads: str = ""


def table_of(family: Family, paths: Iterable[str]) -> Table:
    """The names in a model that has the leaves ``paths``: without the prefix where it is the model proper alone."""
    alone = family.heads and not any(path.split("/")[0] in family.heads for path in paths)
    return without_prefix(family.modules, family.prefix) if alone else family.modules


def completed(kind: str, given: Mapping[str, Any], required: Sequence[str],
              defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with the ``defaults`` of what it leaves out; raises ``PeftJaxError`` where a required key is absent."""
    missing = [key for key in required if key not in given]
    if missing:
        raise PeftJaxError(f"the {kind} config lacks {', '.join(missing)}: add it to config.json.")
    return {**defaults, **given}
