"""From the command line to a configuration: experiment files with typed arguments, overrides of single keys."""

import contextlib
import difflib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags
from ml_collections.config_dict import ConfigDict

from peft_jax.core.files import regular_file
from peft_jax.errors import PeftJaxError, nearest, root_cause

PREFIX = "--config."
EITHER = ("optim.steps", "optim.epochs")  # a run is as long as one of them says; the other is 0


def check_text(argv: Sequence[str]) -> None:
    """Raise ``PeftJaxError`` for an argument whose bytes were no UTF-8: Python keeps these as halves of letters, which
    nothing can write."""
    for argument in argv:
        if "\0" in argument or argument.encode(errors="ignore").decode() != argument:
            raise PeftJaxError(f"the argument {argument[:80]!r} is no text in UTF-8: write it anew")


def typed_args(text: str, **defaults: Any) -> dict[str, Any]:
    """The arguments of an experiment file, ``key=value,key=value``, each with the type of its default.

    >>> typed_args("model=pypi:a==1,steps=5", model="tiny", steps=60, fast=False)
    {'model': 'pypi:a==1', 'steps': 5, 'fast': False}

    Raises:
      PeftJaxError: a part without "=", an unknown key (naming the nearest), a value of another type.
    """
    args = dict(defaults)
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in defaults:
            raise PeftJaxError(f"--config=...:{part}: expected key=value with a key of: {', '.join(defaults)}")
        args[key] = _typed(key, value, type(defaults[key]))
    return args


def _typed(key: str, value: str, kind: type) -> Any:
    try:
        return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError):
        raise PeftJaxError(f"--config=...:{key}={value}: expected {kind.__name__}") from None


def load_experiment(argument: str) -> tuple[ConfigDict, str]:
    """(configuration, experiment name) of ``path/to/name.py`` or ``path/to/name.py:key=value,...``.

    The file is Python and is run. Raises ``PeftJaxError`` where there is no such file or it has no ``get_config``, and
    with its line where it raises something itself.
    """
    module, args = _module(argument)
    with _told(module.__file__):
        return module.get_config(args), Path(argument.partition(":")[0]).stem


def load_cells(argument: str, config: ConfigDict) -> list:
    """The runs of a sweep (``configs/sweeps.py``) whose file has been loaded as ``config``; [] of any other."""
    if "sweep" not in config:
        return []
    module, _ = _module(argument)
    if not callable(getattr(module, "get_cells", None)):
        raise PeftJaxError(f"--config={module.__file__}: the file makes a sweep and has no function get_cells(config)")
    with _told(module.__file__):
        return module.get_cells(config)


def _module(argument: str) -> tuple[Any, str]:
    """The experiment file as a module, which runs it, and its arguments."""
    path, _, args = argument.partition(":")
    if not os.path.exists(path):  # which, unlike Path's, raises nothing
        others = sorted(str(other) for other in Path("experiments").rglob("[!_]*.py"))
        raise PeftJaxError(f"--config={path}: there is no such file; {nearest(path, others)}")
    file = regular_file(path, "--config")
    spec = importlib.util.spec_from_file_location(f"experiment_{file.stem}", file)
    module = importlib.util.module_from_spec(spec) if spec else None
    if module is None:
        raise PeftJaxError(f"--config={path}: an experiment is a Python file (.py)")
    with _told(str(file)):
        spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
        raise PeftJaxError(f"--config={path}: the file has no function get_config(arg)")
    return module, args


@contextlib.contextmanager
def _told(file: str) -> Iterator[None]:
    """While entered, what an experiment file raises becomes one line with the place in it; it may also end the program,
    and that would be without a word."""
    try:
        yield
    except PeftJaxError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        lines += [error.lineno] if isinstance(error, SyntaxError) and error.filename == file else []
        where = f", line {lines[-1]}" if lines else ""
        raise PeftJaxError(f"--config={file}{where}: {root_cause(error)}") from error


def keys(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """``{"section.key": value}`` of every leaf."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= keys(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {prefix + name: value}
    return flat


def override(config: ConfigDict, argv: list[str]) -> list[str]:
    """Set keys of ``config`` from arguments such as ``--config.method.r=8``; returns the arguments that are not such.

    Of two keys of which only one counts (``EITHER``), the one named here wins over the one that the experiment sets.
    Where a head answers (``task.answer``), general text is of no use: ``eval.probe`` is then "" unless named here.

    Raises:
      PeftJaxError: a key that does not exist (naming the nearest) or a value of another type.
    """
    known = keys(config)
    for key in overridden_keys(argv):
        _check_key(key, known)
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=[sys.argv[0], *argv])
        others = values([sys.argv[0], *argv], known_only=True)[1:]
    except flags.Error as error:
        raise PeftJaxError(_flag_error(error, known)) from error
    _settle_either(config, overridden_keys(argv))
    if config.task.answer != "word" and "eval.probe" not in overridden_keys(argv):
        config.eval.probe = ""
    return others


def _settle_either(config: ConfigDict, overridden: list[str]) -> None:
    """Where one of ``EITHER`` was set on the command line, and the other was not, the other becomes 0."""
    flat = keys(config)
    for key, other in (EITHER, EITHER[::-1]):
        if key in overridden and other not in overridden and flat[key] and flat[other]:
            config.update_from_flattened_dict({other: type(flat[other])()})


def overridden_keys(argv: list[str]) -> list[str]:
    """
    >>> overridden_keys(["--config.method.r=8", "--mode=eval"])
    ['method.r']
    """
    return [argument.split("=", 1)[0].split(".", 1)[1] for argument in argv if re.match(r"--?(no)?config\.", argument)]


def _check_key(key: str, known: dict[str, Any]) -> None:
    if key in known:
        return
    inside = [name for name in known if name.startswith(key + ".")]
    if inside:
        raise PeftJaxError(f"{PREFIX}{key} is a section, not a key; set one of its keys: {', '.join(inside[:6])}, ...")
    raise PeftJaxError(f"unknown key {PREFIX}{key}; {_nearest_key(key, known)}")


def _nearest_key(key: str, known: dict[str, Any]) -> str:
    """The key meant: a like one of the same section, the same one of another section, or any like it."""
    section, _, last = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    moved = [name for name in known if name.rpartition(".")[2] == last]
    like = [siblings[name] for name in difflib.get_close_matches(last, siblings, n=1, cutoff=0.6)]
    if like or moved:
        return f"did you mean {' or '.join(PREFIX + name for name in like or moved)}?"
    if section and siblings:
        return f"the keys of config.{section} are: {', '.join(siblings)}"
    return "the sections are: " + ", ".join(dict.fromkeys(name.split(".")[0] for name in known))


def _flag_error(error: flags.Error, known: dict[str, Any]) -> str:
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
    if not match or match[1] not in known:
        return " ".join(str(error).split())
    key, value = match.groups()
    return f"{PREFIX}{key}={value}: expected {type(known[key]).__name__}, such as {known[key]!r}"


def names(value: Any) -> Any:
    """What a user may write for module names, as Hugging Face peft means it: a tuple of names, a regex, a keyword.

    >>> names("q_proj,v_proj"), names(["q_proj"]), names("all-linear"), names(r".*[qv]_proj"), names("up_proj")
    (('q_proj', 'v_proj'), ('q_proj',), 'all-linear', '.*[qv]_proj', ('up_proj',))
    """
    if isinstance(value, str) and value != "all-linear" and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*,?", value):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list | tuple) else value
