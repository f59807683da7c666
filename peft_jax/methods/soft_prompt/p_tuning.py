"""P-tuning (arXiv 2103.10385): virtual tokens in front of every input, whose embeddings a small network makes.

    MLP:   p = W2 relu(W1 relu(W0 e))        LSTM:  p = W1 relu(W0 BiLSTM(e))        with biases, e (n, hidden) trained

Beside the token embedding stand ``prompt_tokens`` (n, hidden), which is e, and the network's leaves below
``prompt_encoder``; see ``prompt.py`` for what becomes of p. The network is there for training only: a
saved adapter holds p, and loads as the plain leaf ``prompt``.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core import targeting, tree, validation
from peft_jax.core.peft_format import Format, Naming
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods.soft_prompt import virtual_tokens
from peft_jax.methods.soft_prompt.prompt import ARGUMENTS, table

ENCODERS = ("MLP", "LSTM", None)


def ptuning(num_virtual_tokens: int = 20, encoder_reparameterization_type: str | None = "MLP",
            encoder_hidden_size: int | None = None, encoder_num_layers: int = 2,
            encoder_dropout: float = 0.0, *, modules_to_save: targeting.Patterns = None,
            packed_texts: int = 1) -> Method:
    """P-tuning with the names, meanings and defaults of Hugging Face peft's ``PromptEncoderConfig``.

    Args:
      num_virtual_tokens: n.
      encoder_reparameterization_type: "MLP" of three layers, "LSTM" (bidirectional) with two more layers behind, or
        ``None`` for the plain embeddings of a saved adapter.
      encoder_hidden_size: units of the encoder; ``None`` is the model's hidden size.
      encoder_num_layers: layers of the LSTM; the MLP's cannot be chosen.
      encoder_dropout: between layers of the LSTM, where ``dropout`` is in ``rngs``.
      modules_to_save, packed_texts: as of ``prompt``.

    Returns a :class:`Method` for a model of :mod:`peft_jax.models`; its leaves are float32. It cannot be merged.

    >>> method = ptuning(4, encoder_hidden_size=5)
    >>> params = method.init(jax.random.key(0), {"embed_tokens": {"embedding": jnp.ones((11, 6))}})
    >>> {name: leaf.shape for name, leaf in params["embed_tokens"]["prompt_encoder"].items()}
    {'w0': (6, 5), 'b0': (5,), 'w1': (5, 5), 'b1': (5,), 'w2': (5, 6), 'b2': (6,)}

    Raises ``PeftJaxError`` for arguments of the wrong type or without effect, and from ``init`` as of ``prompt``.
    """
    config = virtual_tokens.tidy(
        peft_type="P_TUNING", num_virtual_tokens=num_virtual_tokens,
        encoder_reparameterization_type=encoder_reparameterization_type, encoder_hidden_size=encoder_hidden_size,
        encoder_num_layers=encoder_num_layers, encoder_dropout=encoder_dropout, modules_to_save=modules_to_save,
        packed_texts=packed_texts)
    validation.check_whole("encoder_hidden_size", 1 if encoder_hidden_size is None else encoder_hidden_size)
    for name in ("encoder_num_layers", "packed_texts"):
        validation.check_whole(name, config[name])
    validation.check_choice("encoder_reparameterization_type", encoder_reparameterization_type, ENCODERS)
    validation.check_probability("encoder_dropout", encoder_dropout)
    if encoder_reparameterization_type == "MLP" and (encoder_num_layers != 2 or encoder_dropout):
        raise PeftJaxError(f"encoder_num_layers={encoder_num_layers}, encoder_dropout={encoder_dropout}: they act in "
                           "the LSTM only (peft ignores them); leave out both, or choose 'LSTM'.")
    read = ("prompt_tokens", partial(_table, config)) if encoder_reparameterization_type else ("prompt", table)
    return Method(
        init=partial(_init, config), intercept=partial(virtual_tokens.intercept, *read, packed_texts),
        labels=partial(virtual_tokens.labels, config), fold=None, config=config, stored=FORMAT,
        leaves=virtual_tokens.LEAVES, vectors=("b0", "b1", "b2"),
        prepare=partial(virtual_tokens.prepared, ptuning, config))


def _init(config: Mapping[str, Any], rng: jax.Array, params: Mapping[str, Any],
          axes: Any = None) -> tree.Tree:
    flat = virtual_tokens.start(config, params, "P-tuning")
    folder = virtual_tokens.embedding(flat)
    width = flat[f"{folder}embedding"].shape[1]
    encoder = config["encoder_reparameterization_type"]
    tokens = jax.random.normal(rng, (config["num_virtual_tokens"], width), jnp.float32)
    flat[f"{folder}{'prompt_tokens' if encoder else 'prompt'}"] = tokens
    for number, (name, (shape, bound)) in enumerate(_shapes(config, width).items()):
        key = jax.random.fold_in(rng, number)
        flat[f"{folder}prompt_encoder/{name}"] = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    return tree.unflatten(flat)


def _shapes(config: Mapping[str, Any], width: int) -> dict[str, tuple[tuple[int, ...], float]]:
    """Of each leaf of the encoder its shape and the bound of its uniform start, both as in torch."""
    units, encoder = config["encoder_hidden_size"] or width, config["encoder_reparameterization_type"]
    if encoder is None:
        return {}
    if encoder == "MLP":
        return _dense([width, units, units, width])
    shapes = {}
    for layer in range(config["encoder_num_layers"]):
        into = 2 * units if layer else width
        sizes = {"in": (2, into, 4 * units), "hidden": (2, units, 4 * units), "bias": (2, 2, 4 * units)}
        shapes |= {f"lstm{layer}_{name}": (size, 1 / math.sqrt(units)) for name, size in sizes.items()}
    return shapes | _dense([2 * units, 2 * units, width])


def _dense(widths: Sequence[int]) -> dict[str, tuple[tuple[int, ...], float]]:
    shapes = {}
    for i, (into, out) in enumerate(itertools.pairwise(widths)):
        bound = 1 / math.sqrt(into)
        shapes |= {f"w{i}": ((into, out), bound), f"b{i}": ((out,), bound)}
    return shapes


def _table(config: Mapping[str, Any], leaves: Mapping[str, Any], context: Any) -> jax.Array:
    drop = partial(kernel_adapter.dropped, context.module, context, rate=config["encoder_dropout"],
                   argument="encoder_dropout")
    return encode(config, leaves["prompt_tokens"], leaves["prompt_encoder"], drop)


def encode(config: Mapping[str, Any], x: jax.Array, leaves: Mapping[str, jax.Array],
           drop: Callable[[jax.Array], jax.Array] = lambda x: x) -> jax.Array:
    """The embeddings (n, hidden) that the encoder's ``leaves`` make of ``x`` (n, hidden)."""
    if config["encoder_reparameterization_type"] == "LSTM":
        for layer in range(config["encoder_num_layers"]):
            x = drop(x) if layer else x
            own = [leaves[f"lstm{layer}_{name}"] for name in ("in", "hidden", "bias")]
            both = [_lstm(x, *(leaf[way] for leaf in own), reverse=bool(way)) for way in (0, 1)]
            x = jnp.concatenate(both, axis=-1)
    last = sum(name.startswith("w") for name in leaves) - 1
    for i in range(last + 1):
        x = x @ leaves[f"w{i}"] + leaves[f"b{i}"]
        x = x if i == last else jax.nn.relu(x)
    return x


