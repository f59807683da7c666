"""What the hub has to know of a family of models: how Hugging Face describes one, and what it calls its parts."""

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flax import linen as nn

from peft_jax.core.validation import is_finite
from peft_jax.errors import PeftJaxError
from peft_jax.hub.families.hf_names import Table, without_prefix


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
    """``given`` with the ``defaults`` of what it leaves out.

    Raises ``PeftJaxError`` where a required key is absent, and where a value is of another kind than its default, or no
    size where one belongs.
    """
    missing = [key for key in required if key not in given]
    if missing:
        raise PeftJaxError(f"the {kind} config lacks {', '.join(missing)}: add it to config.json.")
    found = {**defaults, **given}
    for key in required:
        _check(kind, key, found[key], _KINDS.get(key, _SIZE))
    for key, default in defaults.items():
        if found[key] is not None or (type(default) in (int, float) and key not in _NULLABLE):
            _check(kind, key, found[key], _KINDS.get(key, type(default)))
    return found


_MOST, _MOST_LAYERS = 2**24, 10_000  # more than any model has; a slip of the pen must not fill the memory
_SIZE, _LAYERS = f"a whole number from 1 to {_MOST}", f"a whole number from 1 to {_MOST_LAYERS}"
_COUNT, _POSITIVE, _EPSILON = f"a whole number from 0 to {_MOST}", "a number above 0", "a number from 0 to 1"
_TEXTS = "a list of strings"
# {what belongs there: (how to say it, how to know it)}
_RULES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: type(value) is int),
    float: ("a number", is_finite),
    str: ("a string", lambda value: isinstance(value, str)),
    dict: ("an object", lambda value: isinstance(value, dict)),
    _TEXTS: ("a list", lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value)),
    _SIZE: (_SIZE, lambda value: type(value) is int and 1 <= value <= _MOST),
    _LAYERS: (_LAYERS, lambda value: type(value) is int and 1 <= value <= _MOST_LAYERS),
    _COUNT: (_COUNT, lambda value: type(value) is int and 0 <= value <= _MOST),
    _POSITIVE: (_POSITIVE, lambda value: is_finite(value) and value > 0),
    _EPSILON: (_EPSILON, lambda value: is_finite(value) and 0 <= value <= 1),
}
# Of keys whose default is null, or for which the type of the default is too little. What may be null though its default
# is a number.
_KINDS = {**dict.fromkeys(("max_position_embeddings", "n_positions", "num_key_value_heads", "head_dim", "n_inner",
                           "num_labels", "sliding_window"), _SIZE),
          **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer"), _LAYERS),
          **dict.fromkeys(("max_window_layers", "pad_token_id", "type_vocab_size"), _COUNT),
          **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), _EPSILON),
          "rope_theta": float, "partial_rotary_factor": float, "architectures": _TEXTS, "layer_types": _TEXTS,
          "rope_scaling": dict, "rope_parameters": dict, "id2label": dict}
_NULLABLE = ("sliding_window", "max_window_layers", "rope_theta", "partial_rotary_factor", "pad_token_id", "num_labels",
             "num_key_value_heads", "head_dim")


def check_heads(kind: str, hidden: int, heads: int) -> None:
    """Raise ``PeftJaxError`` where a state cannot be cut into so many heads."""
    if hidden % heads:
        raise PeftJaxError(f"the {kind} config has states of {hidden} values, which cannot be cut into {heads} heads: "
                           "correct config.json.")


def _check(kind: str, key: str, value: Any, wanted: Any) -> None:
    words, fits = _RULES[wanted]
    if not fits(value):
        raise PeftJaxError(f"the {kind} config has {key}={reprlib.repr(value)}, where {words} belongs: correct "
                           "config.json.")
