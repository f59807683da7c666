"""Imports go one way, and what must answer at once imports no jax."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The floors of the house: a part may import itself and what is on lower floors.
FLOORS = (
    {"errors"},
    {"core"},
    {"models", "quant"},
    {"method"},
    {"parallel"},
    {"binding", "methods"},
    {"hub"},
    {"data", "train"},
    {"evaluation", "planner", "studies"},
    {"cli"},
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
FOR_MODELS = {"peft_jax.errors", "peft_jax.core.remat", "peft_jax.core._compat"}  # models know nothing of fine-tuning


def imports(file: Path) -> set[str]:
    """The modules of peft_jax that a file imports, anywhere in it, type checking included."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [_module(node.module, alias.name) for alias in node.names]
    return {name for name in names if name.startswith("peft_jax.")}


def _module(base: str, name: str) -> str:
    path = ROOT / Path(*base.split("."), name)
    return f"{base}.{name}" if path.with_suffix(".py").exists() or path.is_dir() else base


def test_imports_go_one_way():
    upwards = []
    for file in sorted((ROOT / "peft_jax").rglob("*.py")):
        part = file.relative_to(ROOT / "peft_jax").parts[0].removesuffix(".py")
        for name in sorted(imports(file)) if part != "__init__" else ():
            other = name.split(".")[1]
            allowed = name in FOR_MODELS if part == "models" else FLOOR[other] < FLOOR[part]
            if other != part and not allowed:
                upwards.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not upwards, "\n".join(upwards)


PRIVATE = ("jax._src", "jax.interpreters", "jax.extend", "flax.linen.module", "flax.core")


def test_private_names_of_jax_and_flax_are_in_one_file():
    for file in sorted((ROOT / "peft_jax").rglob("*.py")):
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        private = [node.module for node in nodes if node.module and node.module.startswith(PRIVATE)]
        assert not private or file.name == "_compat.py", f"{file.relative_to(ROOT)} imports {private}"


def test_no_file_imports_itself_through_others():
    graph = {}
    for file in (ROOT / "peft_jax").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = imports(file) - {name}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_every_part_of_the_package_has_a_floor():
    parts = {path.name.removesuffix(".py") for path in (ROOT / "peft_jax").iterdir()
             if path.name[0] not in "._" and path.name != "py.typed"}
    assert parts == FLOOR.keys()


SLOW = ("jax", "torch", "transformers", "datasets", "pandas", "scipy", "matplotlib", "jinja2")  # to import


def test_command_lines_are_checked_without_what_is_slow():
    steps = ("import run", "from configs import base; base.get_config()",
             "import experiments.lora as e; e.get_config()")  # fmt: skip
    lines = [f"{step}; assert not set({SLOW}) & set(sys.modules), {step!r}" for step in steps]
    check = "\n".join(["import sys", *lines])
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_package_imports_neither_torch_nor_what_only_commands_use():
    check = ("import sys, peft_jax; [getattr(peft_jax, name) for name in peft_jax.__all__]; "
             f"assert not set({SLOW[1:]}) & set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