def _lstm(x: jax.Array, w: jax.Array, u: jax.Array, biases: jax.Array, reverse: bool) -> jax.Array:
    """One direction of one layer, torch's gates i, f, g, o and its two biases: (n, in) -> (n, units)."""

    def step(carry: tuple, gates: jax.Array) -> tuple:
        state, cell = carry
        i, f, g, o = jnp.split(gates + state @ u, 4)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        state = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (state, cell), state

    zero = jnp.zeros(u.shape[0], x.dtype)
    return jax.lax.scan(step, (zero, zero), x @ w + biases.sum(0), reverse=reverse)[1]


def _plain(config: Mapping[str, Any], flat: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The encoder's output in the place of the encoder."""
    folder = virtual_tokens.embedding(flat)
    if f"{folder}prompt" in flat:
        return config, flat
    inside = f"{folder}prompt_encoder/"
    leaves = {path.removeprefix(inside): jnp.asarray(leaf) for path, leaf in flat.items() if path.startswith(inside)}
    rest = {path: leaf for path, leaf in flat.items() if not path.startswith(f"{folder}prompt_")}
    made = encode(config, jnp.asarray(flat[f"{folder}prompt_tokens"]), leaves)
    return config, {**rest, f"{folder}prompt": np.asarray(made)}


def _fields(config: Mapping[str, Any], flat: Mapping[str, Any], naming: Naming) -> dict[str, Any]:
    """peft wants an encoder's name, though it uses none for a saved adapter."""
    encoder = config["encoder_reparameterization_type"] or "MLP"
    return {**virtual_tokens.prompt_fields(config, flat, naming), "encoder_reparameterization_type": encoder}


def _read(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {**virtual_tokens.read(stated, where), "encoder_reparameterization_type": None}


SILENT = ("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
          "token_dim", "num_attention_heads", "num_layers")
FORMAT = Format(kind="P_TUNING", make=ptuning, arguments=ARGUMENTS, slots=virtual_tokens.prompt_slots, fields=_fields,
                silent=SILENT, read=_read, plain=_plain)
