"""Typed arguments, overrides and the errors that a mistyped command line gets."""

import pytest

from configs import base, check, parse
from configs.models import MODELS, source_of
from peft_jax.errors import PeftJaxError


@pytest.fixture
def config():
    return base.get_config().lock()


def test_typed_args_take_the_type_of_their_default():
    defaults = {"model": "x", "steps": 1, "rate": 0.1, "fast": False, "rest": 7}
    args = parse.typed_args("model=pypi:a==1,steps=5,rate=1e-3,fast=True", **defaults)
    assert args == {"model": "pypi:a==1", "steps": 5, "rate": 1e-3, "fast": True, "rest": 7}


@pytest.mark.parametrize(
    "text, word", [("modl=x", "model, steps"), ("steps=many", "expected int"), ("model", "key=value")]
)
def test_typed_args_name_what_is_wrong(text, word):
    with pytest.raises(PeftJaxError, match=word):
        parse.typed_args(text, model="x", steps=1)


def test_override_sets_values_of_the_right_type_and_returns_the_rest(config):
    argv = ["--config.method.r=4", "--config.optim.learning_rate", "1", "--noconfig.log.tensorboard", "--other=1"]
    assert parse.override(config, argv) == ["--other=1"]
    assert (config.method.r, config.optim.learning_rate, config.log.tensorboard) == (4, 1.0, False)


@pytest.mark.parametrize(
    "written, meant",
    [
        ("all-linear", "all-linear"),
        ("q_proj", ("q_proj",)),
        ("q_proj,v_proj", ("q_proj", "v_proj")),
        ("('q_proj', 'v_proj')", ("q_proj", "v_proj")),
        ("['q_proj']", ("q_proj",)),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (r".*layers\.\d{1,2}\.self_attn\.q_proj", r".*layers\.\d{1,2}\.self_attn\.q_proj"),
        ("None", None),
    ],
)
def test_module_names_may_be_written_in_any_of_these_ways(config, written, meant):
    assert parse.override(config, [f"--config.method.target_modules={written}"]) == []
    assert check.tidy(config).method.target_modules == meant


def test_other_open_fields_from_the_command_line(config):
    parse.override(config, ["--config.method.layers_to_transform=0,2", "--config.method.init_lora_weights=gaussian",
                            "--config.method.rank_pattern={'layers.0.self_attn.q_proj': 4}"])  # fmt: skip
    check.tidy(config)
    assert config.method.layers_to_transform == (0, 2)
    assert config.method.init_lora_weights == "gaussian"
    assert config.method.rank_pattern == {"layers.0.self_attn.q_proj": 4}


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.method.rr=8", r"unknown key --config.method.rr; did you mean --config.method.r\?"),
        ("--config.optim.r=8", r"did you mean --config.method.r\?"),
        ("--config.learning_rate=1", r"did you mean --config.optim.learning_rate\?"),
        ("--config.optim.lr=1", "the keys of config.optim are: .*learning_rate"),
        ("--config.method.r=abc", "--config.method.r=abc: expected int, such as 8"),
        ("--config.log.tensorboard=perhaps", "expected bool"),
        ("--config.method=lora", "is a section, not a key"),
        ("--config.seed", "[Mm]issing value"),
    ],
)
def test_a_bad_override_is_one_clear_line(config, argument, message):
    with pytest.raises(PeftJaxError, match=message) as caught:
        parse.override(config, [argument])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "experiment, arguments, steps, epochs",
    [
        ({"steps": 60}, ["optim.epochs=2"], 0, 2.0),  # the command line's wins
        ({"epochs": 3.0}, ["optim.steps=5"], 5, 0.0),
        ({"steps": 60}, ["optim.steps=5"], 5, 0.0),
        ({"steps": 60}, ["method.r=2"], 60, 0.0),
        ({"steps": 60}, ["optim.epochs=0"], 60, 0.0),  # which says nothing new
        ({"steps": 60}, ["optim.steps=0", "optim.epochs=2"], 0, 2.0),
    ],
)
def test_steps_or_epochs_of_the_command_line_win(config, experiment, arguments, steps, epochs):
    config.optim.update(experiment)
    assert parse.override(config.lock(), [f"--config.{argument}" for argument in arguments]) == []
    assert (config.optim.steps, config.optim.epochs) == (steps, epochs)
    check.check(config)


def test_steps_and_epochs_on_one_command_line_are_an_error(config):
    parse.override(config, ["--config.optim.steps=5", "--config.optim.epochs=2"])
    with pytest.raises(PeftJaxError, match="set exactly one"):
        check.check(config)


def test_general_text_is_for_models_that_write(config):
    config.task, config.optim.steps = base.task_config("movie_classes"), 1
    parse.override(config, ["--config.method.r=2"])
    assert config.eval.probe == "" and check.check(config) is None
    parse.override(config, ["--config.eval.probe=newspaper"])
    with pytest.raises(PeftJaxError, match=r"set --config\.eval\.probe="):
        check.check(config)


