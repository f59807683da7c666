"""Examples to token ids with a loss mask: loss on the answer and on the token that ends it, never on the question.

Every kind of example becomes text pieces, each with or without loss, and one rule joins them: the tokens of what came
before are never changed by what follows. So a trained sequence starts with the very tokens that generation will feed.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from peft_jax.data.sources import Example
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.hub.chat_template import render

ON_TOO_LONG = ("error", "truncate_left", "drop", "split")
CHAT_LOSS = ("all", "last")

Piece = tuple[str, bool]  # text, has loss
Tokens = tuple[list[int], list[bool]]


class Encoded(NamedTuple):
    """One sequence.

    input_ids: (n,) int32.
    loss_mask: (n,) bool, True where the token is one to be learnt; never at 0, which nothing precedes.
    example: which example of the list it came from.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    example: int = 0


def encode_all(examples: Sequence[Example], tokenizer, config) -> tuple[list[Encoded], dict[str, int]]:
    """Tokenise examples; also what happened to them, as counts.

    Args:
      tokenizer: a ``transformers`` tokenizer; its ``bos`` is put first where it does so itself.
      config: ``max_length`` (tokens, 0: no limit), ``on_too_long``, ``add_eos``, ``chat_loss`` ("all" assistant turns
        or the "last" one). ``on_too_long``: "error"; "truncate_left" takes tokens off the start of the question (an
        error where that would cut an answer); "drop" leaves the example out; "split" cuts plain text into several
        sequences.
    Returns:
      (sequences in the order of ``examples``,
      {"examples", "sequences", "tokens", "answer_tokens", "longest", "dropped", "truncated", "split"}).
    Raises:
      PeftJaxError: names the example, its length, the limit and what to set; also where nothing is left.
    """
    for key, choices in (("on_too_long", ON_TOO_LONG), ("chat_loss", CHAT_LOSS)):
        if getattr(config, key) not in choices:
            raise PeftJaxError(f"data.{key}={getattr(config, key)!r} is not known; "
                               f"{nearest(getattr(config, key), choices)}")
    encoded: list[Encoded] = []
    counts: dict[str, int] = dict.fromkeys(("dropped", "truncated", "split"), 0)
    for index, (ids, mask) in enumerate(_tokens_of_all(examples, tokenizer, config)):
        where = _where(index, examples[index])
        what, parts = _fit(ids, mask, "text" in _kind(examples[index]), tokenizer, config, where)
        if what:
            counts[what] += 1
        encoded += [_encoded(part_ids, part_mask, index) for part_ids, part_mask in parts]
    if not encoded:
        raise PeftJaxError(
            f"none of {len(examples)} examples is left: {counts['dropped']} longer than max_length={config.max_length}"
        )
    return encoded, _counts(examples, encoded) | counts


def encode(
    example: Example,
    tokenizer,
    *,
    max_length: int = 0,
    on_too_long: str = "error",
    add_eos: bool = True,
    chat_loss: str = "all",
) -> Encoded:
    """Tokenise one example; see ``encode_all``."""
    config = _Options(max_length, on_too_long, add_eos, chat_loss)
    return encode_all([example], tokenizer, config)[0][0]


def encode_prompts(examples: Sequence[Example], tokenizer) -> list[np.ndarray]:
    """(n,) int32 ids of each question, ready for generation: the prompt, or the turns before the last answer rendered
    with the template's generation prompt. The same tokens as the trained sequence starts with."""
    texts = [[(_prompt(i, example, tokenizer), False)] for i, example in enumerate(examples)]
    bos = _bos(tokenizer)
    prompts = [_with_bos(e, ids, bos) for e, (ids, _) in zip(examples, _tokenize(texts, tokenizer), strict=True)]
    for index, ids in enumerate(prompts):
        if not ids:
            raise PeftJaxError(
                f"{_where(index, examples[index])} has an empty prompt: there is nothing to generate from"
            )
    return [np.asarray(ids, np.int32) for ids in prompts]


