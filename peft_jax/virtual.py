"""Virtual tokens, which no text holds and every row sees: what prefix, prompt and P-tuning share.

Prompt and P-tuning put n trained embeddings in front of every row, packed rows too, where each segment sees them. A
cache holds them from the start: ``init_cache`` of the bound model runs them through it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax import beside, tree
from peft_jax.errors import PeftJaxError
from peft_jax.stored import Slot, no_place

KEY = "prompt_embeddings"  # in the file; as in peft without the prefix of other keys
MARK = "virtual_tokens"  # in a cache: how many it was begun with
LEAVES = ("prompt", "prompt_tokens", "prompt_encoder/", "prefix", "prefix_out", "prefix_bias", "prefix_encoder/")
OWN = re.compile(r"(.*/)?(embed_tokens/prompt|self_attn/core/prefix|prefix_encoder)(_.*|/.*)?")


def start(params: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """``params`` flat. Raises ``PeftJaxError`` where they hold virtual tokens already: a file has room for one kind."""
    flat = tree.flatten(params)
    if held := [path for path in flat if OWN.fullmatch(path)]:
        raise PeftJaxError(f"the parameters already hold virtual tokens ('{held[0]}'), and {kind} would add more: "
                           "start from the base's, and chain one such method only.")
    return flat


def embedding(flat: Mapping[str, Any]) -> str:
    """The folder, with a slash at the end, of the token embedding. Raises ``PeftJaxError`` where there is none."""
    found = [path for path in flat if re.fullmatch(r"(.*/)?embed_tokens/embedding", path)]
    if len(found) != 1:
        raise PeftJaxError(f"the parameters have {len(found)} leaves 'embed_tokens/embedding', and virtual tokens go "
                           "beside one: they need a decoder of peft_jax.models.")
    return found[0].removesuffix("embedding")


def labels(params: Mapping[str, Any]) -> tree.Tree:
    """Every leaf of the virtual tokens trains, no other."""
    return beside.labels(params, lambda path, _: OWN.fullmatch(path) is not None)


def check_room(module, length: int, tokens: int) -> None:
    """Raise ``PeftJaxError`` where a cache for ``length`` tokens and the virtual ones exceeds the model's positions."""
    most = module.config.max_position_embeddings
    if length + tokens > most:
        raise PeftJaxError(f"{length} tokens and {tokens} virtual ones are more than the model's {most} positions: "
                           "shorten one of them.")


def intercept(leaf: str, table: Callable[[Mapping, Any], jax.Array], next_fun, args, kwargs, context):
    """An interceptor for embeddings in front of every row.

    Args:
      leaf: the one beside the embedding whose presence says that there are some; its first axis counts them.
      table: ``(leaves beside the embedding, context) -> (n, hidden)``.
    """
    hook = HOOKS.get(context.method_name)
    held = context.module.get_variable("params", "embed_tokens", {}) if hook else {}
    if not isinstance(held, Mapping) or leaf not in held:
        return next_fun(*args, **kwargs)
    return hook(held[leaf].shape[0], partial(table, held, context), context.module, next_fun, *args, **kwargs)


def _hidden(n, table, module, next_fun, input_ids, attention_mask=None, *, positions=None, segment_ids=None):
    """The virtual tokens take positions 0 to n - 1 and come out again at the end; a cache holds them already."""
    given = [array for array in (attention_mask, positions, segment_ids) if array is not None]
    if module.has_variable("cache", "index"):
        if not module.has_variable("cache", MARK):
            raise PeftJaxError(f"the cache was made without the {n} virtual tokens: make it with the bound model, "
                               "apply({'params': params}, batch, length, method='init_cache').")
        moved = None if positions is None else positions + n
        return next_fun(input_ids, attention_mask, positions=moved, segment_ids=segment_ids)
    if input_ids.ndim != 2 or any(array.shape != input_ids.shape for array in given):
        return next_fun(input_ids, attention_mask, positions=positions, segment_ids=segment_ids)  # says what is wrong
    if positions is None and segment_ids is not None:
        positions = _counted(segment_ids)
    if positions is not None:
        positions = _in_front(n, positions + n, 0).at[:, :n].set(jnp.arange(n))
    states = next_fun(_in_front(n, input_ids, 0), _in_front(n, attention_mask, 1), positions=positions,
                      segment_ids=_in_front(n, segment_ids, 1))
    return states[:, n:]


