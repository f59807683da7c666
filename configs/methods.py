"""The arguments of each fine-tuning method, read from its file in ``peft_jax/methods/``, which says what they mean.

``name`` picks the method from ``peft_jax.methods.METHODS``; all other keys are passed to it, texts as token ids. The
files are parsed, not imported: they would import jax.
"""

import ast
import re
from pathlib import Path
from typing import Any

from ml_collections.config_dict import ConfigDict, FieldReference

import peft_jax.methods
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.methods import METHODS

TYPED = ("int", "float", "bool", "str")  # annotations of arguments that take one type; all others take any


def any_type(value: Any) -> FieldReference:
    """A field that also takes values of another type than its default's, such as a name, a tuple of names or None."""
    return FieldReference(value, field_type=object)


def method_config(name: str) -> ConfigDict:
    """The section ``config.method`` for a method of ``METHODS``, or for several: ``prefix+parallel_adapter``.

    Of several each has a section of its own, ``config.method.prefix.num_virtual_tokens``; ``order`` is the chain's.
    """
    names = name.split("+")
    if len(names) == 1:
        return ConfigDict(_method(name))
    return ConfigDict({"name": "chain", "order": tuple(names), **{part: _method(part) for part in names}})


def _method(name: str) -> dict[str, Any]:
    if name not in METHODS:
        raise PeftJaxError(f"method={name}: {nearest(name, METHODS)}")
    fields: dict[str, Any] = {"name": name}
    for argument, annotation, default in arguments(name):
        fields[argument] = default if annotation in TYPED else any_type(default)
        if argument.endswith("_ids"):
            fields[f"{argument.removesuffix('_ids')}_text"] = ""  # or the text itself
    return fields


def arguments(name: str) -> list[tuple[str, str, Any]]:
    """(name, annotation, default) of each argument of a method; every default is a literal.

    A method that takes another's arguments says so as Python knows it: ``dora.__signature__ = signature(lora)``.
    """
    file = Path(peft_jax.methods.__file__).parent / METHODS.files[name].replace(".", "/")
    body = ast.parse(file.with_suffix(".py").read_text()).body
    for text in [ast.unparse(statement) for statement in body if isinstance(statement, ast.Assign)]:
        if other := re.fullmatch(rf"{name}\.__signature__ = signature\((\w+)\)", text):
            return arguments(other[1])
    made = next(one.args for one in body if isinstance(one, ast.FunctionDef) and one.name == name)
    pairs = zip([*made.args, *made.kwonlyargs], [*made.defaults, *made.kw_defaults], strict=True)
    return [(one.arg, ast.unparse(one.annotation), ast.literal_eval(default)) for one, default in pairs
            if one.annotation and default]
