"""An example as it will be learnt, as text for people: what the tokens read as, the learnt ones between marks."""

import itertools
import textwrap
from collections.abc import Sequence

from peft_jax.data.batches import One
from peft_jax.data.labelled import Labelled

OPEN, CLOSE = "[[", "]]"
WIDTH = 80  # columns
MOST = 140  # characters of a part, where it is to be brief
PARTS = 4

Part = tuple[str, bool]  # text, whether it is learnt


def preview(one: One, tokenizer, names: Sequence[str] = (), brief: bool = False, title: str = "example") -> str:
    """Lines of at most 80 columns: how many tokens, what is learnt, and the text.

    Args:
      names: of the classes that labels are numbers of.
      brief: cut long texts in the middle, saying how much, and write line breaks as ``\\n``.
      title: what to call the example.
    """
    parts = parts_of(one, tokenizer)
    text = "".join(f"{OPEN}{text}{CLOSE}" if learnt else text for text, learnt in (shorter(parts) if brief else parts))
    lines = [_printable(line) for line in ([text.replace("\n", "\\n")] if brief else text.split("\n"))]
    wrapped = [piece for line in lines for piece in
               textwrap.wrap(line, WIDTH - 2, drop_whitespace=False, replace_whitespace=False, expand_tabs=False)
               or [""]]
    return "\n".join((f"{title}: {_heading(one, names)}", *(f"  {piece}" for piece in wrapped)))


def parts_of(one: One, tokenizer) -> list[Part]:
    """What the tokens read as, special tokens too, cut wherever learnt ones and others meet."""
    ids = one.input_ids.tolist()
    mask = [False] * len(ids) if isinstance(one, Labelled) else one.loss_mask.tolist()
    parts, before, end = [], "", 0
    for learnt, run in itertools.groupby(mask):
        end += len(list(run))
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)  # a part's own would lose its space
        parts.append((text[len(before) :], learnt))
        before = text
    return parts


def shorter(parts: Sequence[Part]) -> list[Part]:
    """Of many parts the first and last two, and of a long text its start and end, saying how much is left out.

    >>> shorter([("a" * 150, True)])[0][0].replace("a" * 70, "A")
    'A ... (10 characters) ... A'
    """
    kept = [(_cut(text), learnt) for text, learnt in parts]
    if len(kept) <= PARTS:
        return kept
    left_out = sum(len(text) for text, _ in parts[PARTS // 2 : -PARTS // 2])
    return [*kept[: PARTS // 2], (f" ... ({left_out:,} characters) ... ", False), *kept[-PARTS // 2 :]]


def _cut(text: str) -> str:
    if len(text) <= MOST:
        return text
    half = MOST // 2
    return f"{text[:half]} ... ({len(text) - 2 * half:,} characters) ... {text[-half:]}"


def _heading(one: One, names: Sequence[str]) -> str:
    tokens = f"{len(one.input_ids)} token{'s' if len(one.input_ids) > 1 else ''}"
    if isinstance(one, Labelled):
        return f"{tokens}, whose label is learnt: {names[int(one.label)] if names else one.label}"
    return f"{tokens}, {int(one.loss_mask.sum())} learnt: those between {OPEN} and {CLOSE}"


def _printable(text: str) -> str:
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
