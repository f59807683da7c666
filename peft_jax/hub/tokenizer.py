"""Tokenizers, through transformers."""

import os

from peft_jax.errors import PeftJaxError
from peft_jax.hub import download, model_config
from peft_jax.hub.formats import gguf


def load_tokenizer(source: str | os.PathLike):
    """transformers' fast tokenizer of a model; it always has a pad token.

    Args:
      source: as of :func:`peft_jax.hub.download.resolve`. A ``.gguf`` file's tokenizer is converted once and cached.

    Returns:
      A ``PreTrainedTokenizerFast``. ``pad_token_id`` may be ``eos_token_id``: mask padding by length, never by id.

    Raises:
      PeftJaxError: the source or its tokenizer files are missing or unreadable, it has no fast tokenizer, or the
        model's config.json beside it is damaged.
    """
    path = download.resolve(source, weights=False)
    folder = gguf.convert(path) if path.is_file() else path
    if not folder.joinpath("tokenizer_config.json").is_file() and not folder.joinpath("tokenizer.json").is_file():
        raise PeftJaxError(f"{folder} has no tokenizer (tokenizer.json, tokenizer_config.json): name the folder that "
                           "the tokenizer was saved in.")
    if folder.joinpath("config.json").is_file():
        model_config.read(folder)  # transformers reads it too, and its error would look like the tokenizer's
    from peft_jax.hub.quiet_transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, use_fast=True)
    except Exception as error:  # transformers and tokenizers raise bare Exception for a damaged file
        raise PeftJaxError(f"the tokenizer in {folder} cannot be read: {error}".splitlines()[0]) from error
    if not tokenizer.is_fast:
        raise PeftJaxError(f"the tokenizer in {folder} has no fast version (tokenizer.json): convert it with "
                           "transformers and save it again.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
