"""What the documentation says is so: examples run, commands are legal, links lead somewhere."""

import ast
import doctest
import importlib
import json
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import peft_jax
import run
from peft_jax.errors import PeftJaxError
from tests.test_imports import FLOORS

ROOT = Path(__file__).parents[1]
EXAMPLES = [path.relative_to(ROOT) for part in ("peft_jax", "configs") for path in sorted((ROOT / part).rglob("*.py"))
            if any(">>>" in line and "+SKIP" not in line for line in path.read_text().splitlines())]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAG = r"--[\w.]+(?:=(?:\$?'[^']*'|[^\s'\"`;&|]*))?"
COMMAND = re.compile(rf"\bpython\s+([\w./]+\.py)((?:\s+{FLAG})*)")
FILE = re.compile(r"`((?:peft_jax|tests|experiments|benchmarks|configs|docs)/[\w./-]*)`|--config=(experiments/[\w./]+)")
MADE = {"docs/comparison/report.html"}  # by a command that stands beside it
SHELL = {"$SLURM_ARRAY_TASK_ID": "0"}  # what a shell would put there


def text(page: Path) -> str:
    """The page, or an experiment's docstring, with continued lines in one."""
    written = ast.get_docstring(ast.parse(page.read_text())) if page.suffix == ".py" else page.read_text()
    return re.sub(r"\\\n\s*", " ", written)


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.slow
@pytest.mark.parametrize("file", EXAMPLES, ids=str)
def test_examples_in_docstrings(file):
    module = importlib.import_module(".".join(file.with_suffix("").parts))
    result = doctest.testmod(module, extraglobs={"jax": jax, "jnp": jnp})
    assert result.attempted and not result.failed


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_links_lead_to_files_and_headings():
    broken, links = [], 0
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            links += 1
            if not link.startswith("http") and not (target.exists() and (not anchor or anchor in anchors(target))):
                broken.append(f"{page.name}: {link}")
    assert links > 50 and not broken


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index] == ["README.md"]


def test_files_that_are_named_exist():
    missing, files = [], 0
    for page in PAGES:
        names = [one or other for one, other in FILE.findall(text(page))]
        names += [file for file, _ in COMMAND.findall(text(page))]
        files += len(names)
        missing += [f"{page.name}: {name}" for name in names if name not in MADE and not (ROOT / name).exists()]
    assert files > 50 and not missing


@pytest.mark.slow
def test_commands_are_legal(monkeypatch, capsys):
    """Each ``python run.py ...`` of the pages and of the experiments' docstrings, as far as ``run.py`` checks it."""
    monkeypatch.chdir(ROOT)
    refused, commands = [], {}
    for page in [*PAGES, *sorted((ROOT / "experiments").rglob("*.py"))]:
        flags_of_runs = [flags for file, flags in COMMAND.findall(text(page)) if file == "run.py"]
        commands |= {" ".join(flags.split()): page.name for flags in flags_of_runs}
    for flags, page in commands.items():
        words = [SHELL.get(word, word) for word in re.split(r"(\$\w+)", flags.replace("$'", "'"))]
        try:
            run.parse_command(shlex.split("".join(words)))
        except PeftJaxError as error:
            refused.append(f"{page}: run.py {flags}: {error}")
    assert len(commands) > 60 and not refused


def test_contributing_has_the_floors_of_the_house():
    floors = {}
    for floor, parts in re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE):
        names = re.findall(r"`(\w+)(?:/|\.py)`", parts)
        floors.setdefault(int(floor), set()).update(names)
    assert floors == dict(enumerate(FLOORS))


def test_python_in_the_pages_names_what_exists():
    unknown, names = [], 0
    for page in PAGES:
        for block in python_blocks(page):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "peft_jax":
                    names += 1
                    unknown += [] if node.attr in peft_jax.__all__ else [f"{page.name}: peft_jax.{node.attr}"]
    assert names > 15 and not unknown


@pytest.mark.real
def test_the_python_of_the_readme_runs_as_one_script(tmp_path, monkeypatch):
    """And leaves what it says: an adapter whose base peft finds, a model that transformers finds complete."""
    monkeypatch.chdir(tmp_path)
    names = {}
    exec("\n".join(python_blocks(ROOT / "README.md")), names)
    assert float(names["value"]) < 5
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == "HuggingFaceTB/SmolLM2-135M-Instruct"
    merged = {one.name for one in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= merged
    ids = jnp.array([[504, 2644]])
    program = names["step"].trace(names["params"], names["tx"].init(names["params"]), ids).jaxpr
    assert sum(jnp.size(constant) for constant in program.consts) < 1000  # no weights, which XLA would fold for minutes
