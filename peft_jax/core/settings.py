"""Settings of a run, as JSON keeps them: what differs between two."""

import json
from collections.abc import Sequence
from typing import Any

from peft_jax.core import tree

# Keys that came after runs had been kept without them, and what they are where a run has none.
LATER = {"task.chat": False, "task.label_names": [], "task.role_key": "", "task.content_key": "", "task.roles": []}


def differences(old: dict[str, Any], new: dict[str, Any], matters: Sequence[str]) -> list[str]:
    """``"key was old, now new"`` for each key that differs and is in, or below, ``matters``.

    >>> old, new = {"task": {"name": "file"}}, {"task": {"name": "file", "chat": True, "label_names": ()}}
    >>> differences(old, new, ["task"])
    ['task.chat was false, now true']
    """
    before, now = ({path.replace("/", "."): value for path, value in tree.flatten(plain(settings)).items()}
                   for settings in (old, new))  # fmt: skip
    before = {key: value for key, value in LATER.items() if key in now} | before
    return [
        f"{key} was {_shown(key, before)}, now {_shown(key, now)}"
        for key in dict.fromkeys((*before, *now))
        if f"{key}.".startswith(tuple(f"{name}." for name in matters)) and _shown(key, before) != _shown(key, now)
    ]


def _shown(key: str, values: dict[str, Any]) -> str:
    return json.dumps(values[key]) if key in values else "not set"


def plain(value: Any) -> Any:
    """As JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(value))