def choice_tokens(choices: Sequence[str], prompt: str, tokenizer) -> np.ndarray:
    """(k,) int32: the first token of each choice (written as it follows ``prompt``, leading space included).

    Raises:
      PeftJaxError: two choices start with the same token, so that one token cannot tell them apart.
    """
    pieces = [[(prompt, False), (choice, True)] for choice in choices]
    first = [ids[mask.index(True)] for ids, mask in _tokenize(pieces, tokenizer)]
    if len(set(first)) < len(first):
        raise PeftJaxError(
            f"the choices {list(choices)} do not all start with different tokens ({first}); use other words"
        )
    return np.asarray(first, np.int32)


def describe(counts: dict[str, int]) -> str:
    """One line for people about what ``encode_all`` did."""
    line = "{examples} examples, {tokens} tokens ({answer_tokens} to learn), longest {longest}".format(**counts)
    return line + "".join(f", {counts[what]} {what}" for what in ("dropped", "truncated", "split") if counts[what])


class _Options(NamedTuple):
    max_length: int
    on_too_long: str
    add_eos: bool
    chat_loss: str


def _where(index: int, example: Example) -> str:
    return f"example {index} ({example['origin']})" if "origin" in example else f"example {index}"


def _encoded(ids: Sequence[int], mask: Sequence[bool], index: int) -> Encoded:
    loss_mask = np.asarray(mask, bool)
    loss_mask[:1] = False
    return Encoded(np.asarray(ids, np.int32), loss_mask, index)


def _counts(examples: Sequence[Example], encoded: Sequence[Encoded]) -> dict[str, int]:
    lengths = [len(e.input_ids) for e in encoded]
    answers = sum(int(e.loss_mask.sum()) for e in encoded)
    sizes = {"examples": len(examples), "sequences": len(encoded), "tokens": sum(lengths), "answer_tokens": answers}
    return sizes | {"longest": max(lengths)}


# From example to pieces of text.


def _kind(example: Example) -> str:
    return next((kind for kind in ("messages", "completion", "text") if kind in example), "nothing")


def _pieces(index: int, example: Example, tokenizer, chat_loss: str) -> list[Piece]:
    kind = _kind(example)
    if kind == "messages":
        return _chat_pieces(example["messages"], tokenizer, chat_loss, _where(index, example))
    if kind == "completion" and "prompt" in example and example["completion"]:
        return [(example["prompt"], False), (example["completion"], True)]
    if kind == "text" and example["text"]:
        return [(example["text"], True)]
    raise PeftJaxError(
        f"{_where(index, example)} has an empty answer or none: it needs prompt and completion, messages, or text"
    )


