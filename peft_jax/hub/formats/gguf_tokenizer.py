"""The tokenizer inside a ``.gguf`` file, written out as Hugging Face's files.

Built from the vocabulary and merges with the ``tokenizers`` library. transformers can read these files too, but needs
torch for it, and (5.23) does not cut out digits for ``smollm``: "a  3" then gets other tokens than in training.
"""

from pathlib import Path
from typing import Any

from peft_jax.core import files
from peft_jax.errors import PeftJaxError, nearest, some
from peft_jax.hub.formats.gguf_config import FLAG, ID, IDS, SIZE, TEXT, TEXTS, checked

_PREFIX = "tokenizer.ggml."
_CONTROL, _USER_DEFINED, _TYPES = 3, 4, set(range(7))  # llama.cpp's token types; the first two match whole in a text

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# llama.cpp's name for how a text is cut before merging -> the regex that cuts first; "" leaves it to GPT-2's rule.
SPLITS = {"gpt-2": "", "smollm": r"\p{N}", "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3}


def save_tokenizer(given: dict[str, Any], rows: int, folder: Path, path: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template of GGUF metadata ``given`` into ``folder``.

    ``rows`` are those of the model's embedding, ``path`` is the file's name for messages. Raises ``PeftJaxError`` for a
    vocabulary that is no byte-level BPE, or is not whole.
    """
    from peft_jax.hub.quiet_transformers import PreTrainedTokenizerFast

    tokens = _tokens(given, rows, path)
    special = {f"{name}_token": tokens[given[f"{_PREFIX}{key}_token_id"]]
               for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
               if _id(given, key, len(tokens), path, required=key == "eos") is not None}
    special.setdefault("pad_token", special["eos_token"])
    template = checked(given, "tokenizer.chat_template", TEXT, path, None)
    length = checked(given, "llama.context_length", SIZE, path)
    backend = _backend(given, tokens, path)
    with files.reading(path, "a tokenizer"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length,
                                            clean_up_tokenization_spaces=False, **special)
        if template is not None:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)


def _tokens(given: dict[str, Any], rows: int, path: Path) -> list[str]:
    tokens = checked(given, f"{_PREFIX}tokens", TEXTS, path)
    kinds = checked(given, f"{_PREFIX}token_type", IDS, path)
    if len(set(tokens)) < len(tokens) or len(tokens) != rows or len(kinds) != rows or not set(kinds) <= _TYPES:
        raise PeftJaxError(f"{path} has {len(tokens)} tokens, {len(set(tokens))} of them different, and {len(kinds)} "
                           f"types of tokens ({some(sorted(map(str, set(kinds))))}), for an embedding of {rows} rows: "
                           "fetch it again.")
    return tokens


def _id(given: dict[str, Any], key: str, count: int, path: Path, required: bool = False) -> int | None:
    """The number of a special token."""
    number = checked(given, f"{_PREFIX}{key}_token_id", ID, path, *(() if required else (None,)))
    if number is not None and number >= count:
        raise PeftJaxError(f"{path} has '{_PREFIX}{key}_token_id' = {number}, and {count} tokens: fetch it again.")
    return number


def _backend(given: dict[str, Any], tokens: list[str], path: Path):
    from tokenizers import AddedToken, Tokenizer, decoders, models

    cut, merges = _cut(given, path), _merges(given, path)
    with files.reading(path, "a tokenizer"):
        # Llama 3's vocabulary has whole words that its merges do not reach; they are taken as they are.
        tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges,
                                         ignore_merges=SPLITS[cut] == _LLAMA3))
        tokenizer.pre_tokenizer = _pre_tokenizer(SPLITS[cut])
        tokenizer.decoder = decoders.ByteLevel()
        for token, kind in zip(tokens, given[f"{_PREFIX}token_type"], strict=True):
            if kind == _CONTROL:
                tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
            elif kind == _USER_DEFINED:
                tokenizer.add_tokens([AddedToken(token, normalized=False)])
    # llama.cpp puts it in front for Llama 3's rule where the file does not say
    if checked(given, f"{_PREFIX}add_bos_token", FLAG, path, SPLITS[cut] == _LLAMA3):
        number = _id(given, "bos", len(tokens), path, required=True)
        assert number is not None
        _add_bos(tokenizer, tokens[number])
    return tokenizer


def _cut(given: dict[str, Any], path: Path) -> str:
    """The rule by which text is cut before merging, a key of ``SPLITS``."""
    kind = checked(given, f"{_PREFIX}model", TEXT, path)
    if kind != "gpt2":
        raise PeftJaxError(f"{path} has a vocabulary of kind '{kind:.60}': of GGUF files only byte-level BPE ('gpt2') "
                           "is read; use the model's safetensors folder instead.")
    cut = checked(given, f"{_PREFIX}pre", TEXT, path)
    if cut not in SPLITS:
        raise PeftJaxError(f"{path} cuts text by the rule '{cut:.60}', which is not known: {nearest(cut, SPLITS)}")
    return cut


def _merges(given: dict[str, Any], path: Path) -> list[tuple[str, str]]:
    merges = [merge.split(" ") for merge in checked(given, f"{_PREFIX}merges", TEXTS, path)]
    if odd := [merge for merge in merges if len(merge) != 2 or not all(merge)]:
        raise PeftJaxError(f"{path} has the merge '{' '.join(odd[0]):.60}', which is not of two tokens: fetch it "
                           "again.")
    return [(one, other) for one, other in merges]


def _pre_tokenizer(split: str):
    from tokenizers import Regex, pre_tokenizers

    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split != _LLAMA3)
    if not split:
        return bytes_only
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), behavior="isolated"), bytes_only])


def _add_bos(tokenizer, bos: str) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
