"""Prompt tuning (arXiv 2104.08691): n trained embeddings in front of every input, and nothing else.

    logits(x_1 .. x_T) = LM([p_1 .. p_n, E x_1 .. E x_T]) without the first n

Beside ``embed_tokens/embedding`` stands ``prompt`` (n, hidden). Real tokens take the positions from n on, as if the
prompt were text; packed segments all see one prompt, and each the prompt alone before its own tokens.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax import arguments, tree, virtual
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method
from peft_jax.stored import Format

INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


def prompt(num_virtual_tokens: int = 20, prompt_tuning_init: str = "RANDOM", *,
           prompt_tuning_init_ids: Sequence[int] | None = None) -> Method:
    """Prompt tuning with the names and meanings of Hugging Face peft's ``PromptTuningConfig``.

    Args:
      num_virtual_tokens: n.
      prompt_tuning_init: "RANDOM" is normal numbers of deviation 1, as in peft, far larger than most embeddings;
        "SAMPLE_VOCAB" embeddings of random tokens; "TEXT" those of ``prompt_tuning_init_ids``.
      prompt_tuning_init_ids: token ids of a text (peft takes the text and a tokenizer), cut or repeated to n.

    Returns a :class:`Method` for a decoder of :mod:`peft_jax.models`; its leaf is float32. It cannot be merged. A
    cache for decoding must be the bound model's: ``apply({"params": params}, batch, length, method="init_cache")``.

    >>> method = prompt(4, "SAMPLE_VOCAB")
    >>> params = method.init(jax.random.key(0), {"embed_tokens": {"embedding": jnp.ones((11, 6))}})
    >>> {name: leaf.shape for name, leaf in params["embed_tokens"].items()}
    {'embedding': (11, 6), 'prompt': (4, 6)}

    Raises ``PeftJaxError`` for arguments of the wrong type, and from ``init`` for parameters without an embedding, with
    virtual tokens already, or ids beyond the vocabulary.
    """
    config = {"peft_type": "PROMPT_TUNING", **locals()}
    arguments.check_whole("num_virtual_tokens", num_virtual_tokens)
    arguments.check_choice("prompt_tuning_init", prompt_tuning_init, INITS)
    _check_ids(prompt_tuning_init, prompt_tuning_init_ids)
    return Method(partial(_init, config), partial(virtual.intercept, "prompt", table), virtual.labels, None, config,
                  stored=FORMAT, leaves=virtual.LEAVES)


def _check_ids(how, ids) -> None:
    if (how == "TEXT") != (ids is not None):
        raise PeftJaxError(f"prompt_tuning_init={how!r} and prompt_tuning_init_ids={ids!r}: 'TEXT' starts from the "
                           "token ids of a text, such as (504, 3216), and nothing else does.")
    several = isinstance(ids, Iterable) and len(ids)
    if ids is not None and not (several and all(isinstance(i, int | np.integer) and i >= 0 for i in ids)):
        raise PeftJaxError(f"prompt_tuning_init_ids={ids!r}: give token ids, at least one, such as (504, 3216).")


def table(held, context) -> jax.Array:
    """The embeddings (n, hidden) of a plain prompt."""
    return held["prompt"]


def _init(config, rng, params, axes=None):
    flat = virtual.start(params, "prompt tuning")
    folder = virtual.embedding(flat)
    flat[f"{folder}prompt"] = _start(config, rng, flat[f"{folder}embedding"]).astype(jnp.float32)
    return tree.unflatten(flat)


def _start(config, rng, embedding):
    n, how = config["num_virtual_tokens"], config["prompt_tuning_init"]
    if how == "RANDOM":
        return jax.random.normal(rng, (n, embedding.shape[1]), jnp.float32)
    if how == "SAMPLE_VOCAB":
        return embedding[jax.random.randint(rng, (n,), 0, embedding.shape[0])]
    ids = np.resize(np.asarray(config["prompt_tuning_init_ids"]), n)
    if ids.max() >= embedding.shape[0]:
        raise PeftJaxError(f"prompt_tuning_init_ids has {ids.max()}, the embedding ends at {embedding.shape[0] - 1}: "
                           "take the ids from the model's own tokenizer.")
    return embedding[ids]


ARGUMENTS = ("num_virtual_tokens", "num_transformer_submodules")
# What the prompt started from, which peft asks of its tokenizer, and sizes that follow from the tensor and the model.
SILENT = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "token_dim",
          "num_attention_heads", "num_layers")


def _fields(config, flat, naming):
    """Trained, it is what it is; peft would ask for the tokenizer of a TEXT."""
    return {**virtual.prompt_fields(config, flat, naming), "prompt_tuning_init": "RANDOM"}


FORMAT = Format("PROMPT_TUNING", prompt, ARGUMENTS, virtual.prompt_slots, _fields, SILENT, virtual.read)