def test_an_unknown_file_names_the_nearest(tmp_path):
    with pytest.raises(PeftJaxError, match=r"did you mean experiments/lora\.py"):
        parse.load_experiment("experiments/lorra.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(PeftJaxError, match="no function get_config"):
        parse.load_experiment(str(tmp_path / "empty.py"))


def test_the_default_experiment_takes_arguments():
    config, name = parse.load_experiment("experiments/lora.py:model=owner/model,task=data/mine.jsonl")
    assert (name, config.model.source) == ("lora", "owner/model")
    assert (config.task.kind, config.task.source) == ("file", "data/mine.jsonl")
    assert (config.method.r, config.method.lora_alpha) == (16, 32)
    check.check(config)


@pytest.mark.parametrize("task, kind, source", [
    ("owner/name", "hub", "owner/name"), ("hub:owner/name", "hub", "owner/name"), ("hub:squad", "hub", "squad"),
    ("hub:owner/name.json", "hub", "owner/name.json"), ("owner/name.json", "file", "owner/name.json"),
    ("data/*", "file", "data/*"), ("mine/rows.txt", "file", "mine/rows.txt"), ("a/b/c.csv", "file", "a/b/c.csv"),
])
def test_a_task_is_a_file_or_a_data_set_of_the_hub(task, kind, source, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows.txt").write_text("")  # is there, so no data set, though of an ending that is not read
    monkeypatch.chdir(tmp_path)
    config = base.task_config(task)
    assert (config.kind, config.source) == (kind, source)


@pytest.mark.parametrize("task", ["movie_ratings", "a/b/c", "/nowhere/name"])
def test_what_is_no_task_is_named(task):
    with pytest.raises(PeftJaxError, match=f"^task={task} is neither .* nor a data set of the Hugging Face Hub"):
        base.task_config(task)


def test_models_by_name_or_source(tmp_path):
    assert source_of("smollm2-135m") == MODELS["smollm2-135m"]
    assert source_of("pypi:some==1") == "pypi:some==1"
    assert source_of(str(tmp_path)) == str(tmp_path)
    with pytest.raises(PeftJaxError, match="did you mean smollm2-135m"):
        source_of("smollm2-135n")
    with pytest.raises(PeftJaxError, match="no such file or folder"):
        source_of("./nothing/here.gguf")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("data.collate", "packed", r"did you mean pack\?"),
        ("data.batch_size", 0, "at least 1"),
        ("optim.learning_rate", -1.0, "at least 0"),
        ("optim.learning_rate", float("nan"), "at least 0"),
        ("optim.clip_norm", float("inf"), "finite"),
        ("optim.b1", 1.0, "between 0 and 1, 1 not included"),
        ("optim.warmup_ratio", 1.5, "between 0 and 1"),
        ("task.train_limit", -1, "which is no limit"),
        ("task.answer", "words", r"did you mean word\?"),
        ("optim.epochs", 1.0, "set exactly one"),
    ],
)
def test_values_that_cannot_be_meant(config, key, value, message):
    config.optim.steps = 5
    check.check(config)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(PeftJaxError, match=message):
        check.check(config)


def test_what_is_checked_exists(config):
    """A key that is mistyped in a table of checks would be checked never."""
    checked = {*check.CHOICES, *(key for _, _, numbers in check.RANGES for key in numbers)}
    assert checked <= parse.keys(config).keys()


def test_the_choices_are_those_of_the_library():
    from peft_jax.data.packing import COLLATIONS
    from peft_jax.data.tokenize import CHAT_LOSS, ON_TOO_LONG
    from peft_jax.train.optimizer import SCHEDULES

    assert set(check.CHOICES["data.collate"]) == set(COLLATIONS)
    assert set(check.CHOICES["data.on_too_long"]) == set(ON_TOO_LONG)
    assert set(check.CHOICES["data.chat_loss"]) == set(CHAT_LOSS)
    assert set(check.CHOICES["optim.schedule"]) == set(SCHEDULES)


def test_every_method_has_its_arguments_in_the_configuration():
    import inspect

    from configs.methods import method_config
    from peft_jax.methods import METHODS

    for name, build in METHODS.items():
        defaults = {key: argument.default for key, argument in inspect.signature(build).parameters.items()}
        given = method_config(name).to_dict()
        del given["name"]
        texts = [key for key in given if key.endswith("_text")]  # which the tokenizer turns into ids
        assert all(given.pop(key) == "" and key.replace("_text", "_ids") in defaults for key in texts)
        assert given == defaults, name


def test_an_argument_of_one_type_takes_that_type_alone():
    config = base.get_config(method="lokr")
    parse.override(config, ["--config.method.target_modules=up_proj", "--config.method.init_weights=lycoris"])
    assert (config.method.target_modules, config.method.init_weights) == ("up_proj", "lycoris")
    with pytest.raises(PeftJaxError, match=r"--config\.method\.r=many"):
        parse.override(config, ["--config.method.r=many"])


def test_several_methods_have_a_section_each():
    config = base.get_config(method="lora+ia3")
    parse.override(config, ["--config.method.lora.r=3", "--config.method.ia3.target_modules=k_proj,v_proj"])
    assert check.tidy(config).method.to_dict()["ia3"]["target_modules"] == ("k_proj", "v_proj")
    assert (config.method.name, config.method.lora.r) == ("chain", 3)
    with pytest.raises(PeftJaxError, match=r"method=lorra: did you mean lora"):
        base.get_config(method="ia3+lorra")
