"""Virtual tokens, which no text holds and every row sees: what prefix, prompt and P-tuning share.

Prompt and P-tuning put n trained embeddings in front of every row. In a decoder they see no text, so packed rows have
them once, where each segment sees them, and a cache holds them from the start: ``init_cache`` of the bound model runs
them through it. In an encoder they see the text, so each text of a packed row has its own.

They find their places by what models call their parts: the token embedding, the kernel that makes the keys.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from peft_jax.core import tree, validation
from peft_jax.core.peft_format import PREFIX, Naming, Slot, no_place
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.models import masks

KEY = "prompt_embeddings"  # in the file; as in peft without the prefix of other keys
SAVED = PREFIX.removesuffix("model.")  # of modules_to_save: for these methods peft has one wrapper only
MARK = "virtual_tokens"  # in a cache: how many it was begun with; in the notes of a pass: how many stand in each row
LEAVES = ("prompt", "prompt_tokens", "prompt_encoder/", "prefix", "prefix_out", "prefix_bias", "prefix_encoder/")
EMBEDDINGS = (("embed_tokens",), ("wte",), ("embeddings", "word_embeddings"))  # the token embedding, from the root
_NAMES = "|".join(path[-1] for path in EMBEDDINGS)
OWN = re.compile(rf"(.*/)?(({_NAMES})/prompt|core/prefix|prefix_encoder)(_.*|/.*)?")


def tidy(**config: Any) -> dict[str, Any]:
    """The arguments with ``num_virtual_tokens`` and ``modules_to_save``, which all have, checked."""
    saved = config["modules_to_save"]
    validation.check_whole("num_virtual_tokens", config["num_virtual_tokens"])
    validation.check_modules("modules_to_save", saved)
    return {**config, "modules_to_save": validation.as_names(saved)}


def start(config: Mapping[str, Any], params: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """``params`` flat, modules to save in float32.

    Raises ``PeftJaxError`` where they hold virtual tokens already, as a file has room for one kind, or where
    modules_to_save names none of them.
    """
    flat = tree.flatten(params)
    if double := [path for path in flat if OWN.fullmatch(path)]:
        raise PeftJaxError(f"the parameters already hold virtual tokens ('{double[0]}'), and {kind} would add more: "
                           "start from the base's, and chain one such method only.")
    kernel_adapter.check_saved(config, params, ())
    return {path: kernel_adapter.trainable(path, leaf) if kernel_adapter.saved(config, path) else leaf
            for path, leaf in flat.items()}


def embedding(flat: Mapping[str, Any]) -> str:
    """The folder, with a slash at the end, of the token embedding. Raises ``PeftJaxError`` where there is none."""
    paths = [path for path in flat if re.fullmatch(rf"(.*/)?({_NAMES})/embedding", path)]
    if len(paths) != 1:
        names = ", ".join("/".join(path) for path in EMBEDDINGS)
        raise PeftJaxError(f"the parameters have {len(paths)} token embeddings ({names}), and virtual tokens go beside "
                           "one: they need a model of peft_jax.models.")
    return paths[0].removesuffix("embedding")


def check_vocabulary(what: str, ids: Any, flat: Mapping[str, Any]) -> None:
    """Raise ``PeftJaxError`` where token ids (n,) are beyond the model's embedding."""
    rows = flat[f"{embedding(flat)}embedding"].shape[0]
    if np.max(ids) >= rows:
        raise PeftJaxError(f"{what} has {np.max(ids)}, the embedding ends at {rows - 1}: take the ids from the "
                           "model's own tokenizer.")


def labels(config: Mapping[str, Any], params: Mapping[str, Any]) -> tree.Tree:
    """Every leaf of the virtual tokens and of modules_to_save trains, no other."""
    return kernel_adapter.labels(params, lambda path, _: OWN.fullmatch(path) is not None
                                 or kernel_adapter.saved(config, path))


def prepared(make: Callable[..., Method], config: Mapping[str, Any], model: Any, params: Mapping[str, Any],
             batches: Iterable[Mapping[str, Any]]) -> Method:
    """``prepare`` of prompt and P-tuning: ``packed_texts`` as an encoder's batches need it. Every text has an answer,
    so a row of a run holds no more texts than its batches have slots for answers."""
    most = config["packed_texts"]
    for batch in batches if is_encoder(model) else ():
        texts = int(np.max(batch.get("segment_ids", 1)))
        most = max(most, texts, np.shape(batch["loss_index"])[-1] if texts > 1 else 1)
    return make(**{name: value for name, value in config.items() if name != "peft_type"} | {"packed_texts": most})


def is_encoder(model: Any) -> bool:
    """Whether every token sees every other, the virtual ones too: such a model cannot have a cache."""
    return not hasattr(model, "init_cache")


def check_room(module: Any, length: int, tokens: int) -> None:
    """Raise ``PeftJaxError`` where ``length`` tokens and the virtual ones exceed the model's positions."""
    most = module.config.max_position_embeddings
    if length + tokens > most:
        raise PeftJaxError(f"{length} tokens and {tokens} virtual ones are more than the model's {most} positions: "
                           "shorten one of them.")


