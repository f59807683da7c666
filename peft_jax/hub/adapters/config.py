"""``adapter_config.json``: Hugging Face peft's statement of an adapter, in and out (peft 0.21)."""

import contextlib
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft_jax.core import files, labels, patterns, targeting
from peft_jax.core.peft_format import Format, Naming
from peft_jax.errors import PeftJaxError, nearest, some
from peft_jax.hub.adapters import config_types
from peft_jax.method import Method

# Fields of every kind of adapter that change nothing about what a stored one computes.
_SILENT = ("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
           "peft_version", "id2label", "label2id")
TIES = ("embed_tokens", "lm_head")
_EMPTY = (None, False, {}, [], "")
MOST_PARTS = 32  # methods of a chain


class Statement(NamedTuple):
    """What a config file says of one method: its format, its arguments, whether peft keeps the head tied."""

    path: Path
    format: Format
    arguments: dict[str, Any]
    tied: bool


def read(path: Path, formats: Sequence[Format]) -> list[Statement]:
    """The methods that the file states; more than one for a chain.

    Raises ``PeftJaxError`` for an unknown ``peft_type``, and naming any field that would change the result and is not
    supported, or is of another type than the method's argument.
    """
    parts = parts_of(path)
    with files.reading(path, "an adapter's config", "save the adapter again"):
        return [_statement(path, part, formats) for part in parts]


