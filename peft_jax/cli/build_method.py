"""From a configuration to the method."""

from collections.abc import Callable
from functools import partial
from typing import Any

from peft_jax.errors import PeftJaxError, nearest
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.method import BASE, Method, chain
from peft_jax.methods import METHODS


def build_method(config) -> Method:
    """The method of ``config.method``, called with all its other keys; for the name "chain" these are methods.

    Methods know no tokenizer: of a key ``..._text`` that is set they get the ids, as ``..._ids``, that the model's
    tokenizer gives for it, special tokens included, as in peft.
    """
    return _built(config.method.to_dict(), partial(_token_ids, config.model.source))


def trained_on(config) -> Method:
    """What an adapter of this configuration's method stands on: its changes of types alone."""
    method = build_method(config)
    changes = [one for part in method.parts or (method,) if (one := part.base_quantization or part).convert]
    return chain(*changes) if changes else BASE


def _built(arguments: dict[str, Any], encode: Callable[[str], tuple[int, ...]]) -> Method:
    name = arguments.pop("name")
    if name == "chain":
        return chain(*[_built(arguments[part], encode) for part in arguments["order"]])
    if name not in METHODS:
        raise PeftJaxError(f"--config.method.name={name}: {nearest(name, METHODS)}")
    for key in [key for key in arguments if key.endswith("_text")]:
        if text := arguments.pop(key):
            ids = f"{key.removesuffix('_text')}_ids"
            if arguments[ids] is not None:
                raise PeftJaxError(f"{name} has both {key} and {ids}: give the text or its token ids, not both.")
            arguments[ids] = encode(text)
    return METHODS[name](**arguments)


def _token_ids(source: str, text: str) -> tuple[int, ...]:
    return tuple(load_tokenizer(source)(text)["input_ids"])
