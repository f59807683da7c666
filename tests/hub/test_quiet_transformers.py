"""A tokenizer needs no torch, so nobody is told to install it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT_TORCH = """
import importlib.util, os
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else find(name, package)
{}
print(os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS"))
"""


def said_without_torch(line: str) -> tuple[str, str]:
    """(standard output, standard error) of a program that imports where torch is not found."""
    environment = {key: value for key, value in os.environ.items() if key != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH.format(line)], capture_output=True, text=True,
                          check=True, env=environment, cwd=Path(__file__).parents[2])  # fmt: skip
    return done.stdout.strip(), done.stderr


@pytest.mark.slow
def test_the_advice_to_install_torch_is_not_given():
    out, err = said_without_torch("from peft_jax.hub.quiet_transformers import AutoTokenizer")
    assert out == "None" and "PyTorch was not found" not in err  # and the variable is as it was
    assert "PyTorch was not found" in said_without_torch("import transformers")[1]
