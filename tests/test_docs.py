"""The examples in docstrings say what is so."""

import doctest
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[1]
FILES = [path.relative_to(ROOT) for part in ("peft_jax", "configs") for path in sorted((ROOT / part).rglob("*.py"))
         if any(">>>" in line and "+SKIP" not in line for line in path.read_text().splitlines())]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_examples(file):
    names = file.with_suffix("").parts
    found = doctest.testmod(importlib.import_module(".".join(names)), extraglobs={"jax": jax, "jnp": jnp})
    assert found.attempted and not found.failed
