"""A method that needs to see data first is given some before training, and a group of leaves its own rate."""

import json

import numpy as np
import pytest

import run
from peft_jax.hub.adapters.load import load_adapter
from tests.test_run import arguments, data  # noqa: F401, the fixtures of a small run


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [
    ("eva", []), ("loraplus", []), ("pissa", ["--config.method.r=2"])])
def test_a_small_run_from_its_experiment(arguments, tiny_model, name, options, tmp_path):  # noqa: F811
    command = [arguments[0].replace("lora.py", f"{name}.py"), *arguments[1:], *options, f"--workdir={tmp_path}"]
    assert run.main(command) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["steps"] == 6 and np.isfinite(results["after"]["loss"])
    method, _ = load_adapter(tmp_path / "adapter", tiny_model[1])
    ranks = set((method.config["rank_pattern"] or {}).values())
    assert method.config["r"] == 4 and bool(ranks) == (name == "eva")
    assert run.main([*command, "--mode=merge"]) == 0