class Front(NamedTuple):
    """The tokens in front: how many, their embeddings (tokens, hidden) when called, the most texts of a row that is
    not looked at, and the call."""

    tokens: int
    table: Callable[[], jax.Array]
    packed: int
    context: Any


def intercept(leaf: str, table: Callable[[Mapping, Any], jax.Array], packed: int,
              next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """An interceptor for embeddings in front of every row.

    Args:
      leaf: the one beside the embedding whose presence says that there are some; its first axis counts them.
      table: ``(leaves beside the embedding, context) -> (n, hidden)``.
      packed: of an encoder, how many texts a row may hold whose segments are traced and cannot be counted.
    """
    hook = HOOKS.get(context.method_name)
    beside = _embedding_leaves(context.module) if hook else {}
    if hook is None or leaf not in beside:
        return next_fun(*args, **kwargs)
    front = Front(tokens=beside[leaf].shape[0], table=partial(table, beside, context), packed=packed, context=context)
    return hook(front, context.module, next_fun, *args, **kwargs)


def _embedding_leaves(module: Any) -> Mapping[str, Any]:
    for first, *others in EMBEDDINGS:
        leaves = module.get_variable("params", first, {})
        for name in others:
            leaves = leaves.get(name, {}) if isinstance(leaves, Mapping) else {}
        if leaves and isinstance(leaves, Mapping):
            return leaves
    return {}


def _hidden(front: Front, module: Any, next_fun: Callable[..., Any], input_ids: Any, attention_mask: Any = None, *,
            positions: Any = None, segment_ids: Any = None, lengths: Any = None, **types: Any) -> Any:
    """The virtual tokens take positions 0 to n - 1 and come out again at the end; a cache holds them already."""
    n, others = front.tokens, [attention_mask, positions, segment_ids, *types.values()]
    odd = lengths is not None and (segment_ids is not None or lengths.shape != input_ids.shape[:1])
    if module.has_variable("cache", "index"):
        if not module.has_variable("cache", MARK):
            raise PeftJaxError(f"the cache was made without the {n} virtual tokens: make it with the bound model, "
                               "apply({'params': params}, batch, length, method='init_cache').")
        moved = None if positions is None else positions + n
        return next_fun(input_ids, attention_mask, positions=moved, segment_ids=segment_ids, lengths=lengths)
    if input_ids.ndim != 2 or odd or any(array is not None and array.shape != input_ids.shape for array in others):
        return next_fun(input_ids, attention_mask, positions=positions, segment_ids=segment_ids, lengths=lengths,
                        **types)  # says what
    texts = _texts(front, module, segment_ids)
    if positions is None and segment_ids is not None:
        positions = _counted(segment_ids)
    if positions is not None:
        positions = _in_front(jnp.tile(jnp.arange(n), texts), positions + n)
    zero, one = jnp.zeros(n * texts, jnp.int32), jnp.ones(n * texts, jnp.int32)
    front.context.notes[MARK] = n * texts
    states = next_fun(_in_front(zero, input_ids), _in_front(one, attention_mask), positions=positions,
                      segment_ids=_in_front(jnp.repeat(jnp.arange(1, texts + 1), n), segment_ids),
                      lengths=None if lengths is None else lengths + n,
                      **{name: _in_front(zero, array) for name, array in types.items()})[:, n * texts:]
    if segment_ids is None or not is_encoder(module):
        return states
    return jnp.where(((segment_ids < 0) | (segment_ids > texts))[..., None], jnp.nan, states)


def _texts(front: Front, module: Any, segment_ids: Any) -> int:
    """How often the virtual tokens stand in a row: once, or in an encoder for each of its texts."""
    if segment_ids is None or not is_encoder(module):
        return 1
    return front.packed if isinstance(segment_ids, Tracer) else max(1, int(np.max(segment_ids)))


def _in_front(values: jax.Array, array: Any) -> jax.Array | None:
    """``array`` (B, T) behind ``values`` (n,) in every row, ``None`` without one."""
    if array is None:
        return None
    rest = jnp.asarray(array)
    rows = jnp.broadcast_to(values.astype(rest.dtype), (rest.shape[0], len(values)))
    return jnp.concatenate([rows, rest], axis=1)


def _counted(segment_ids: Any) -> jax.Array:
    """(B, T): tokens counted from 0 in each segment."""
    at = jnp.arange(segment_ids.shape[1])
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    return at - jnp.maximum.accumulate(jnp.where(begins, at, 0), axis=1)


def _embed(front: Front, module: Any, next_fun: Callable[..., Any], input_ids: Any) -> jax.Array:
    count = front.context.notes.get(MARK, 0)
    if not count or module.has_variable("cache", "index"):
        return next_fun(input_ids)
    x = next_fun(input_ids[:, count:])
    rows = jnp.tile(front.table().astype(x.dtype), (count // front.tokens, 1))
    return jnp.concatenate([jnp.broadcast_to(rows, (x.shape[0], *rows.shape)), x], axis=1)


def _visible(front: Front, module: Any, next_fun: Callable[..., Any], key_mask: Any, positions: Any, index: Any,
             rows: Any) -> tuple:
    """Every segment of a decoder sees the virtual tokens, through a window as far as it reaches: by positions, since
    in the row padding or other segments may lie between. In a row of one text, padded on the right, none do."""
    n, (full, windowed) = front.tokens, next_fun(key_mask, positions, index, rows)
    if is_encoder(module) or (key_mask is None and not rows.packed):
        return full, windowed
    full, windowed = (masks.dense(mask, positions.shape) for mask in (full, windowed))
    own = positions.shape[1] if key_mask is None else key_mask.shape[1]
    first = full.shape[-1] - own  # keys of another method may stand in front
    if rows.packed:
        full = full.at[:, :, n:, first:first + n].set(True)
    if windowed is not None:
        near = positions[:, None, :, None] - jnp.arange(n) < module.config.sliding_window
        windowed = windowed.at[..., first:first + n].set(full[..., first:first + n] & near)
    return full, windowed


def _pool(front: Front, module: Any, next_fun: Callable[..., Any], x: Any, seen: Any) -> Any:
    """Virtual tokens are no part of a text's mean. Its first token, though, is a virtual one, as in peft."""
    if module.config.head is not None and module.config.head.pooling == "mean":
        seen = seen.at[:, :, :front.context.notes.get(MARK, 0)].set(False)
    return next_fun(x, seen)


def _check_length(front: Front, module: Any, next_fun: Callable[..., Any], tokens: int) -> Any:
    """The virtual ones are counted with the others here; only models with learned positions ask."""
    count = front.context.notes.get(MARK, 0)
    check_room(module, tokens - count, count)
    return next_fun(tokens)


def _init_cache(front: Front, module: Any, next_fun: Callable[..., Any], batch: int, length: int) -> Any:
    """A cache that begins with the virtual tokens. To run them through the model, they are made its vocabulary."""
    n, params = front.tokens, module.variables["params"]
    check_room(module, length, n)
    cache = {**next_fun(batch, length + n), MARK: jnp.int32(n)}
    model = module.clone(parent=None, config=dataclasses.replace(module.config, vocab_size=n))
    name = next(path[0] for path in EMBEDDINGS if path[0] in params)
    ids = jnp.broadcast_to(jnp.arange(n), (batch, n))
    return model.apply({"params": {**params, name: {"embedding": front.table()}}, "cache": cache}, ids,
                       method="hidden", mutable=["cache"])[1]["cache"]


HOOKS = {"hidden": _hidden, "embed": _embed, "visible": _visible, "pool": _pool, "init_cache": _init_cache,
         "check_length": _check_length}


def slots(path: str, slot: Slot, config: Mapping[str, Any], trained: Sequence[str], naming: Naming, count: int,
          ) -> dict[str, Slot]:
    """The one tensor of the file, the leaf ``path`` of ``count`` tokens, and those of modules_to_save.

    Raises ``PeftJaxError`` for other trained leaves.
    """
    saved = [other for other in trained if other != path and kernel_adapter.saved(config, other)]
    if others := [other for other in trained if other != path and other not in saved]:
        raise no_place(others, config["peft_type"])
    if count != config["num_virtual_tokens"]:
        raise PeftJaxError(f"'{path}' holds {count} virtual tokens, the method says num_virtual_tokens="
                           f"{config['num_virtual_tokens']}: use the method that made the parameters.")
    whole = {f"{SAVED}{name}": part for other in saved for name, part in naming.whole(other).items()}
    return {KEY: slot, **whole}


def prompt_slots(config: Mapping[str, Any], flat: Mapping[str, Any], trained: Sequence[str], naming: Naming,
                 ) -> dict[str, Slot]:
    """Of prompt and P-tuning: the leaf as it is."""
    path = embedding(flat) + "prompt"
    return slots(path, Slot(path), config, trained, naming, flat[path].shape[0])


def prompt_fields(config: Mapping[str, Any], flat: Mapping[str, Any], naming: Naming) -> dict[str, Any]:
    """peft asks for both sizes where a model's own config has them under other names, as DistilBERT's has."""
    return {"num_transformer_submodules": 1, "token_dim": flat[embedding(flat) + "prompt"].shape[-1],
            "num_attention_heads": naming.heads}


def read(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments without num_transformer_submodules, which must be 1: here are decoders and encoders alone."""
    if stated.get("num_transformer_submodules") not in (None, 1):
        raise PeftJaxError(f"{where} has num_transformer_submodules={stated['num_transformer_submodules']}: adapters "
                           "of a decoder or an encoder alone, with 1, can be read.")
    return {name: value for name, value in stated.items() if name != "num_transformer_submodules"}
