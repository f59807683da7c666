"""Tokenizers, through transformers."""

import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_jax.core import files
from peft_jax.errors import PeftJaxError
from peft_jax.hub import download, model_config
from peft_jax.hub.formats import gguf

# What transformers opens beside these two.
CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
FILES = (TOKENIZER, "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja")
OBJECTS = (CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.json")
MOST = 256 << 20  # bytes of a file; the largest known has a seventh
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


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
    if not os.path.lexists(folder / CONFIG) and not os.path.lexists(folder / TOKENIZER):
        raise PeftJaxError(f"{folder} has no tokenizer ({TOKENIZER}, {CONFIG}): name the folder that the tokenizer was "
                           "saved in.")
    check_files(folder)
    rows = _rows(folder)
    from peft_jax.hub.quiet_transformers import AutoTokenizer

    with files.reading(folder, "a tokenizer"):  # transformers and tokenizers raise bare Exception for a damaged file
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, use_fast=True)
        special = {name: getattr(tokenizer, f"{name}_id", None) for name in SPECIAL}
    if not tokenizer.is_fast:
        raise PeftJaxError(f"the tokenizer in {folder} has no fast version ({TOKENIZER}): convert it with transformers "
                           "and save it again.")
    if beyond := [name for name, number in special.items() if rows and number is not None and number >= rows]:
        raise PeftJaxError(f"the tokenizer in {folder} has the {beyond[0]} {getattr(tokenizer, beyond[0])!r:.60} of "
                           f"number {special[beyond[0]]}, and the model beside it knows {rows} tokens: fetch it again.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _rows(folder: Path) -> int | None:
    """How many tokens the model beside the tokenizer knows; ``None`` where there is none, or it does not say."""
    if not os.path.lexists(folder / "config.json"):
        return None
    rows = model_config.read(folder).get("vocab_size")  # transformers reads it too; its error would look like another's
    return rows if type(rows) is int else None


def check_files(folder: Path) -> None:
    """Raise ``PeftJaxError`` where one of a tokenizer's files is no file, is too large, or says what it cannot mean."""
    for name in FILES:
        if os.path.lexists(folder / name):
            files.regular_file(folder / name, "a tokenizer", MOST)
    for name in OBJECTS:
        if os.path.lexists(folder / name):
            _check_fields(folder / name, files.read_json(folder / name))


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _is_template(value: Any) -> bool:
    several = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
    return all(isinstance(one, str) or (isinstance(one, dict) and isinstance(one.get("template"), str) and isinstance(
        one.get("name"), str)) for one in several)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list | dict) and all(map(_is_token, value.values() if isinstance(value, dict) else value))


# {field: (what belongs there, how to know it)}; null may stand everywhere.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(SPECIAL, ("a token", _is_token)),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"),
                    ("several tokens", _are_tokens)),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces",
                     "do_lower_case", "legacy"), ("true or false", _is_flag)),
    **dict.fromkeys(("padding_side", "truncation_side"), ("left or right", lambda value: value in ("left", "right"))),
    "chat_template": ("a template", _is_template),
    "model_max_length": ("a number above 0", lambda value: type(value) in (int, float) and value > 0),
    "tokenizer_class": ("a name", lambda value: isinstance(value, str)),
}


def _check_fields(path: Path, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        words, fits = _FIELDS.get(name, ("", lambda value: True))
        if value is not None and not fits(value):
            raise PeftJaxError(f"{path} has {name}={reprlib.repr(value)}, where {words} belongs: fetch it again.")
