"""What a job finds in its workdir that no run wrote is one clear error, not a traceback."""

import pytest

import run
from peft_jax.errors import PeftJaxError
from peft_jax.train import jobs

FOREIGN = pytest.mark.parametrize("content, words", [("[]", "not a JSON object"), ('{"eval": {}}', "lacks ")])


@FOREIGN
def test_metrics_before_training_that_no_run_wrote(tmp_path, content, words):
    (tmp_path / "before.json").write_text(content)
    with pytest.raises(PeftJaxError, match=rf"{tmp_path}/before.json .*{words}.*remove it"):
        jobs._before(tmp_path, None, None, {})


@FOREIGN
def test_results_that_no_run_wrote(tmp_path, content, words):
    (tmp_path / "results.json").write_text(content)
    command = run.parse_command(["--config=experiments/lora.py", f"--workdir={tmp_path}"])
    with pytest.raises(PeftJaxError, match=rf"{tmp_path}/results.json .*{words}.*remove it"):
        jobs.train(command)
