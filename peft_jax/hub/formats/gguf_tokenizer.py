"""The tokenizer inside a ``.gguf`` file, written out as Hugging Face's files.

Built from the vocabulary and merges with the ``tokenizers`` library. transformers can read these files too, but needs
torch for it, and (5.23) does not cut out digits for ``smollm``: "a  3" then gets other tokens than in training.
"""

from pathlib import Path
from typing import Any

from peft_jax.errors import PeftJaxError, nearest

_CONTROL, _USER_DEFINED = 3, 4  # of llama.cpp's token types, those matched whole in the text

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# llama.cpp's name for how a text is cut before merging -> the regex that cuts first; "" leaves it to GPT-2's rule.
SPLITS = {"gpt-2": "", "smollm": r"\p{N}", "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3}


def save_tokenizer(given: dict[str, Any], folder: Path, path: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template of GGUF metadata ``given`` into ``folder``.

    ``path`` is the file's name for messages. Raises ``PeftJaxError`` for a vocabulary that is no byte-level BPE.
    """
    from peft_jax.hub.quiet_transformers import PreTrainedTokenizerFast

    tokens = given["tokenizer.ggml.tokens"]
    special = {
        f"{name}_token": tokens[given[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
        if f"tokenizer.ggml.{key}_token_id" in given
    }
    special.setdefault("pad_token", special["eos_token"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_backend(given, tokens, path), model_max_length=given["llama.context_length"],
        clean_up_tokenization_spaces=False, **special,
    )
    if "tokenizer.chat_template" in given:
        tokenizer.chat_template = given["tokenizer.chat_template"]
    tokenizer.save_pretrained(folder)


def _backend(given: dict[str, Any], tokens: list[str], path: Path):
    from tokenizers import AddedToken, Tokenizer, decoders, models

    kind = given["tokenizer.ggml.model"]
    if kind != "gpt2":
        raise PeftJaxError(f"{path} has a vocabulary of kind '{kind}': of GGUF files only byte-level BPE ('gpt2') is "
                           "read; use the model's safetensors folder instead.")
    cut = given.get("tokenizer.ggml.pre", "gpt-2")
    if cut not in SPLITS:
        raise PeftJaxError(f"{path} cuts text by the rule '{cut}', which is not known: {nearest(cut, SPLITS)}")
    merges = [tuple(merge.split(" ")) for merge in given["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # Llama 3's vocabulary has whole words that its merges do not reach; they are taken as they are.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=SPLITS[cut] == _LLAMA3))
    tokenizer.pre_tokenizer = _pre_tokenizer(SPLITS[cut])
    tokenizer.decoder = decoders.ByteLevel()
    for token, type_ in zip(tokens, given["tokenizer.ggml.token_type"], strict=True):
        if type_ == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif type_ == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    if given.get("tokenizer.ggml.add_bos_token"):
        _add_bos(tokenizer, tokens[given["tokenizer.ggml.bos_token_id"]])
    return tokenizer


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
