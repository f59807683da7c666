"""``--mode=measure``: the test half, other tasks, general text; what is kept, and what it refuses."""

import json

import pytest

import run
from configs import base as configs
from peft_jax.cli import workdir
from peft_jax.cli.measure import measured
from peft_jax.data.sources import load_examples

pytestmark = pytest.mark.usefixtures("at_the_root")


@pytest.fixture(scope="module")
def arguments(tiny_folder, films):
    settings = {"mesh.data": 1, "data.batch_size": 4, "optim.steps": 2, "optim.learning_rate": 1e-2, "eval.probe": "",
                "eval.batch_size": 4, "log.tensorboard": False, "task.prompt_column": "prompt",
                "task.completion_column": "completion", "task.validation_fraction": 0.5, "measure.prompt_tokens": 4,
                "measure.new_tokens": 2, "measure.repeats": 1, "measure.neighbours": "()",
                "measure.general": "('python_reference',)", "measure.general_limit": 2}  # fmt: skip
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config=experiments/qlora.py:model={tiny_folder},task={films(20)}",
            "--config.method.quantize.block_size=16", "--config.model.remat=False", *overrides]


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "qlora"
    assert run.main([*arguments, "--config.eval.before=False", f"--workdir={folder}"]) == 0
    assert json.loads((folder / "results.json").read_text())["before"] == {}
    return folder


@pytest.mark.slow
def test_a_quantised_run_is_measured_against_the_plain_base(trained, arguments, capsys):
    command = [*arguments, f"--workdir={trained}", "--mode=measure"]
    assert run.main(command) == 0
    out = capsys.readouterr().out
    assert "ms until the first token" in out and "python_reference" in out and "merged:" in out
    found = json.loads((trained / "measured.json").read_text())
    assert found["test"]["loss"] > 0 and found["general"]["python_reference"]["loss"] > 0
    assert list(found["latency"]) == ["base", "unmerged", "merged"]
    stamp = (trained / "measured.json").stat().st_mtime_ns
    assert run.main(command) == 0 and (trained / "measured.json").stat().st_mtime_ns == stamp  # not again
    assert run.main([*command, "--config.measure.limit=3"]) == 0
    assert (trained / "measured.json").stat().st_mtime_ns != stamp


@pytest.mark.slow
def test_the_test_half_is_the_other_one(trained, arguments):
    command = run.parse_command([*arguments, f"--workdir={trained}", "--mode=eval", "--config.eval.part=test",
                                 "--config.eval.limit=0", "--config.measure.limit=0"])
    test = measured(command)["test"]["loss"]
    assert run.main([*arguments, f"--workdir={trained}", "--mode=eval", "--config.eval.part=test",
                     "--config.eval.limit=0"]) == 0
    assert json.loads((trained / "eval.json").read_text())["adapter"]["loss"] == pytest.approx(test, rel=1e-5)


def test_the_python_reference_is_prose():
    found = load_examples(configs.task_config("python_reference"))
    assert not found["train"] and len(found["validation"]) > 100
    assert all(200 <= len(one["text"]) <= 1000 and "\n" not in one["text"] for one in found["validation"])


@pytest.mark.slow
def test_the_model_as_it_was_needs_no_run(arguments, tmp_path):
    assert run.main([*arguments, f"--workdir={tmp_path}", "--mode=measure", "--config.measure.of=base"]) == 0
    assert list(json.loads((tmp_path / "measured.json").read_text())["latency"]) == ["base"]


@pytest.mark.slow
def test_another_model_or_task_is_measured_anew(arguments, films, tmp_path):
    """The same flags for --mode=measure with another task, such as :task=tweet_rating, in the same workdir."""
    base = [f"--workdir={tmp_path}", "--mode=measure", "--config.measure.of=base", "--config.measure.general=()"]
    found = []
    for more in ([], ["--config.task.prompt_template=About a film, {prompt}"]):
        assert run.main([*arguments, *base, *more]) == 0
        found.append(json.loads((tmp_path / "measured.json").read_text())["test"]["loss"])
    assert found[0] != found[1]


@pytest.mark.slow
def test_a_damaged_measurement_is_overwritten_if_asked_for(arguments, tmp_path):
    workdir.claim(tmp_path, "measured.json")
    (tmp_path / "measured.json").write_text("{")
    command = [*arguments, f"--workdir={tmp_path}", "--mode=measure", "--config.measure.of=base",
               "--config.measure.general=()"]
    assert run.main(command) == 2
    assert run.main([*command, "--overwrite"]) == 0


@pytest.mark.slow
def test_each_file_of_several_has_a_column(arguments, films, tmp_path):
    others = [str(films(count)) for count in (60, 80)]
    assert run.main([*arguments, f"--workdir={tmp_path}", "--mode=measure", "--config.measure.of=base",
                     "--config.measure.general=()", f"--config.measure.neighbours={tuple(others)}"]) == 0
    assert list(json.loads((tmp_path / "measured.json").read_text())["neighbours"]) == others


@pytest.mark.slow
@pytest.mark.parametrize(("more", "words"), [
    (["--config.measure.of=both"], "measure.of=both"),
    (["--config.measure.general=('newspapr',)"], "task=newspapr is neither"),
    (["--config.measure.repeats=0"], "measure.repeats=0: must be a finite number of at least 1"),
    (["--workdir=/tmp/nothing-here"], "holds no adapter: train one first"),
])
def test_what_it_refuses(arguments, trained, capsys, more, words):
    assert run.main([*arguments, f"--workdir={trained}", "--mode=measure", *more]) == 2
    assert words in capsys.readouterr().err
