"""Imports go one way, and what must answer at once imports no jax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each part with its height; a part may import lower ones and itself. models may import only what knows no method.
HEIGHTS = {"aside": 0, "contraction": 0, "errors": 0, "kept": 0, "arguments": 1, "lowrank": 1, "mesh": 1, "tree": 1,
           "targets": 3, "quant": 3.5, "stored": 4,
           "method": 5, "beside": 6, "virtual": 6.5, "whole": 6, "methods": 7, "models": 7, "sharding": 7,
           "generation": 7, "loss": 7,
           "hub": 8, "mixed": 8, "weighted": 8, "data": 9, "planner": 9, "evaluation": 10, "train": 11,
           "comparison": 1, "sweep": 12}
ALLOWED_IN_MODELS = {"errors", "kept", "models"}


def imported_parts(file: Path) -> set[str]:
    """The parts of peft_jax that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("peft_jax.")}


FILES = [file for file in sorted((ROOT / "peft_jax").rglob("*.py")) if file != ROOT / "peft_jax" / "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT / "peft_jax")))
def test_imports_go_one_way(file):
    part = file.relative_to(ROOT / "peft_jax").parts[0].removesuffix(".py")
    parts = imported_parts(file)
    higher = {other for other in parts - {part} if HEIGHTS.get(other, 99) >= HEIGHTS[part]}
    assert not higher, f"{file.name} imports upwards: {higher}"
    if part == "models":
        assert parts <= ALLOWED_IN_MODELS


@pytest.mark.parametrize("code", ["import run", "from configs import base; base.get_config()",
                                  "import experiments.lora as e; e.get_config()"])
def test_command_lines_are_checked_without_jax(code):
    check = f"import sys; {code}; assert not {{'jax', 'torch', 'transformers', 'datasets'}} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_the_package_imports_no_torch():
    check = ("import sys, peft_jax; [getattr(peft_jax, name) for name in peft_jax.__all__]; "
             "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
