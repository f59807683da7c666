"""Examples to token ids with a loss mask: loss on the answer and on the token that ends it, never on the question.

Every kind of example becomes text pieces, each with or without loss, and one rule joins them: the tokens of what came
before are never changed by what follows. So a trained sequence starts with the very tokens that generation will feed.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from peft_jax.data.chat_rows import CHAT_LOSS, Piece, Row, chat_rows, prompt_of, template_of
from peft_jax.data.sources import Example
from peft_jax.errors import PeftJaxError, nearest

ON_TOO_LONG = ("error", "truncate_left", "drop", "split")
# What may have happened to examples, as counts and in words.
HAPPENED = {"dropped": "dropped", "truncated": "truncated", "split": "split",
            "unweighted": "answers left out by their weight or train", "closed": "answers after an empty reasoning"}

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
      (sequences in the order of ``examples``, several of a chat whose template rewrites history,
      {"examples", "sequences", "tokens", "answer_tokens", "longest", "dropped", "truncated", "split"}), and of chats
      where there are any "unweighted" answers, which say themselves that they are not to be learnt, and "closed" ones,
      before which an empty reasoning was put as the prompt opens one.
    Raises:
      PeftJaxError: names the example, its length, the limit and what to set; the first one in which there is nothing to
        learn; also where nothing is left.
    """
    for key, choices in (("on_too_long", ON_TOO_LONG), ("chat_loss", CHAT_LOSS)):
        if getattr(config, key) not in choices:
            raise PeftJaxError(f"data.{key}={getattr(config, key)!r} is not known; "
                               f"{nearest(getattr(config, key), choices)}")
    encoded: list[Encoded] = []
    rows, counts = _rows_of_all(examples, tokenizer, config)
    for index, (ids, mask) in _tokens_of_all(examples, rows, tokenizer, config):
        where = where_of(index, examples[index])
        what, parts = _fit(ids, mask, _kind(examples[index]) == "text", tokenizer, config, where)
        if what:
            counts[what] += 1
        encoded += [_encoded(part_ids, part_mask, index) for part_ids, part_mask in parts]
    if not encoded:
        raise PeftJaxError(f"none of {len(examples)} examples is left: {counts['dropped']} longer than max_length="
                           f"{config.max_length}{_happened(counts, ('unweighted',))}")
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
    """Tokenise one example; see ``encode_all``. Raises ``PeftJaxError`` where it makes several sequences."""
    config = _Options(max_length, on_too_long, add_eos, chat_loss)
    encoded, _ = encode_all([example], tokenizer, config)
    if len(encoded) > 1:
        raise PeftJaxError(f"{where_of(0, example)} makes {len(encoded)} sequences: use encode_all")
    return encoded[0]


def encode_prompts(examples: Sequence[Example], tokenizer) -> list[np.ndarray]:
    """(n,) int32 ids of each question, ready for generation: the prompt, or the turns before the last answer rendered
    with the template's generation prompt. The same tokens as the trained sequence starts with."""
    texts = [[(_prompt(i, example, tokenizer), False)] for i, example in enumerate(examples)]
    bos = _bos(tokenizer)
    prompts = [ids if _kind(e) == "messages" else bos + ids
               for e, (ids, _) in zip(examples, _tokenize(texts, tokenizer), strict=True)]
    for index, ids in enumerate(prompts):
        if not ids:
            raise PeftJaxError(
                f"{where_of(index, examples[index])} has an empty prompt: there is nothing to generate from"
            )
    return [np.asarray(ids, np.int32) for ids in prompts]


def choice_tokens(choices: Sequence[str], prompt: str, tokenizer) -> np.ndarray:
    """(k,) int32: the first token of each choice (written as it follows ``prompt``, leading space included).

    Raises:
      PeftJaxError: two choices start with the same token, so that one token cannot tell them apart.
    """
    pieces = [[(prompt, False), (choice, True)] for choice in choices]
    tokens = list(_tokenize(pieces, tokenizer))
    if empty := [choice for choice, (_, mask) in zip(choices, tokens) if not any(mask)]:
        raise PeftJaxError(f"the choice {empty[0]!r} of {list(choices)} is empty: give it a word")
    first = [ids[mask.index(True)] for ids, mask in tokens]
    if len(set(first)) < len(first):
        raise PeftJaxError(
            f"the choices {list(choices)} do not all start with different tokens ({first}); use other words"
        )
    return np.asarray(first, np.int32)


