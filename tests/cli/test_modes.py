"""What a job finds in its workdir that no run wrote is one clear error, not a traceback."""

import pytest

import run
from peft_jax.cli import train as training
from peft_jax.cli import workdir
from peft_jax.errors import PeftJaxError

FOREIGN = pytest.mark.parametrize("content, words", [("[]", "not a JSON object"), ('{"eval": {}}', "lacks ")])


@FOREIGN
def test_metrics_before_training_that_no_run_wrote(tmp_path, content, words):
    (tmp_path / "before.json").write_text(content)
    with pytest.raises(PeftJaxError, match=rf"{tmp_path}/before.json .*{words}.*remove it"):
        training._before(tmp_path, None, None, {})


@FOREIGN
def test_results_that_were_changed(tmp_path, content, words):
    workdir.claim(tmp_path, "results.json")
    (tmp_path / "results.json").write_text(content)
    command = run.parse_command(["--config=experiments/lora.py", f"--workdir={tmp_path}"])
    with pytest.raises(PeftJaxError, match=rf"{tmp_path}/results.json .*{words}.*remove it"):
        training.job(command)


def test_merging_onto_a_run_is_refused_before_anything_is_loaded(tmp_path, capsys):
    """``load_model`` would fail here: the base model of this run is nowhere."""
    for name in ("run", "other"):
        command = run.parse_command(["--config=experiments/lora.py", "--config.model.source=no/where"])
        workdir.start(tmp_path / name, command.config.to_dict(), overwrite=False)
        (tmp_path / name / "adapter").mkdir()
    arguments = ["--config=experiments/lora.py", "--config.model.source=no/where", "--mode=merge"]
    for output in ("run", "run/adapter", "run/checkpoints/new", "run/model", "other", "other/adapter/x"):
        assert run.main([*arguments, f"--workdir={tmp_path}/run", f"--output={tmp_path}/{output}"]) == 2
        assert "which the model would overwrite: choose another folder, such as" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["adapter", "config.json", "manifest.json"]


@pytest.mark.parametrize("output", ["run/merged", "run/merged/again", "elsewhere", "model"])
def test_a_model_may_be_merged_into_a_folder_of_its_own(tmp_path, output):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    workdir.check_output(tmp_path / output, tmp_path / "run", "some/model")
