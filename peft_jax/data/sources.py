"""Where examples come from: rated sentences of the package index, local files, the Hugging Face Hub.

An example is a plain dict: ``{"prompt", "completion"}``, ``{"messages"}`` (a list of ``{"role", "content"}``) or
``{"text"}``, with ``"origin"`` (file and row, for error messages) and whatever else a metric needs.
"""

import hashlib
import html
import math
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft_jax.data.files import read_table
from peft_jax.data.tables import named_columns, read_hub, table_examples, unused_columns
from peft_jax.errors import PeftJaxError, nearest

Example = dict[str, Any]


class DataSet(NamedTuple):
    """train, validation: examples. unused: names of columns that no example holds; () of what is no table. notes: what
    a person should know of the split, a line each."""

    train: list[Example]
    validation: list[Example]
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_examples(task) -> dict[str, list[Example]]:
    """The examples of :func:`load_data_set` as ``{"train": [...], "validation": [...]}``."""
    data = load_data_set(task)
    return {"train": data.train, "validation": data.validation}


def load_data_set(task) -> DataSet:
    """The examples of a task.

    Args:
      task: attributes as in ``configs/tasks.py``. Without a validation source or split of its own,
        ``validation_fraction`` of the examples is held out by ``split_by_hash``.
    Raises:
      PeftJaxError: unknown kind, missing file or column, unreachable Hub, empty data set, bad line.
    """
    if task.kind not in KINDS:
        raise PeftJaxError(f"task.kind={task.kind!r} is not known; {nearest(task.kind, KINDS)}")
    if not 0.0 <= task.validation_fraction <= 1.0:
        raise PeftJaxError(f"task.validation_fraction={task.validation_fraction} must lie between 0 and 1")
    train, validation, unused = KINDS[task.kind](task)
    notes: tuple[str, ...] = ()
    if not train:
        raise PeftJaxError(f"the data set {task.source} of task {task.name!r} is empty")
    if validation is None:
        notes = _notes_of_split(train, task.validation_fraction)
        train, validation = split_by_hash(train, task.validation_fraction)
        _check_split(task, train, validation)
    elif not validation:
        raise PeftJaxError(f"the validation data of task {task.name!r} is empty")
    return DataSet(train=sample_by_hash(train, task.train_limit), unused=unused, notes=notes,
                   validation=sample_by_hash(validation, task.validation_limit))


def is_chat(task) -> bool:
    """Whether the examples are chats; the data is read only where the task has columns and names none."""
    if not hasattr(task, "messages_column"):
        return False
    return "messages" in (named_columns(task) or load_examples(task)["train"][0])


def _check_split(task, train: list, validation: list) -> None:
    total = len(train) + len(validation)
    if (not validation and task.validation_fraction > 0) or (not train and task.validation_fraction < 1):
        side = "training" if validation else "validation"
        raise PeftJaxError(
            f"task.validation_fraction={task.validation_fraction} of {total} examples with one text leaves none for "
            f"{side}; add examples, change the fraction (0 holds nothing out) or name validation data of its own"
        )


def _notes_of_split(examples: Sequence[Example], fraction: float) -> tuple[str, ...]:
    """Where :func:`split_by_hash` moves its edge, a line that says so."""
    hashes = [hash_fraction(text_key(example)) for example in examples]
    if _edge(hashes, fraction) == fraction:
        return ()
    none = not any(one < fraction for one in hashes)
    what = "none: 1 is held out" if none else "all: 1 is trained on"
    return (f"{fraction} of {len(examples)} examples is {what} (task.validation_fraction)",)


# Splitting: by what the text is, never by where it stands.


def text_key(example: Example) -> str:
    """What the example asks, with case and spacing removed: two examples with the same key are duplicates."""
    if "review" in example:
        text = example["review"]
    elif "messages" in example:
        turns = [message["role"] for message in example["messages"]]
        asked = turns.index("assistant") if "assistant" in turns else len(turns)
        text = " ".join(str(message["content"]) for message in example["messages"][:asked])
    else:
        text = example["prompt"] if "prompt" in example else example["text"]
    return " ".join(text.casefold().split())


