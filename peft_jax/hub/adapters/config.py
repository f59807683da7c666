"""``adapter_config.json``: Hugging Face peft's statement of an adapter, in and out (peft 0.21)."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft_jax.core import targeting
from peft_jax.core.files import read_json
from peft_jax.core.peft_format import Format, Naming
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.hub.adapters import config_types
from peft_jax.method import Method

# Fields of every kind of adapter that change nothing about what a stored one computes.
_SILENT = ("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
           "peft_version")
TIES = ("embed_tokens", "lm_head")
_EMPTY = (None, False, {}, [], "")


class Stated(NamedTuple):
    """What a config file says of one method: its format, its arguments, whether peft keeps the head tied."""

    path: Path
    format: Format
    stated: dict[str, Any]
    tied: bool


def read(path: Path, formats: Sequence[Format]) -> list[Stated]:
    """The methods that the file states; more than one for a chain.

    Raises ``PeftJaxError`` for an unknown ``peft_type``, and naming any field that would change the result and is not
    supported, or is of another type than the method's argument.
    """
    given = read_json(path)
    if given.get("peft_type") != "CHAIN":
        return [_stated(path, given, formats)]
    parts = given.get("methods")
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise PeftJaxError(f"{path} is a CHAIN whose 'methods' are no list of adapter configs: save it again.")
    return [_stated(path, part, formats) for part in parts]


def _stated(path: Path, given: dict[str, Any], formats: Sequence[Format]) -> Stated:
    kind = given.get("peft_type")
    config_types.check_flags(path, given)
    claimed = [form for form in formats if form.kind == kind and form.claims(given)]
    if not claimed:
        raise PeftJaxError(f"{path} is a '{kind}' adapter, which cannot be loaded: "
                           f"{nearest(str(kind), dict.fromkeys(form.kind for form in formats))}")
    form = claimed[0]
    unknown = [f"{name}={value!r}" for name, value in sorted(given.items())
               if name not in (*form.arguments, *form.silent, *_SILENT) and value not in _EMPTY]
    if unknown:
        raise PeftJaxError(f"{path} asks for {', '.join(unknown)}, which would change the result and is not supported: "
                           "merge the adapter with peft and load the merged model instead.")
    found = {name: given[name] for name in form.arguments if name in given}
    config_types.check(path, found, form.make)
    with _naming_the_file(path, found):
        arguments = form.read({name: tuple(value) if isinstance(value, list) else value
                               for name, value in found.items()}, str(path))
    return Stated(path, form, arguments, bool(given.get("ensure_weight_tying")) and _keeps_tie(form, given))


def _keeps_tie(form: Format, stated: Mapping[str, Any]) -> bool:
    """Whether a head stays tied to an embedding that the file trains, where the file asks for it: peft goes by these
    names, and so never does for GPT-2's ``wte``. Files that it cannot read are ours to understand."""
    if "ensure_weight_tying" in form.silent:
        return True
    saved, wanted = (stated.get(name) or () for name in ("modules_to_save", "target_modules"))
    named = {entry.rpartition(".")[2] for part in (saved, wanted) if not isinstance(part, str) for entry in part}
    meant = [name for name in TIES if name in named or (isinstance(wanted, str) and re.fullmatch(wanted, name))]
    return "ensure_weight_tying" in form.arguments and bool(meant)


def made(part: Stated, names: Sequence[str], modules: Sequence[str]) -> Method:
    """The method of a part of the file, for a model with kernels in modules ``names`` and leaves in ``modules``."""
    with _naming_the_file(part.path, part.stated):
        return part.format.make(**without_unmatched(part.stated, names, modules))


@contextlib.contextmanager
def _naming_the_file(path: Path, found: Mapping[str, Any]) -> Iterator[None]:
    """What a method says of its arguments, with the file in front; of what is odd in a way that no check knows, the
    types of all fields."""
    try:
        yield
    except PeftJaxError as error:
        raise PeftJaxError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError, re.error) as error:
        kinds = ", ".join(f"{name} {type(value).__name__}" for name, value in found.items())
        raise PeftJaxError(f"{path}: its fields cannot be understood ({kinds}): save the adapter again.") from error


def without_unmatched(stated: Mapping[str, Any], names: Sequence[str], modules: Sequence[str]) -> dict[str, Any]:
    """Without what peft skips and a method refuses: the listed ``target_modules`` that match none of ``names``, of the
    kernels' modules, and ``modules_to_save`` that are none of ``modules``.

    For every classifier peft adds both words that models have for their head.
    """
    listed, saved = stated.get("target_modules"), stated.get("modules_to_save")
    stated = {**stated, **_present(stated, names)}
    if isinstance(saved, tuple):
        found = tuple(entry for entry in saved if any(targeting.saved((entry,), module) for module in modules))
        stated = {**stated, "modules_to_save": found or None}
    if not isinstance(listed, tuple):
        return dict(stated)
    kept = tuple(entry for entry in listed if any(targeting.listed((entry,), name) for name in names))
    if not kept:
        raise PeftJaxError(f"none of the adapter's target_modules ({', '.join(listed)}) is in this model: "
                           f"{nearest(listed[0] if listed else '', (n.rsplit('.', 1)[-1] for n in names))}")
    return {**stated, "target_modules": kept}


def _present(stated: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Feed-forward modules and layer numbers without those that the model does not have."""
    found: dict[str, Any] = {}
    if isinstance(inside := stated.get("feedforward_modules"), tuple):
        found["feedforward_modules"] = tuple(one for one in inside if any(targeting.listed((one,), n) for n in names))
    if isinstance(layers := stated.get("layers_to_transform"), tuple):
        held = {targeting.layer_index(name, stated.get("layers_pattern")) for name in names}
        found["layers_to_transform"] = tuple(layer for layer in layers if layer in held)
    return found


def write(form: Format, config: Mapping[str, Any], flat: Mapping[str, Any], naming: Naming, *, tied: str,
          base_model: str | None, task_type: str | None) -> dict[str, Any]:
    """The file's content for a method's ``config``; ``tied``: an embedding that it changes and that is the head as
    well. Raises ``PeftJaxError`` where peft would change the embedding alone."""
    everything = {**config, **form.fields(config, flat, naming), "ensure_weight_tying": bool(tied)}
    if tied and not _keeps_tie(form, everything):
        raise PeftJaxError(f"save_adapter: {form.kind} changes '{tied}', which is the head as well; in peft's file it "
                           "would be the embedding alone: peft_jax.untie(params) first.")
    stated = {name: everything[name] for name in (*form.arguments, *form.silent) if name in everything}
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "peft_type": form.kind,
        "revision": None,
        "task_type": task_type,
        **{name: _plain(value) for name, value in stated.items()},
    }


def _plain(value):
    """Lists for JSON: names in a fixed order, whatever else as it is, since rows of a tensor may follow it."""
    if not isinstance(value, tuple | list | set | frozenset):
        return value
    return sorted(value) if all(isinstance(one, str) for one in value) else list(value)