def parts_of(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in the file, one for each method of a chain. Raises ``PeftJaxError`` where it has none."""
    content = files.read_json(path)
    if content.get("peft_type") != "CHAIN":
        return [content]
    parts = content.get("methods")
    if not isinstance(parts, list) or not 0 < len(parts) <= MOST_PARTS or not all(isinstance(p, dict) for p in parts):
        raise PeftJaxError(f"{path} is a CHAIN whose 'methods' are no list of adapter configs, at most {MOST_PARTS}: "
                           "save it again.")
    return parts


def _statement(path: Path, content: dict[str, Any], formats: Sequence[Format]) -> Statement:
    kind = content.get("peft_type")
    config_types.check_flags(path, content)
    form = next((one for one in formats if one.kind == kind and one.claims(content)), None)
    if form is None:
        raise PeftJaxError(f"{path} is a '{kind!s:.60}' adapter, which cannot be loaded: "
                           f"{nearest(str(kind), dict.fromkeys(form.kind for form in formats))}")
    unknown = [f"{name}={reprlib.repr(value)}" for name, value in sorted(content.items())
               if name not in (*form.arguments, *form.silent, *_SILENT) and value not in _EMPTY]
    if unknown:
        raise PeftJaxError(f"{path} asks for {', '.join(unknown)}, which would change the result and is not supported: "
                           "merge the adapter with peft and load the merged model instead.")
    fields = {name: content[name] for name in form.arguments if name in content}
    config_types.check(path, fields, form.make)
    with _naming_the_file(path, fields):
        arguments = form.read({name: tuple(value) if isinstance(value, list) else value
                               for name, value in fields.items()}, str(path))
    tied = bool(content.get("ensure_weight_tying")) and _keeps_tie(form, content)
    return Statement(path=path, format=form, arguments=arguments, tied=tied)


def _keeps_tie(form: Format, content: Mapping[str, Any]) -> bool:
    """Whether a head stays tied to an embedding that the file trains, where the file asks for it: peft goes by these
    names, and so never does for GPT-2's ``wte``. Files that it cannot read are ours to understand."""
    if "ensure_weight_tying" in form.silent:
        return True
    saves, targets = (content.get(name) or () for name in ("modules_to_save", "target_modules"))
    names = {entry.rpartition(".")[2] for part in (saves, targets) if not isinstance(part, str) for entry in part}
    ties = [name for name in TIES
            if name in names or (isinstance(targets, str) and patterns.match(targets, name, whole=True))]
    return "ensure_weight_tying" in form.arguments and bool(ties)


def method_of(part: Statement, names: Sequence[str], modules: Sequence[str]) -> Method:
    """The method of a part of the file, for a model with kernels in modules ``names`` and leaves in ``modules``."""
    with _naming_the_file(part.path, part.arguments):
        return part.format.make(**without_unmatched(part.arguments, names, modules))


@contextlib.contextmanager
def _naming_the_file(path: Path, fields: Mapping[str, Any]) -> Iterator[None]:
    """What a method says of its arguments, with the file in front; of what is odd in a way that no check knows, the
    types of all fields."""
    try:
        yield
    except PeftJaxError as error:
        raise PeftJaxError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        kinds = ", ".join(f"{name} {type(value).__name__}" for name, value in fields.items())
        raise PeftJaxError(f"{path}: its fields cannot be understood ({kinds}): save the adapter again.") from error


def without_unmatched(arguments: Mapping[str, Any], names: Sequence[str], modules: Sequence[str]) -> dict[str, Any]:
    """Without what peft skips and a method refuses: the listed ``target_modules`` that match none of ``names``, of the
    kernels' modules, and ``modules_to_save`` that are none of ``modules``.

    For every classifier peft adds both words that models have for their head.
    """
    targets, saves = arguments.get("target_modules"), arguments.get("modules_to_save")
    arguments = {**arguments, **_present(arguments, names)}
    known = targeting.known_names(names)
    if isinstance(saves, tuple):
        meant = [module for module in modules if targeting.saved(saves, module)]
        entries = tuple(entry for entry in saves if any(targeting.saved((entry,), module) for module in meant))
        arguments = {**arguments, "modules_to_save": entries or None}
    if not isinstance(targets, tuple):
        return dict(arguments)
    entries = tuple(entry for entry in targets if entry in known)
    if not entries:
        raise PeftJaxError(f"none of the adapter's target_modules ({some(list(targets))}) is in this model: "
                           f"{nearest(targets[0] if targets else '', (n.rsplit('.', 1)[-1] for n in names))}")
    return {**arguments, "target_modules": entries}


def _present(arguments: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Feed-forward modules and layer numbers without those that the model does not have."""
    present: dict[str, Any] = {}
    if isinstance(inside := arguments.get("feedforward_modules"), tuple):
        known = targeting.known_names(names)
        present["feedforward_modules"] = tuple(one for one in inside if one in known)
    if isinstance(layers := arguments.get("layers_to_transform"), tuple):
        numbers = {targeting.layer_index(name, arguments.get("layers_pattern")) for name in names}
        present["layers_to_transform"] = tuple(layer for layer in layers if layer in numbers)
    return present


def write(form: Format, config: Mapping[str, Any], flat: Mapping[str, Any], naming: Naming, *, tied: str,
          base_model: str | None, task_type: str | None, classes: Sequence[str] = ()) -> dict[str, Any]:
    """The file's content for a method's ``config``; ``tied``: an embedding that it changes and that is the head as
    well; ``classes``: what those of a head are called, in fields that peft passes over. Raises ``PeftJaxError`` where
    peft would change the embedding alone."""
    everything = {**config, **form.fields(config, flat, naming), "ensure_weight_tying": bool(tied)}
    if tied and not _keeps_tie(form, everything):
        raise PeftJaxError(f"save_adapter: {form.kind} changes '{tied}', which is the head as well; in peft's file it "
                           "would be the embedding alone: peft_jax.untie(params) first.")
    fields = {name: everything[name] for name in (*form.arguments, *form.silent) if name in everything}
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "peft_type": form.kind,
        "revision": None,
        "task_type": task_type,
        **(labels.fields(classes) if classes else {}),
        **{name: _plain(value) for name, value in fields.items()},
    }


def _plain(value):
    """Lists for JSON: names in a fixed order, whatever else as it is, since rows of a tensor may follow it."""
    if not isinstance(value, tuple | list | set | frozenset):
        return value
    return sorted(value) if all(isinstance(one, str) for one in value) else list(value)