def _chat_pieces(messages: list[dict], tokenizer, chat_loss: str, where: str) -> list[Piece]:
    """The rendered conversation up to its last answer, cut before and after every answer that is to be learnt.

    The cuts come from rendering the conversation's prefixes, so any template will do that only ever appends; most
    templates do not mark the answers themselves.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise PeftJaxError(f"{where} has no assistant turn to learn from")
    full = render(tokenizer, messages[: answers[-1] + 1], False, where)
    pieces, done = [], 0
    for i in answers if chat_loss == "all" else answers[-1:]:
        before = render(tokenizer, messages[:i], True, where)
        through = render(tokenizer, messages[: i + 1], False, where)
        if not (through.startswith(before) and full.startswith(through)):
            raise PeftJaxError(
                f"{where}: this tokenizer's chat template rewrites what came before when turn {i} is added, so where "
                'that answer lies cannot be told; set data.chat_loss="last" to learn the last answer only, or use '
                "prompts and completions"
            )
        end = _end_of_turn(through, len(before), tokenizer)
        pieces += [(full[done : len(before)], False), (full[len(before) : end], True)]
        done = end
    return pieces


def _end_of_turn(text: str, start: int, tokenizer) -> int:
    """Where the answer that starts at ``start`` ends: after its end-of-turn token, without the line break behind it."""
    end = len(text.rstrip())
    special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return end if any(text.endswith(token, start, end) for token in special) else len(text)


def _prompt(index: int, example: Example, tokenizer) -> str:
    where = _where(index, example)
    if "messages" in example:
        messages = example["messages"]
        return render(tokenizer, messages[:-1] if messages[-1]["role"] == "assistant" else messages, True, where)
    if "prompt" not in example:
        raise PeftJaxError(f"{where} has no prompt to generate from")
    return example["prompt"]


# From pieces to tokens.


def _tokens_of_all(examples: Sequence[Example], tokenizer, config) -> Iterator[Tokens]:
    bos, eos = _bos(tokenizer), tokenizer.eos_token_id
    pieces = [_pieces(i, example, tokenizer, config.chat_loss) for i, example in enumerate(examples)]
    for index, (ids, mask) in enumerate(_tokenize(pieces, tokenizer)):
        example = examples[index]
        if _kind(example) != "messages":  # a chat template writes its own
            ids, mask = _with_bos(example, ids, bos), [False] * len(bos) + mask
            if config.add_eos and ids[-1] != eos:
                ids, mask = [*ids, _eos(tokenizer)], [*mask, True]
        if mask[0] and _kind(example) != "text":
            raise PeftJaxError(
                f"{_where(index, example)} has an empty prompt and this tokenizer adds no bos: nothing predicts its "
                "first token"
            )
        yield ids, mask


def _bos(tokenizer) -> list[int]:
    """[bos] where the tokenizer itself puts it before a text, else []."""
    ids = list(tokenizer("")["input_ids"])
    return [tokenizer.bos_token_id] if ids and ids[0] == tokenizer.bos_token_id else []


def _with_bos(example: Example, ids: list[int], bos: list[int]) -> list[int]:
    return ids if _kind(example) == "messages" else bos + ids


def _eos(tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise PeftJaxError("data.add_eos is set but this tokenizer has no eos token; set data.add_eos=False")
    return tokenizer.eos_token_id


def _ids(texts: list[str], tokenizer) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _tokenize(pieces_of_all: Sequence[Sequence[Piece]], tokenizer) -> Iterator[Tokens]:
    """Token ids and loss mask of each list of pieces.

    A piece's tokens are what its text adds to the tokens of the text so far. That keeps a leading space right for
    byte-level BPE and for SentencePiece alike. Where the tokenizer would merge across the cut, the piece is tokenised
    on its own.
    """
    for batch in (pieces_of_all[i : i + 1000] for i in range(0, len(pieces_of_all), 1000)):
        so_far = [list(itertools.accumulate(text for text, _ in pieces)) for pieces in batch]
        flat = iter(_ids([text for texts in so_far for text in texts], tokenizer))
        for pieces in batch:
            ids, mask = [], []
            for (text, loss), joint in zip(pieces, flat):
                new = joint[len(ids) :] if joint[: len(ids)] == ids else _ids([text], tokenizer)[0]
                ids, mask = ids + new, mask + [loss] * len(new)
            yield ids, mask


# Too long.


def _fit(ids: list[int], mask: list[bool], is_text: bool, tokenizer, config, where: str) -> tuple[str, list[Tokens]]:
    """What was done ("" nothing, "dropped", "truncated", "split") and the sequences that remain."""
    limit, excess = config.max_length, len(ids) - config.max_length
    if limit <= 0 or excess <= 0:
        return "", [(ids, mask)]
    if config.on_too_long == "drop":
        return "dropped", []
    if config.on_too_long == "split" and is_text:
        return "split", [(ids[i : i + limit], mask[i : i + limit]) for i in range(0, len(ids), limit)]
    keep = 1 if ids[:1] == _bos(tokenizer) else 0
    if config.on_too_long == "truncate_left" and limit > keep and not any(mask[: excess + keep + 1]):
        return "truncated", [(ids[:keep] + ids[keep + excess :], mask[:keep] + mask[keep + excess :])]
    raise PeftJaxError(_too_long(len(ids), config, where))


def _too_long(length: int, config, where: str) -> str:
    why = {"error": "", "truncate_left": ", and cutting it there would remove tokens of an answer",
           "split": ", and only plain text can be split"}[config.on_too_long]
    options = "truncate_left (shortens the question), drop, or split (plain text)"
    limit = f"data.max_length={config.max_length}"
    return f"{where} has {length} tokens, more than {limit}{why}; raise it or set data.on_too_long to {options}"
