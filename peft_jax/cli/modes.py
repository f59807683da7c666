"""What ``run.py`` can be asked to do with one run. This file imports no jax: a command line is checked with it."""

from importlib import import_module

# By mode: the file of this folder whose function ``job`` does it. Each job prints for people and returns an exit code.
JOBS = {
    "train": "train",
    "eval": "evaluate",
    "measure": "measure",
    "merge": "merge",
    "export": "merge",
    "generate": "generate",
    "show": "show",
    "plan": "plan",
    "recommend": "recommend",
}


def run(command) -> int:
    """Do what the command's mode says; the exit code."""
    command = import_module("peft_jax.cli.settle_task").settled(command)
    return import_module(f"peft_jax.cli.{JOBS[command.mode]}").job(command)
