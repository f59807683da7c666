"""Sweeps as data: cells, budgets, what is the same for all; every sweep of the repository is well formed."""

from pathlib import Path

import numpy as np
import pytest

import run
from configs import base, parse, sweeps
from peft_jax.errors import PeftJaxError
from peft_jax.evaluation.objectives import objective_of

ROOT = Path(__file__).parents[2]
FILES = [path for path in sorted((ROOT / "experiments").rglob("*.py")) if "def get_cells" in path.read_text()]
pytestmark = pytest.mark.usefixtures("at_the_root")


def cells_of(argument, *more):
    return run.parse_command([f"--config={argument}", *more]).cells


@pytest.mark.slow
@pytest.mark.parametrize("budget", sweeps.BUDGETS)
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_sweep_has_cells_of_their_own_names_that_are_checked(file, budget):
    cells = cells_of(f"{file}:budget={budget}")
    names = [cell.name for cell in cells]
    assert len(names) == len(set(names)) >= 2
    assert all("/" not in name and " " not in name for name in names)
    for cell in cells:
        assert "sweep" not in cell.config and cell.config.eval.part == "validation"
        assert set(cell.best_of) <= set(names)
        for key, value in cell.settings.items():
            assert parse.keys(cell.config)[key] == value


def test_the_ablations_are_there_the_nine_of_the_issue_and_steps():
    assert {file.stem for file in FILES} == {
        "compare", "rank", "target_modules", "learning_rate", "data_size", "bottleneck", "prefix_length",
        "quantisation", "layers", "seeds", "steps"}


def test_a_grid_is_every_combination_and_every_seed():
    config = sweeps.sweep(base.get_config(), "smoke", seeds=(0,))
    config.sweep.seeds = (3, 4)
    cells = sweeps.grid(config, {"method.r": (2, 8), "method.lora_alpha": (8,)})
    assert [cell.settings for cell in cells] == [
        {"method.r": r, "method.lora_alpha": 8, "seed": seed} for r in (2, 8) for seed in (3, 4)]
    assert cells[0].name == "lora-r-2-lora_alpha-8-seed-3" and cells[0].axes == ("method.r", "method.lora_alpha")
    assert [cell.config.seed for cell in cells] == [3, 4, 3, 4] and cells[2].config.method.r == 8


def test_lora_without_quantisation_stands_beside_the_quantised_ones():
    plain, *others = cells_of("experiments/ablations/quantisation.py")[::3]
    own, theirs = parse.keys(plain.config), parse.keys(others[0].config)
    assert plain.label == "lora" and not plain.axes and {cell.label for cell in others} == {"qlora"}
    differ = {key for key in own.keys() & theirs.keys() if own[key] != theirs[key] and not key.startswith("method.")}
    assert not differ and own["eval.before"] and own["model.dtype"] == "float32"
    assert plain.config.method.target_modules == others[0].config.method.lora.target_modules == "all-linear"


def test_a_comparison_shares_all_but_the_method_and_its_rates():
    cells = cells_of("experiments/compare.py:budget=smoke,methods=full+qlora", "--config.optim.steps=7",
                     "--config.data.batch_size=4", "--config.optim.clip_norm=0.5")
    assert [cell.label for cell in cells] == ["base", "full", "qlora", "full", "qlora", "full", "qlora"]
    for cell in cells:
        assert (cell.config.optim.steps, cell.config.data.batch_size, cell.config.optim.clip_norm) == (7, 4, 0.5)
        assert cell.config.model.dtype == "float32" and not cell.config.model.remat  # qlora.py says bfloat16
    assert cells[1].config.optim.learning_rate != cells[3].config.optim.learning_rate
    assert cells[2].config.method.name == "chain"
    assert cells[0].config.measure.of == "base" and cells[1].config.measure.of == "trained"
    assert [cell.measure for cell in cells] == [True, False, False, False, False, True, True]


def test_any_experiment_can_be_compared_around_its_own_rate():
    cells = cells_of("experiments/compare.py:methods=oft")
    own = sweeps.experiment_config("oft").optim.learning_rate
    assert [cell.config.optim.learning_rate for cell in cells[1:4]] == [own, 2 * own, own / 2]


def test_a_best_cell_has_the_name_of_the_run_that_it_chooses():
    cells = cells_of("experiments/compare.py:budget=smoke,methods=lora")
    tried, best = cells[1], cells[-1]
    assert best.best_of == (cells[1].name, cells[2].name)
    whole = best.having(tried.settings)
    assert whole.name == tried.name and whole.config.to_dict() == tried.config.to_dict() and whole.measure
    assert tried.having({}) is tried


@pytest.mark.parametrize(("task", "usual"), [
    ("movie_rating", "among_choices"), ("movie_classes", "accuracy"), ("movie_score", "spearman"),
    ("data.jsonl", "-loss")])
