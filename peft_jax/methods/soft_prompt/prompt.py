"""Prompt tuning (arXiv 2104.08691): n trained embeddings in front of every input, and nothing else.

    logits(x_1 .. x_T) = LM([p_1 .. p_n, E x_1 .. E x_T]) without the first n

Beside the token embedding, ``embed_tokens/embedding`` in a Llama, stands ``prompt`` (n, hidden). Real tokens take the
positions from n on, as if the prompt were text. In a decoder the segments of a packed row share one prompt: each sees
the prompt and its own tokens. In an encoder each text of a row has a prompt of its own. A head that reads the first
token reads p_1, as in peft; one that takes the mean leaves the prompt out.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core import targeting, tree, validation
from peft_jax.core.peft_format import Format, Naming
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method
from peft_jax.methods.soft_prompt import virtual_tokens
from peft_jax.quant import take

INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


def prompt(num_virtual_tokens: int = 20, prompt_tuning_init: str = "RANDOM", *,
           prompt_tuning_init_ids: Sequence[int] | None = None, modules_to_save: targeting.Patterns = None,
           packed_texts: int = 1) -> Method:
    """Prompt tuning with the names and meanings of Hugging Face peft's ``PromptTuningConfig``.

    Args:
      num_virtual_tokens: n.
      prompt_tuning_init: "RANDOM" is normal numbers of deviation 1, as in peft, far larger than most embeddings;
        "SAMPLE_VOCAB" embeddings of random tokens; "TEXT" those of ``prompt_tuning_init_ids``.
      prompt_tuning_init_ids: token ids of a text (peft takes the text and a tokenizer), cut or repeated to n.
      modules_to_save: names of modules that train as a whole and are saved, such as a "classifier", without which peft
        cannot read a classifier's adapter.
      packed_texts: of an encoder whose ``segment_ids`` are traced, as under ``jit``, and count from 1: how many texts a
        row may hold; the states of more are NaN. ``prepare`` sets it for a training run.

    Returns a :class:`Method` for a model of :mod:`peft_jax.models`; its leaves are float32. It cannot be merged. A
    cache for decoding must be the bound model's: ``apply({"params": params}, batch, length, method="init_cache")``.

    >>> method = prompt(4, "SAMPLE_VOCAB")
    >>> params = method.init(jax.random.key(0), {"embed_tokens": {"embedding": jnp.ones((11, 6))}})
    >>> {name: leaf.shape for name, leaf in params["embed_tokens"].items()}
    {'embedding': (11, 6), 'prompt': (4, 6)}

    Raises ``PeftJaxError`` for arguments of the wrong type, and from ``init`` for parameters without an embedding, with
    virtual tokens already, or ids beyond the vocabulary.
    """
    config = virtual_tokens.tidy(
        peft_type="PROMPT_TUNING", num_virtual_tokens=num_virtual_tokens, prompt_tuning_init=prompt_tuning_init,
        prompt_tuning_init_ids=prompt_tuning_init_ids, modules_to_save=modules_to_save, packed_texts=packed_texts)
    validation.check_choice("prompt_tuning_init", prompt_tuning_init, INITS)
    _check_ids(prompt_tuning_init, prompt_tuning_init_ids)
    validation.check_whole("packed_texts", packed_texts)
    return Method(
        init=partial(_init, config), intercept=partial(virtual_tokens.intercept, "prompt", table, packed_texts),
        labels=partial(virtual_tokens.labels, config), fold=None, config=config, stored=FORMAT,
        leaves=virtual_tokens.LEAVES, prepare=partial(virtual_tokens.prepared, prompt, config))


def _check_ids(how: str, ids: Any) -> None:
    if (how == "TEXT") != (ids is not None):
        raise PeftJaxError(f"prompt_tuning_init={how!r} and prompt_tuning_init_ids={ids!r}: 'TEXT' starts from the "
                           "token ids of a text, such as (504, 3216), and nothing else does; on the command line the "
                           "text itself may be given, prompt_tuning_init_text.")
    validation.check_ids("prompt_tuning_init_ids", ids)


def table(leaves: Mapping[str, jax.Array], context: Any) -> jax.Array:
    """The embeddings (n, hidden) of a plain prompt."""
    return leaves["prompt"]


def _init(config: Mapping[str, Any], rng: jax.Array, params: Mapping[str, Any],
          axes: Any = None) -> tree.Tree:
    flat = virtual_tokens.start(config, params, "prompt tuning")
    folder = virtual_tokens.embedding(flat)
    if config["prompt_tuning_init"] == "TEXT":
        virtual_tokens.check_vocabulary("prompt_tuning_init_ids", config["prompt_tuning_init_ids"], flat)
    flat[f"{folder}prompt"] = _start(config, rng, flat[f"{folder}embedding"]).astype(jnp.float32)
    return tree.unflatten(flat)


def _start(config: Mapping[str, Any], rng: jax.Array, embedding: Any) -> jax.Array:
    n, how = config["num_virtual_tokens"], config["prompt_tuning_init"]
    if how == "RANDOM":
        return jax.random.normal(rng, (n, embedding.shape[1]), jnp.float32)
    if how == "SAMPLE_VOCAB":
        return take(embedding, jax.random.randint(rng, (n,), 0, embedding.shape[0]))
    return take(embedding, np.resize(np.asarray(config["prompt_tuning_init_ids"]), n))


ARGUMENTS = ("num_virtual_tokens", "num_transformer_submodules", "modules_to_save")
# What the prompt started from, which peft asks of its tokenizer, and sizes that follow from the tensor and the model.
SILENT = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "token_dim",
          "num_attention_heads", "num_layers")


def _fields(config: Mapping[str, Any], flat: Mapping[str, Any], naming: Naming) -> dict[str, Any]:
    """Trained, it is what it is; peft would ask for the tokenizer of a TEXT."""
    return {**virtual_tokens.prompt_fields(config, flat, naming), "prompt_tuning_init": "RANDOM"}


FORMAT = Format(kind="PROMPT_TUNING", make=prompt, arguments=ARGUMENTS, slots=virtual_tokens.prompt_slots,
                fields=_fields, silent=SILENT, read=virtual_tokens.read)
