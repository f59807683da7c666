"""A workdir that cannot be used, or that holds another run, is refused before anything is written."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import run
from configs import base
from peft_jax.cli import workdir
from peft_jax.cli.settle_task import settled
from peft_jax.errors import PeftJaxError


def settings(**changes):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    return config.to_dict()


def test_the_same_settings_are_welcome_and_evaluation_may_change(tmp_path):
    workdir.start(tmp_path / "new" / "run", settings(), overwrite=False)
    workdir.check_config(tmp_path / "new" / "run", settings(**{"eval.limit": 3, "checkpoint.every": 1}))


@pytest.mark.parametrize(
    "key, value",
    [("seed", 1), ("method.r", 4), ("method.target_modules", ("k_proj",)), ("model.source", "other/model"),
     ("data.batch_size", 2), ("optim.learning_rate", 1.0), ("task.prompt_template", "{text}")],
)  # fmt: skip
def test_settings_that_make_another_run_are_named(tmp_path, key, value):
    workdir.start(tmp_path, settings(), overwrite=False)
    with pytest.raises(PeftJaxError, match=rf"other settings: {key} was [^;]*, now [^;]*\. .*--overwrite"):
        workdir.check_config(tmp_path, settings(**{key: value}))


def test_a_run_of_a_file_from_before_labels_had_names_goes_on(tmp_path):
    config = base.get_config(task="films.csv").to_dict()
    task = {key: value for key, value in config["task"].items() if key not in ("chat", "label_names")}
    workdir.start(tmp_path, {**config, "task": task}, overwrite=False)
    workdir.check_config(tmp_path, config)
    for key, value in (("chat", True), ("label_names", ("bad", "good"))):
        with pytest.raises(PeftJaxError, match=rf"other settings: task\.{key} was [^;]*, now [^;]*\. "):
            workdir.check_config(tmp_path, {**config, "task": {**config["task"], key: value}})


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    workdir.start(tmp_path, settings(), overwrite=False)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "x").write_text("old")
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    workdir.start(tmp_path, settings(seed=3), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "manifest.json", "notes.txt"]
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 3


def test_a_folder_that_cannot_be_is_refused_and_nothing_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PeftJaxError, match="is a file, not a folder"):
        workdir.check_writable(tmp_path / "file" / "run")
    workdir.check_writable(tmp_path / "deep" / "run")
    assert not (tmp_path / "deep").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where even root can make nothing")
@pytest.mark.parametrize("folder", ["/proc/run", "/proc/deep/run", "/proc"])
def test_a_folder_that_only_looks_writable_is_refused(folder):
    with pytest.raises(PeftJaxError, match=f"^workdir {folder} cannot be written: .*; choose another with --workdir$"):
        workdir.check_writable(Path(folder))


def test_a_name_that_no_file_system_takes_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "run")
    for folder in (tmp_path / ("n" * 300), tmp_path / "link"):
        with pytest.raises(PeftJaxError, match=r"cannot be written: .*; choose another with --workdir"):
            workdir.check_writable(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_looking_whether_a_folder_is_writable_changes_nothing_in_it(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    workdir.check_writable(tmp_path)
    workdir.check_writable(tmp_path / "a" / "b" / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_of_several_processes_none_takes_the_folder_away(tmp_path):
    workdir.check_writable(tmp_path / "deep" / "run", leave=True)
    assert list(tmp_path.rglob("*")) == [tmp_path / "deep", tmp_path / "deep" / "run"]


def test_a_damaged_file_is_named(tmp_path):
    workdir.start(tmp_path, settings(), overwrite=False)
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(PeftJaxError, match=r"config.json is not readable as JSON"):
        workdir.check_config(tmp_path, settings())


@pytest.mark.parametrize(
    "content, words",
    [("[]", r"holds \[\], not a JSON object"), ("3", "holds 3, not a JSON object"), ("null", "holds null, not a JSON"),
     ("{}", "lacks seed, model, method, task, data, optim"), ('{"model": {}}', "lacks seed, method")],
)  # fmt: skip
def test_a_configuration_that_was_changed_is_named(tmp_path, content, words):
    workdir.start(tmp_path, settings(), overwrite=False)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(PeftJaxError, match=rf"config.json {words}.*: remove it, or train again with --overwrite\.$"):
        workdir.check_config(tmp_path, settings())


def test_only_the_model_s_source_matters_to_a_trained_adapter(tmp_path):
    workdir.start(tmp_path, settings(), overwrite=False)
    other = {"model.dtype": "bfloat16", "model.param_dtype": "bfloat16", "model.remat": True}
    workdir.check_config(tmp_path, settings(**other), workdir.ADAPTER_MATTERS)
    with pytest.raises(PeftJaxError, match=r"other settings: model.source was [^;]*, now \"a/b\"\."):
        workdir.check_config(tmp_path, settings(**other, **{"model.source": "a/b"}), workdir.ADAPTER_MATTERS)
    with pytest.raises(PeftJaxError, match=r"model.dtype was .*model.param_dtype was .*model.remat was "):
        workdir.check_config(tmp_path, settings(**other))


@pytest.mark.usefixtures("at_the_root")
def test_a_run_is_kept_under_the_name_of_its_experiment():
    for experiment in ("lora", "full"):
        assert run.parse_command([f"--config=experiments/{experiment}.py"]).workdir == f"runs/{experiment}"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "eval", "merge", "generate", "measure"])
@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_a_folder_that_no_run_made_is_left_as_it_is(tmp_path, capsys, mode, flags):
    files = {"config.json": '{"model_type": "llama"}', "checkpoints/7/weights": "mine", "adapter/notes.txt": "mine"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert run.main(["--config=experiments/lora.py", f"--workdir={tmp_path}", f"--mode={mode}", *flags]) == 2
    assert re.search(f"error: {tmp_path} holds '.*', which no run wrote .*: choose another --workdir, or move it away",
                     capsys.readouterr().err)
    left = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == files


def test_a_run_from_before_there_were_manifests_goes_on(tmp_path):
    workdir.write_json(tmp_path / "config.json", settings())
    (tmp_path / "adapter").mkdir()
    workdir.check_config(tmp_path, settings())
    workdir.start(tmp_path, settings(seed=3), overwrite=True)
    assert not (tmp_path / "adapter").exists()


def test_while_a_run_trains_no_other_starts_in_its_folder(tmp_path, capsys):
    with workdir.locked(tmp_path):
        assert run.main(["--config=experiments/lora.py", f"--workdir={tmp_path}"]) == 2
        assert re.fullmatch(f"error: {tmp_path}: another process is at this run now, number {os.getpid()} on .*, since "
                            "20.*; wait for it, or choose another --workdir", capsys.readouterr().err.strip())
    with workdir.locked(tmp_path):
        assert (tmp_path / "lock").exists()


def test_a_lock_leaves_no_folder_behind_that_it_made(tmp_path):
    with workdir.locked(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run").exists()
    assert not (tmp_path / "new" / "run").exists()


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl", "config.json", "checkpoints", "adapter", "profile"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero"),
                                  lambda path: path.write_text("x")])
def test_a_name_of_a_run_that_is_something_else_is_refused_before_it_is_opened(tmp_path, name, make):
    make(path := tmp_path / name)
    if path.is_dir() if name in workdir.FOLDERS else path.is_file():
        return workdir.check_kinds(tmp_path)
    with pytest.raises(PeftJaxError, match=f"{name} is .*: remove it, or train again with --overwrite"):
        workdir.check_kinds(tmp_path)


@pytest.mark.parametrize("name", ["lock", "lock.json"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_lock_that_is_no_file_is_refused_and_not_passed_by(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(PeftJaxError, match=f"{name} is .*: remove it"), workdir.locked(tmp_path):
        pytest.fail("it was passed by")


@pytest.mark.parametrize("content", ["", "3", "[]", '{"process": 1}', "\0"])
def test_what_the_lock_says_of_its_process_may_be_anything(tmp_path, content):
    (tmp_path / "lock.json").write_text(content)
    with workdir.locked(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["process"] == os.getpid()


def test_a_pipe_in_the_place_of_a_scratch_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "results.json.tmp")
    workdir.write_json(tmp_path / "results.json", {"a": 1})
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": 1}


def test_whether_a_folder_is_a_run_s_is_seen_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    os.mkfifo(tmp_path / "measured.json")
    assert workdir.own_names(tmp_path) == set()


@pytest.mark.parametrize(("change", "words"), [
    ({"label_names": 3}, "task.label_names is 3, not a list"), ({"label_names": [1]}, "label_names.0 is 1, not str"),
    ({"answer": None}, "task.answer is null, not str"), ({"answer": "words"}, "did you mean word?"),
    ({"num_labels": "2"}, 'num_labels is "2", not int'), ({"num_labels": 10**9}, "num_labels is 1000000000, not 1 to"),
    ({"num_labels": 0}, "num_labels is 0, not 1 to"),
])
def test_what_a_run_says_of_its_labels_is_of_its_types(tmp_path, change, words):
    config = base.get_config(task="films.csv")
    workdir.start(tmp_path, config.to_dict(), overwrite=False)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "task": {**stored["task"], **change}}))
    command = SimpleNamespace(workdir=str(tmp_path), mode="eval", config=config)
    with pytest.raises(PeftJaxError, match=f"config.json is damaged, .*{re.escape(words)}.*: remove it"):
        settled(command)
