"""What classes are called, as Hugging Face's configs say it: ``id2label`` and ``label2id``."""

from collections.abc import Mapping, Sequence
from typing import Any


def fields(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The two fields for classes of these names, by number.

    >>> fields(["bad", "good"])
    {'id2label': {'0': 'bad', '1': 'good'}, 'label2id': {'bad': 0, 'good': 1}}
    """
    return {"id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)}}


def names(id2label: Any) -> tuple[str, ...]:
    """The names by number; () where none are stated, they are transformers' own (LABEL_0), or not one for each number.

    >>> names({"1": "good", "0": "bad"}), names({"0": "LABEL_0", "1": "LABEL_1"}), names(None)
    (('bad', 'good'), (), ())
    """
    if not isinstance(id2label, Mapping) or {str(key) for key in id2label} != set(map(str, range(len(id2label)))):
        return ()
    by_number = {str(key): str(name) for key, name in id2label.items()}
    found = tuple(by_number[str(number)] for number in range(len(by_number)))
    return () if found == tuple(f"LABEL_{number}" for number in range(len(found))) else found
