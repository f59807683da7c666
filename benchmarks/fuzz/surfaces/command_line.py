"""Command lines: keys and values that cannot be meant, names that no file has, experiment files that are none; judged
by the configuration, in which nothing but the named key may change. Some are run as processes of their own."""

import ast
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz import damages, material
from benchmarks.fuzz.cases import Trial, never, same
from peft_jax.errors import PeftJaxError

LORA = f"--config={material.ROOT / 'experiments' / 'lora.py'}"
VALUES = ["3", "", "a", "[1]", "(1,2)", "{'a':1}", "{}", "None", "True", "1e999", "-1", "nan", "-inf", "1" + "0" * 400,
          "'", "\0", "\ud800", "[[" * 200, "(" * 5000, "x" * 300, "__import__('os').getpid()", "('newspaper',)",
          "((1,),)", "[None]", "1.5", "a\nb", "10**400", "0", "999999999999", "../..", "~nobody", "\u202e", "a=b", ","]
NO_KEYS = ["__class__", "keys", "lora.__init__", "method.__class__", "items", "optim.update", "", ".", "..", "method.",
           "method..r", ".method.r", "seed.real", "__dict__", "_fields", "method", "a\0b", "\ud800", "x" * 300, "seed ",
           "Seed", "method[0]", "task", "optim", "get_type", "to_dict", "lock", "copy_and_resolve_references", "é"]
FILES = ["def get_config(:\n", "1/0\n", "x = 1\n", "def get_config(arg): return None\n", "get_config = 3\n", "",
         "def get_config(arg): raise KeyError('x')\n", "def get_config(): return 1\n", "import sys; sys.exit(0)\n",
         "import nothing_of_this_name\n", "def get_config(arg): return get_config(arg)\n", "\0", "\x00\xff",
         *(f"from configs import base\ndef get_config(arg):\n    config = base.get_config()\n    {line}\n    return "
           "config\n" for line in (
               "config.measure = 3", "config.model.source = 3", "config.optim.lr = 3", "config.r = 8",
               "del config.optim", "config.task.words = (1, 2)", "config.sweep = 3", "config.method.rank = 8",
               "del config.task.bins", "config.seed = None", "config.optim.steps = 'many'",
               "config.task.kind = 'file'"))]


def prepare(place: Path) -> dict[str, Any]:
    from configs import parse

    return {"keys": parse.keys(parsed([LORA])), "place": place}


def trial(base: dict[str, Any], rng: Random, folder: Path) -> Trial:
    kind = rng.choice((_key, _key, _key, _no_key, _flag, _file, _argument, _word))
    what, argv, judge = kind(base["keys"], rng, folder)
    apart = rng.random() < 0.03 and not any("\0" in one or "\ud800" in one for one in argv)
    shown = f"{what}: {' '.join(argv)[:200]!r}"
    if apart:
        return Trial(f"{shown} (a process of its own)", lambda: process(argv), judge)
    return Trial(shown, lambda: parsed(argv), judge)


def _key(keys: dict[str, Any], rng: Random, folder: Path):
    key, value = rng.choice(list(keys)), rng.choice(VALUES)
    argv = [LORA, f"--config.{key}={value}"]
    return "a value", argv, changes_only(keys, key, value)


def _no_key(keys: dict[str, Any], rng: Random, folder: Path):
    key = rng.choice(NO_KEYS)
    written = rng.choice((f"--config.{key}", f"--config.{key}=3", f"--config.{key}=", f"--noconfig.{key}"))
    return "no key", [LORA, written], never


def _flag(keys: dict[str, Any], rng: Random, folder: Path):
    import run

    flag = rng.choice([name for name in run.define_flags() if name not in ("config", "help")])
    return "a flag", [LORA, f"--{flag}={rng.choice(VALUES)}"], changes_only(keys, None, "")


def _file(keys: dict[str, Any], rng: Random, folder: Path):
    file = folder / "experiment.py"
    if rng.random() < 0.3:
        return damages.kind_of(file, rng), [f"--config={file}"], never
    file.write_bytes(rng.choice(FILES).encode("latin-1"))
    return "an experiment file", [f"--config={file}"], never


def _argument(keys: dict[str, Any], rng: Random, folder: Path):
    name, value = rng.choice(("model", "task", "method", "nothing")), rng.choice(VALUES)
    return "an argument", [f"{LORA}:{name}={value}"], changes_only(keys, None, "")


def _word(keys: dict[str, Any], rng: Random, folder: Path):
    word = rng.choice(("-", "---", "--=", "--x", "=", "x", "", "\0", "--flagfile=/nowhere", "--config", "--config=",
                       f"--flagfile={folder}", "--config=\ud800", "--config=" + "x" * 300, "--mode=", "--mode=trian"))
    return "a word", [LORA, word], changes_only(keys, None, "")


def parsed(argv: list[str]) -> Any:
    """The configuration of a command line."""
    import run

    command = run.parse_command(argv)
    return command and command.config


def process(argv: list[str]) -> Any:
    """The same, refused by a process that does nothing else: ``--mode=cells`` is of sweeps alone."""
    done = subprocess.run([sys.executable, material.ROOT / "run.py", *argv, "--mode=cells"], capture_output=True,
                          text=True, cwd=material.ROOT, timeout=60, check=False)
    lines = done.stderr.splitlines()
    if done.returncode != 2 or len(lines) != 1 or not lines[0].startswith("error: "):
        raise RuntimeError(f"exit code {done.returncode}, and on standard error: {done.stderr[-300:]!r}")
    raise PeftJaxError(lines[0].removeprefix("error: "))


def changes_only(keys: dict[str, Any], key: str | None, value: str):
    """A judge: in the configuration nothing but ``key`` differs, and that has the value that was written."""
    free = {key, "eval.probe", "optim.steps", "optim.epochs"} if key else {"model.source", "eval.probe"}

    def judge(config: Any) -> str:
        from configs import parse

        now = parse.keys(config)
        odd = [name for name in now if name not in free and name in keys and not same(keys[name], now[name])]
        if key is None:
            odd = [name for name in odd if not name.startswith(("task.", "method."))]
        if odd:
            return f"{odd[0]} changed from {keys[odd[0]]!r} to {now[odd[0]]!r}"
        return "" if key is None or says(now[key], value) else f"{key} is {now[key]!r}"

    return judge


def says(value: Any, written: str) -> bool:
    """Whether a value is what was written: as text, as a literal, or as one of a tuple."""
    try:
        literal = ast.literal_eval(written)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        literal = written
    forms = [written, literal, (literal,), (written,), tuple(written.split(",")) if written else ()]
    if isinstance(literal, list | tuple):
        forms.append(tuple(literal))
    if written.lower() in ("true", "1", "false", "0", "3") and isinstance(value, bool):
        return True
    return any(same(value, form) for form in forms) or str(value) == written or _number(value, written)


def _number(value: Any, written: str) -> bool:
    try:
        return not isinstance(value, str | tuple) and float(value) == float(written)
    except (ValueError, TypeError, OverflowError):
        return False