def test_runs_are_compared_by_what_evaluation_gives(task, usual):
    task, examples = base.task_config(task), [{"word": "bad", "score": -1, "label": 1},
                                              {"word": "good", "score": 1, "label": 3}]
    objective = objective_of(task)
    found = objective.losses(0.5)
    if task.kind == "rating":
        answers = np.log([[0.1, 0.4, 0.2, 0.2, 0.1], [0.1, 0.2, 0.2, 0.4, 0.1]])[:, :5 if task.answer != "score" else 1]
        found |= objective.rate(task, examples, answers, ["bad", "good"])
    metrics = sweeps.metrics_of(task)
    assert metrics[0] == usual and {metric.removeprefix("-") for metric in metrics} == set(found)
    assert all(metric.startswith("-") == (metric.removeprefix("-") in objective.losses(0.5)) for metric in metrics)


def test_cells_that_share_a_name_are_refused(tmp_path):
    """The second would be taken for finished once the first is."""
    (tmp_path / "twice.py").write_text(
        "from configs import sweeps\n\n\ndef get_config(arg=''):\n    return sweeps.base_of(arg, 'lora')\n\n\n"
        "def get_cells(config):\n    return sweeps.grid(config, {'method.target_modules': ('.*[qk]_p', '.*(qk)_p')})\n")
    with pytest.raises(PeftJaxError, match=r"2 cells of this sweep are called lora-target_modules-"):
        run.parse_command([f"--config={tmp_path / 'twice.py'}"])


@pytest.mark.slow
@pytest.mark.parametrize(("argv", "words"), [
    (["--config=experiments/compare.py:budget=tiny"], "budget=tiny: choose one of: long, short, smoke"),
    (["--config=experiments/compare.py:methods=lora+adpter"], "methods=adpter: all, article, or .*adapter"),
    (["--config=experiments/compare.py", "--sweep_index=35"], "has the cells 0 to 34"),
    (["--config=experiments/compare.py", "--sweep_index=-1"], "has the cells 0 to 34"),
    (["--config=experiments/compare.py", "--mode=merge"], "a sweep is run"),
    (["--config=experiments/compare.py", "--config.method.r=3"], "unknown key --config.method.r"),
    (["--config=experiments/lora.py", "--mode=report"], "--mode=report is for sweeps"),
    (["--config=experiments/lora.py", "--mode=cells"], "--mode=cells is for sweeps"),
    (["--config=experiments/lora.py", "--sweep_index=0"], "--sweep_index is for sweeps"),
    (["--config=experiments/ablations/rank.py", "--config.sweep.seeds=0,x"], "sweep.seeds"),
    (["--config=experiments/ablations/rank.py", "--config.sweep.seeds=()"], "sweep.seeds=: whole numbers"),
    (["--config=experiments/ablations/rank.py", "--config.sweep.seeds=0,0"], "sweep.seeds=0,0: whole numbers"),
    (["--config=experiments/compare.py", "--config.sweep.rates=0"], "sweep.rates=0: at least one"),
    (["--config=experiments/compare.py", "--config.sweep.metric=loss"], "sweep.metric=loss: .*, -loss, .*has a minus"),
    (["--config=experiments/compare.py", "--config.sweep.metric=accuracy"], "compared by among_choices, exact"),
    (["--config=experiments/compare.py", "--config.sweep.budget=smoke"], "unknown key --config.sweep.budget"),
    (["--config=experiments/compare.py", "--config.eval.part=test"], "eval.part=test: .*eval.part=validation"),
    (["--config=experiments/compare.py", "--config.measure.of=base"], "measure.of=base: .*measure.of=trained"),
    (["--config=experiments/compare.py", "--config.seed=1"], "seed=1: this sweep sets that itself, to 0, 2"),
    (["--config=experiments/compare.py", "--config.optim.learning_rate=1"], "sets that itself, to 5e-05, 0.001"),
    (["--config=experiments/compare.py", "--config.method.name=lora"], "method.name=lora: this sweep sets that itself"),
    (["--config=experiments/compare.py", "--config.optim.rates={'lora_b': 16}"], "sets that itself, to None"),
    (["--config=experiments/ablations/rank.py", "--config.method.r=8"], "method.r=8: this sweep sets that itself"),
    (["--config=experiments/compare.py", "--mode=report", "--sweep_index=1"], "--sweep_index is for --mode=train"),
    (["--config=experiments/compare.py", "--mode=cells", "--sweep_index=1"], "--sweep_index is for --mode=train"),
    (["--config=experiments/compare.py", "--distributed"], "--distributed is for a single run"),
])
def test_what_cannot_be_meant(argv, words):
    with pytest.raises(PeftJaxError, match=words):
        run.parse_command(argv)
