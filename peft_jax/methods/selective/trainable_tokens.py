"""Trainable tokens: of an embedding only the rows of some tokens train (Hugging Face peft's ``TRAINABLE_TOKENS``).

    W' = W with row i replaced by t_j, for the j-th token i

Beside the ``embedding`` (V, D), or an untied head's ``kernel`` (D, V), stand ``tokens`` (n, D), which starts as those
rows, and the frozen ``token_indices`` int32 (n,). Where the embedding is the head as well, the head has these rows too.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from peft_jax.core import kernel_axes, targeting, tree, validation
from peft_jax.core.peft_format import PREFIX, Format, Naming, Slot, arguments_of
from peft_jax.core.targeting import Patterns
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method, check_leaves
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods import _own_weights as own_weights
from peft_jax.methods.soft_prompt import virtual_tokens
from peft_jax.quant import plain

LEAVES = ("tokens", "token_indices")


def trainable_tokens(token_indices: Sequence[int] = (), target_modules: Patterns = None, *,
                     init_weights: bool = True) -> Method:
    """Trainable tokens with the arguments and meanings of Hugging Face peft's ``TrainableTokensConfig``.

    Args:
      token_indices: ids of the tokens, each once.
      target_modules: names, or endings of names, of embeddings and heads, or a regex for whole names; ``None`` is the
        embedding with the most rows. A head that is tied follows its embedding; to train rows of only one of the two
        ``peft_jax.untie`` first.
      init_weights: False starts from normal random numbers instead of the base model's rows.

    Returns a :class:`Method`; its leaves are float32.

    >>> method = trainable_tokens([4, 2])
    >>> params = method.init(jax.random.key(0), {"embed": {"embedding": jnp.ones((6, 8))}})
    >>> {name: leaf.shape for name, leaf in params["embed"].items()}
    {'embedding': (6, 8), 'tokens': (2, 8), 'token_indices': (2,)}

    Raises ``PeftJaxError`` for token ids that are negative or twice there, and from ``init`` for ids beyond the
    vocabulary and names that match no embedding.
    """
    indices = tuple(token_indices) if isinstance(token_indices, Iterable) else ()
    if not indices or not all(map(validation.is_id, indices)) or len(set(indices)) < len(indices):
        raise PeftJaxError(f"token_indices={token_indices!r}: give at least one token id, each once, none negative.")
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": tuple(map(int, indices)),
              "target_modules": target_modules, "init_weights": init_weights}
    validation.check_switches(config, "init_weights")
    validation.check_modules("target_modules", target_modules)
    return Method(init=partial(_init, config), intercept=_intercept,
                  labels=partial(kernel_adapter.labels, trained=_is_tokens), fold=_fold, config=config, stored=FORMAT,
                  leaves=LEAVES)


def _init(config: Mapping[str, Any], rng: Any, params: Mapping[str, Any],
          axes: Mapping[str, kernel_axes.KernelAxes] | None = None) -> tree.Tree:
    flat = tree.flatten_arrays(params)
    if double := [path for path in flat if path.rpartition("/")[2] == "token_indices"]:
        raise PeftJaxError(f"the parameters already hold trainable tokens ('{double[0]}'): merge first.")
    for number, path in enumerate(_weights(config, flat)):
        rows = _rows(plain(flat[path]), path)
        known = (*own_weights.PLAIN, *virtual_tokens.LEAVES)
        kernel_adapter.check_first("trainable_tokens", path.rpartition("/")[0], known, flat)
        if max(config["token_indices"]) >= rows.shape[0]:
            raise PeftJaxError(f"token_indices has {max(config['token_indices'])}, but '{path}' ends at "
                               f"{rows.shape[0] - 1}.")
        start = rows[np.array(config["token_indices"])].astype(jnp.float32)
        if not config["init_weights"]:
            start = jax.random.normal(jax.random.fold_in(rng, number), start.shape, jnp.float32)
        folder = path.rpartition("/")[0]
        flat |= {f"{folder}/tokens": start, f"{folder}/token_indices": jnp.asarray(config["token_indices"], jnp.int32)}
    return tree.unflatten(flat)


def _weights(config: Mapping[str, Any], flat: Mapping[str, Any]) -> list[str]:
    """The paths of the embeddings and heads that are meant."""
    weights = [path for path, leaf in flat.items() if leaf.ndim == 2 and
               (path.endswith("/embedding") or (path.endswith("/kernel") and path.split("/")[-2] in targeting.HEADS))]
    names = [path.rpartition("/")[0].replace("/", ".") for path in weights]
    if config["target_modules"] is None:
        embeddings = [path for path in weights if path.endswith("/embedding")]
        return sorted(embeddings, key=lambda path: -flat[path].shape[0])[:1]
    own_weights.check_names("target_modules", config["target_modules"], names)
    return [path for path, name in zip(weights, names) if targeting.listed(config["target_modules"], name)]


def _rows(weight: jax.Array, path: str) -> jax.Array:
    """A weight as one row for each token, (V, D)."""
    return weight.T if path.endswith("/kernel") else weight


def _intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    y = next_fun(*args, **kwargs)
    module = context.module
    if context.method_name not in ("__call__", "attend") or not module.has_variable("params", "token_indices"):
        return y
    if isinstance(module, nn.Embed | nn.Dense) and not context.of_flax:
        return y
    own = module.variables["params"]
    tokens, indices = own["tokens"], own["token_indices"]
    if isinstance(module, nn.Embed) and context.method_name == "__call__":
        return _looked_up(args[0], y, tokens.astype(y.dtype), indices)
    if isinstance(module, nn.Embed):
        rows = plain(own["embedding"])[indices]
    elif isinstance(module, nn.Dense):
        rows = plain(own["kernel"]).T[indices]
    else:
        raise PeftJaxError(f"'{'/'.join(module.path)}' is a {type(module).__name__}: trainable tokens are rows of an "
                           "Embed or Dense module.")
    change = (tokens - rows.astype(jnp.float32)).astype(y.dtype)  # zero at the start: then logits are the base's bits
    return y.at[..., indices].add(args[0].astype(y.dtype) @ change.T)


def _looked_up(ids: jax.Array, y: jax.Array, tokens: jax.Array, indices: jax.Array) -> jax.Array:
    """``y`` (..., D) of ``ids`` (...), replaced where an id is one of ``indices``."""
    order = jnp.argsort(indices)
    place = order[jnp.minimum(jnp.searchsorted(indices[order], ids), len(indices) - 1)]
    return jnp.where((indices[place] == ids)[..., None], tokens[place], y)


def _is_tokens(path: str, flat: Mapping[str, Any]) -> bool:
    folder, _, name = path.rpartition("/")
    return name == "tokens" and f"{folder}/token_indices" in flat


def _fold(params: Mapping[str, Any]) -> tree.Tree:
    """Put the rows into their embedding or head, in its dtype."""
    check_leaves(LEAVES, params, "TRAINABLE_TOKENS")
    flat = tree.flatten(params)
    for folder in kernel_adapter.folders(flat, "token_indices"):
        indices, tokens = flat.pop(folder + "token_indices"), flat.pop(folder + "tokens")
        if (path := folder + "embedding") in flat:
            flat[path] = plain(flat[path]).at[indices].set(tokens.astype(flat[path].dtype))
        else:
            path = folder + "kernel"
            flat[path] = plain(flat[path]).at[:, indices].set(tokens.T.astype(flat[path].dtype))
    return tree.unflatten(flat)


def _slots(config: Mapping[str, Any], flat: Mapping[str, Any], trained: Sequence[str], naming: Naming,
           ) -> dict[str, Slot]:
    """As in peft, which also stores a tied head's rows under the head's name."""
    tensors = {}
    for path in trained:
        folder = path.rpartition("/")[0]
        names = [*naming.modules(folder, ()), *([naming.tied[folder]] if folder in naming.tied else [])]
        tensors |= {f"{PREFIX}{name}.trainable_tokens_delta": Slot(path) for name in names}
    return tensors


def _fields(config: Mapping[str, Any], flat: Mapping[str, Any], naming: Naming) -> dict[str, Any]:
    """peft's patterns want whole names or their endings, with its prefix."""
    trained = [path.rpartition("/")[0] for path in flat if _is_tokens(path, flat)]
    names = [name for folder in trained for name in naming.modules(folder, ())]
    return {"target_modules": tuple(names), "token_indices": list(config["token_indices"])}


FORMAT = Format(kind="TRAINABLE_TOKENS", make=trainable_tokens, arguments=arguments_of(trainable_tokens), slots=_slots,
                fields=_fields)
SHOWN = {"arguments": {"token_indices": (0, 1, 2, 3)}}  # in tables and benchmarks