def describe(counts: dict[str, int]) -> str:
    """One line for people about what ``encode_all`` did."""
    line = "{examples} examples, {tokens} tokens ({answer_tokens} to learn), longest {longest}".format(**counts)
    return line + _happened(counts, HAPPENED)


def _happened(counts: dict[str, int], kinds: Iterable[str]) -> str:
    return "".join(f", {counts[kind]} {HAPPENED[kind]}" for kind in kinds if counts.get(kind))


class _Options(NamedTuple):
    max_length: int
    on_too_long: str
    add_eos: bool
    chat_loss: str


def where_of(index: int, example: Example) -> str:
    """What to call an example of a list in an error."""
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
    if any(isinstance(example.get(key), list) for key in ("prompt", "completion")):
        return "messages"
    return next((kind for kind in ("messages", "completion", "text") if kind in example), "nothing")


def _rows_of_all(examples: Sequence[Example], tokenizer, config) -> tuple[list[tuple[int, Row]], dict[str, int]]:
    """([(number of the example, a row of it)], counts of what happened)."""
    rows: list[tuple[int, Row]] = []
    unweighted = closed = 0
    template = template_of(tokenizer, config.add_eos) if any(_kind(one) == "messages" for one in examples) else None
    for index, example in enumerate(examples):
        if template is None or _kind(example) != "messages":
            rows.append((index, Row(_pieces(index, example))))
            continue
        chat = chat_rows(example, template, config.chat_loss, where_of(index, example))
        rows += [(index, row) for row in chat.rows]
        unweighted, closed = unweighted + chat.unweighted, closed + chat.closed
    counts = {"dropped": 0, "truncated": 0, "split": 0}
    return rows, counts | {kind: n for kind, n in (("unweighted", unweighted), ("closed", closed)) if n}


def _pieces(index: int, example: Example) -> list[Piece]:
    kind = _kind(example)
    if kind == "completion" and "prompt" in example and example["completion"].strip():
        return [(example["prompt"], False), (example["completion"], True)]
    if kind == "text" and example["text"].strip():
        return [(example["text"], True)]
    raise PeftJaxError(
        f"{where_of(index, example)} has an empty answer or none: it needs prompt and completion, messages, or text"
    )


def _prompt(index: int, example: Example, tokenizer) -> str:
    where = where_of(index, example)
    if _kind(example) == "messages":
        return prompt_of(example, tokenizer, where)
    if "prompt" not in example:
        raise PeftJaxError(f"{where} has no prompt to generate from")
    return example["prompt"]


# From pieces to tokens.


def _tokens_of_all(examples: Sequence[Example], rows: Sequence[tuple[int, Row]], tokenizer,
                   config) -> Iterator[tuple[int, Tokens]]:
    bos, eos = _bos(tokenizer), tokenizer.eos_token_id
    for (index, row), (ids, mask) in zip(rows, _tokenize([row.pieces for _, row in rows], tokenizer), strict=True):
        where, kind = where_of(index, examples[index]), _kind(examples[index])
        if kind != "messages":  # a chat template writes its own
            ids, mask = bos + ids, [False] * len(bos) + mask
        if config.add_eos and not row.ended and ids[-1:] != [eos]:
            ids, mask = [*ids, _eos(tokenizer)], [*mask, True]
        if mask[:1] == [True] and kind != "text":
            raise PeftJaxError(f"{where} has an empty prompt and this tokenizer adds no bos: nothing predicts its "
                               "first token")
        if not any(mask[1:]):
            raise PeftJaxError(f"{where} leaves nothing to learn: {len(ids)} token{'s' * (len(ids) != 1)}, of which "
                               "none is one of an answer that another one precedes; leave it out")
        yield index, (ids, mask)


def _bos(tokenizer) -> list[int]:
    """[bos] where the tokenizer itself puts it before a text, else []."""
    ids = list(tokenizer("")["input_ids"])
    return [tokenizer.bos_token_id] if ids and ids[0] == tokenizer.bos_token_id else []


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