def hash_fraction(key: str) -> float:
    """A number in [0, 1) that depends on ``key`` alone, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=6).digest(), "big") / 2**48


def split_by_hash(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """(train, validation): about ``fraction`` of the distinct texts are held out.

    The side of an example depends on its text alone, not on its place or on the other examples, so a grown or reordered
    file keeps its split, and duplicates (case and spacing aside) fall on the same side. Only where a fraction between 0
    and 1 would leave one side empty, of few texts, does the text nearest to the edge go there.
    """
    hashes = [hash_fraction(text_key(example)) for example in examples]
    edge = _edge(hashes, fraction)
    train, validation = [], []
    for one, example in zip(hashes, examples, strict=True):
        (validation if one < edge else train).append(example)
    return train, validation


def _edge(hashes: Sequence[float], fraction: float) -> float:
    """``fraction``, or, where all ``hashes`` lie on one side of it, what has one of them on the other."""
    distinct = sorted(set(hashes))
    if len(distinct) < 2 or not 0 < fraction < 1 or distinct[0] < fraction <= distinct[-1]:
        return fraction
    return distinct[1] if fraction <= distinct[0] else distinct[-1]


def sample_by_hash(examples: Sequence[Example], limit: int) -> list[Example]:
    """At most ``limit`` examples (0: all) in their old order, chosen by a hash of the text: a fixed random sample."""
    if limit <= 0 or limit >= len(examples):
        return list(examples)
    # Not the hash of the split: held-out texts share its low end.
    chosen = sorted(range(len(examples)), key=lambda i: (hash_fraction("sample " + text_key(examples[i])), i))[:limit]
    return [examples[i] for i in sorted(chosen)]


def half_by_hash(examples: Sequence[Example], part: str) -> list[Example]:
    """Held-out examples by a hash of the text: half for "validation", to choose by, half for "test"; or "all"."""
    if part == "all":
        return list(examples)
    return [one for one in examples if (hash_fraction("half " + text_key(one)) < 0.5) == (part == "validation")]


# Rated sentences: the default task and the newspaper probe.


def read_rated_sentences(archive: Path, member: str) -> list[tuple[float, str, str]]:
    """(human mean, text, origin) of every line ``id<TAB>mean<TAB>text`` of one member of a .tar.gz.

    Only that member is read, in memory; nothing is extracted. The texts came through web pages and some carry HTML
    entities, a few escaped twice (``&amp;amp;``); they are decoded, because the raters read ``&`` and a model's own
    text has no entities. Nothing else is changed, so the split does not depend on taste.

    Raises:
      PeftJaxError: no such member; a line without three fields or without a number, by file and line.
    """
    with tarfile.open(archive, "r:gz") as tar:
        names = [entry.name for entry in tar if not entry.isdir()]
        if member not in names or (stream := tar.extractfile(member)) is None:
            raise PeftJaxError(f"{archive} has no file {member!r}; {nearest(member, names)}")
        text = stream.read().decode("utf-8")
    lines = enumerate(text.replace("\r\n", "\n").split("\n"), start=1)
    return [_rated_sentence(line, f"{member}:{number}") for number, line in lines if line.strip()]


def _rated_sentence(line: str, origin: str) -> tuple[float, str, str]:
    fields = line.split("\t")
    try:
        mean = float(fields[1])
    except (IndexError, ValueError):
        mean = math.nan
    if len(fields) != 3 or not math.isfinite(mean) or not fields[2].strip():
        raise PeftJaxError(f"{origin}: expected 'id<TAB>mean rating<TAB>text', found {line[:60]!r}")
    return mean, html.unescape(html.unescape(fields[2])).strip(), origin


def rating_word(mean: float, words: Sequence[str], bins: Sequence[float]) -> str:
    """The word for a human mean: ``bins`` are the edges between words; on an edge the word nearer to zero.

    >>> [rating_word(m, ("bad", "okay", "good"), (-0.5, 0.5)) for m in (-0.6, -0.5, 0.5, 0.6)]
    ['bad', 'okay', 'okay', 'good']
    """
    return words[sum(mean >= edge if edge < 0 else mean > edge for edge in bins)]


def _fetched_sentences(task) -> list[tuple[float, str, str]]:
    from peft_jax.hub import download

    return read_rated_sentences(Path(download.fetch(task.source, task.archive)), task.file)


def rating_examples(task, sentences: Sequence[tuple[float, str, str]]) -> list[Example]:
    """Rated sentences as ``task.answer`` says: prompt and one-word completion, or text and label; ``"score"`` keeps the
    human mean, ``"word"`` the right word."""
    if len(task.words) != len(task.bins) + 1 or len(task.word_values) != len(task.words):
        raise PeftJaxError(
            f"task.words ({len(task.words)}) needs one word more than task.bins ({len(task.bins)}) and one of "
            f"task.word_values ({len(task.word_values)}) for each word"
        )
    examples = []
    for mean, text, origin in sentences:
        word = rating_word(mean, task.words, task.bins)
        asked = {"prompt": task.prompt_template.replace("{text}", text),
                 "completion": task.completion_template.replace("{word}", word), "review": text}
        labels = {"class": task.words.index(word), "score": mean} if task.answer != "word" else {}
        told = {"text": text, "label": labels[task.answer]} if labels else asked
        examples.append({**told, "word": word, "score": mean, "origin": origin})
    return examples


# Kinds of task: task -> (examples, validation examples or None where they are to be split off, columns without use).


def _rating_task(task):
    return rating_examples(task, _fetched_sentences(task)), None, ()


def _sentences_task(task):
    return [{"text": text, "origin": origin} for _, text, origin in _fetched_sentences(task)], None, ()


def _reference_task(task):
    """Paragraphs of the Python language reference, which Python's help() has: prose, 200 to 1000 characters long."""
    from pydoc_data.topics import topics

    found = ((name, number, " ".join(text.split())) for name, topic in topics.items()
             for number, text in enumerate(topic.split("\n\n")))
    return [{"text": text, "origin": f"help({name!r}), paragraph {number}"} for name, number, text in found
            if 200 <= len(text) <= 1000 and sum(c.isalpha() or c.isspace() for c in text) > 0.9 * len(text)], None, ()


def train_rows(task) -> tuple[list[dict], str]:
    """(rows, where they are from) of a table's training data. Raises ``PeftJaxError`` where they cannot be read."""
    if task.kind == "file":
        return read_table(task.source), task.source
    return read_hub(task.source, task.subset, task.train_split), f"{task.source}[{task.train_split}]"


def _validation_rows(task) -> tuple[list[dict], str] | None:
    """The same of its validation data, ``None`` where these are to be split off."""
    if task.kind == "file":
        return (read_table(task.validation_source), task.validation_source) if task.validation_source else None
    split = task.validation_split
    return (read_hub(task.source, task.subset, split), f"{task.source}[{split}]") if split else None


def _table_task(task):
    rows, where = train_rows(task)
    examples, other = table_examples(task, rows, where), _validation_rows(task)
    return examples, other and table_examples(task, *other), unused_columns(task, rows, where)


KINDS: dict[str, Callable] = {
    "rating": _rating_task,
    "sentences": _sentences_task,
    "reference": _reference_task,
    "file": _table_task,
    "hub": _table_task,
}
