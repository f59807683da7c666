"""What a JSON value must be for its reader, and the one line about what it is instead."""

import json

import pytest

from peft_jax.core import run_files
from peft_jax.core.json_shape import NUMBER, misfit, short
from peft_jax.errors import LONGEST, PeftJaxError, one_line


@pytest.mark.parametrize(("value", "shape", "words"), [
    ({"a": {"b": [1, 2]}}, {"a": {"b": [int]}}, ""),
    ({"a": {"b": [1, 2.5]}}, {"a": {"b": [int]}}, "a.b.1 is 2.5, not int"),
    ({"a": True}, {"a": int}, "a is true, not int"),
    ({"a": True}, {"a": bool}, ""),
    ({}, {"a": int}, "a is null, not int"),
    ({"x": 1.0, "y": float("nan")}, {str: NUMBER}, ""),
    ({"x": "1"}, {str: NUMBER}, 'x is "1", not int or float'),
    ({"x": 10**400}, {str: NUMBER}, "x is a number of hundreds of digits, not int or float below 2**64"),
    ([], {"a": int}, "it is [], not an object"),
    ({"a": 1}, [int], 'it is {"a": 1}, not a list'),
    (None, {}, "it is null, not an object"),
])
def test_what_does_not_fit_is_named(value, shape, words):
    assert misfit(value, shape) == words


def test_what_is_deep_is_told_in_short():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert short(deep) == "[...]" and misfit(deep, int) == "it is [...], not int"


WHOLE = {
    "config.json": '{"model": {}, "method": {}, "task": {}, "data": {}, "optim": {}, "seed": 0}',
    "manifest.json": '{"written": ["config.json"]}',
    "fingerprint.json": '{"examples": {"count": 1, "sha256": "a"}, "base": {"x": 1}}',
    "before.json": '{"eval": {}, "metrics": {"loss": 1.5}}',
    "results.json": '{"before": {}, "after": {"loss": NaN}, "trainable": 1, "all": 2, "seconds": 1.5, "steps": 3, '
                    '"peak_memory": {"host": 1}, "adapter": "a", "adapter_bytes": 3, "training_memory": {"host": 1}}',
    "measured.json": '{"asked": {}, "test": {"loss": 1}, "general": {"x": {"loss": 1}}, "neighbours": {}, '
                     '"latency": {"base": {"prefill": 1, "token": 2.0}}}',
}  # fmt: skip


def test_every_file_of_a_run_has_its_types(tmp_path):
    assert WHOLE.keys() == run_files.SHAPES.keys()
    for name, text in WHOLE.items():
        (tmp_path / name).write_text(text)
        run_files.read(tmp_path / name)
    (tmp_path / "table.json").write_text('{"model": "a name", "rows": []}')  # of another kind, by its name
    assert run_files.read(tmp_path / "table.json", "rows")["rows"] == []


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("damage", [
    "", "[]", "null", "3", "NaN", '"text"', "{", "\0\0\0", "[" * 100_000, '{"a":' * 100_000, "\udcff", "{}",
    "number of a section", "list of a section", "cut"])
def test_a_damaged_file_of_a_run_is_one_line_that_says_what_to_do(tmp_path, name, damage):
    whole = WHOLE[name]
    key = whole.partition('": ')[0] + '": '
    damage = {"number of a section": f"{key}3}}", "list of a section": f"{key}[[]]}}",
              "cut": whole[:len(whole) // 2]}.get(damage, damage)
    (tmp_path / name).write_bytes(damage.encode("utf-8", "surrogateescape"))
    with pytest.raises(PeftJaxError, match=f"^{tmp_path / name} .*: remove it, or train again with --overwrite\\.$"):
        run_files.read(tmp_path / name, *json.loads(whole))


def test_a_file_of_a_terabyte_is_not_read(tmp_path):
    with open(tmp_path / "results.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PeftJaxError, match=r"has 1,099,511,627,776 bytes, and .* is the most .*: remove it"):
        run_files.read(tmp_path / "results.json")


def test_a_message_is_one_line_whatever_the_names_in_it_hold():
    assert str(PeftJaxError("a\nb\tc\x1b[31m\ud800\u2028é")) == r"a\nb\tc\x1b[31m\ud800\u2028é"
    assert len(one_line("x" * 10**6)) <= LONGEST and one_line("x" * 10**6 + "end").endswith("end")
