"""What ablations share: a command line with a budget, and runs of ``run.py`` that are not run twice."""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def command_line(docstring: str, workdir: str) -> argparse.ArgumentParser:
    """The arguments that every ablation has."""
    parser = argparse.ArgumentParser(description=docstring.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--limit", type=int, default=100, help="held-out sentences")
    parser.add_argument("--probe_limit", type=int, default=16, help="general texts")
    parser.add_argument("--workdir", default=workdir)
    parser.add_argument("more", nargs="*", help="further overrides, such as --config.seed=1, after --")
    return parser


def run(experiment: str, name: str, overrides: Sequence[str], args: argparse.Namespace) -> dict:
    """The results of a run within the budget, from its workdir where it is finished; {} and a line where it failed."""
    folder = Path(args.workdir) / name
    command = [sys.executable, "run.py", f"--config=experiments/{experiment}.py", f"--workdir={folder}",
               f"--config.optim.steps={args.steps}", f"--config.eval.limit={args.limit}",
               f"--config.eval.probe_limit={args.probe_limit}", *overrides, *args.more]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{name} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
        return {}
    return json.loads((folder / "results.json").read_text())