def _in_front(n, array, value):
    return None if array is None else jnp.pad(array, ((0, 0), (n, 0)), constant_values=value)


def _counted(segment_ids):
    """(B, T): tokens counted from 0 in each segment."""
    at = jnp.arange(segment_ids.shape[1])
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    return at - jnp.maximum.accumulate(jnp.where(begins, at, 0), axis=1)


def _embed(n, table, module, next_fun, input_ids):
    if module.has_variable("cache", "index"):
        return next_fun(input_ids)
    x = next_fun(input_ids[:, n:])
    rows = jnp.broadcast_to(table().astype(x.dtype), (x.shape[0], n, x.shape[2]))
    return jnp.concatenate([rows, x], axis=1)


def _visible(n, table, module, next_fun, key_mask, positions, index, segment_ids):
    """Every segment sees the virtual tokens, through a window as far as it reaches: by positions, since in the row
    padding or other segments may lie between."""
    full, windowed = next_fun(key_mask, positions, index, segment_ids)
    first = full.shape[-1] - key_mask.shape[1]  # keys of another method may stand in front
    if segment_ids is not None:
        full = full.at[:, :, n:, first:first + n].set(True)
    if windowed is not None:
        near = positions[:, None, :, None] - jnp.arange(n) < module.config.sliding_window
        windowed = windowed.at[..., first:first + n].set(full[..., first:first + n] & near)
    return full, windowed


def _init_cache(n, table, module, next_fun, batch, length):
    """A cache that begins with the virtual tokens. To run them through the model, they are made its vocabulary."""
    check_room(module, length, n)
    cache = {**next_fun(batch, length + n), MARK: jnp.int32(n)}
    model = module.clone(parent=None, config=dataclasses.replace(module.config, vocab_size=n))
    params = {**module.variables["params"], "embed_tokens": {"embedding": table()}}
    ids = jnp.broadcast_to(jnp.arange(n), (batch, n))
    return model.apply({"params": params, "cache": cache}, ids, method="hidden", mutable=["cache"])[1]["cache"]


HOOKS = {"hidden": _hidden, "embed": _embed, "visible": _visible, "init_cache": _init_cache}


def slots(path: str, slot: Slot, config, trained, count: int) -> dict[str, Slot]:
    """The one tensor of the file, the leaf ``path`` of ``count`` tokens. Raises ``PeftJaxError`` for other leaves."""
    if others := [other for other in trained if other != path]:
        raise no_place(others, config["peft_type"])
    if count != config["num_virtual_tokens"]:
        raise PeftJaxError(f"'{path}' holds {count} virtual tokens, the method says num_virtual_tokens="
                           f"{config['num_virtual_tokens']}: use the method that made the parameters.")
    return {KEY: slot}


def prompt_slots(config, flat, trained, naming) -> dict[str, Slot]:
    """Of prompt and P-tuning: the leaf as it is."""
    path = embedding(flat) + "prompt"
    return slots(path, Slot(path), config, trained, flat[path].shape[0])


def prompt_fields(config, flat, naming) -> dict[str, Any]:
    return {"num_transformer_submodules": 1, "token_dim": flat[embedding(flat) + "prompt"].shape[-1]}


def read(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments without num_transformer_submodules, which must be 1: here are decoders alone."""
    if stated.get("num_transformer_submodules") not in (None, 1):
        raise PeftJaxError(f"{where} has num_transformer_submodules={stated['num_transformer_submodules']}: adapters "
                           "of a decoder alone, with 1, can be read.")
    return {name: value for name, value in stated.items() if name != "num_transformer_submodules"}
