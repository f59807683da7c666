"""Seconds of prefill and of a token: which calls are counted, in which order, and what is refused."""

import math

import pytest

from peft_jax import PeftJaxError, bind, lora
from peft_jax.evaluation import latency as module
from peft_jax.evaluation.latency import latency


def test_medians_in_turn_without_the_first(monkeypatch, tiny_model):
    calls, model = [], tiny_model[0]

    def seconds(apply, params, ids, new):
        calls.append((apply, new))
        turn = len(calls) // 4
        if turn == 0:
            return 100.0  # compiling
        return {"a": 1.0, "b": 2.0}[apply] + 0.25 * (new - 1) + (50.0 if turn == 2 else 0.0)  # an outlier

    monkeypatch.setattr(module, "_seconds", seconds)
    found = latency({"a": ("a", None), "b": ("b", None)}, model, prompt_tokens=4, new_tokens=2, repeats=3)
    assert found == {"a": {"prefill": 1.0, "token": 0.25}, "b": {"prefill": 2.0, "token": 0.25}}
    assert calls[:4] == [("a", 1), ("a", 3), ("b", 1), ("b", 3)] and len(calls) == 16


@pytest.mark.slow
def test_a_real_model_and_its_adapter(tiny_model):
    import jax

    model, base = tiny_model
    method = lora(r=2)
    params = method.init(jax.random.key(0), base)
    variants = {"base": (model.apply, base), "unmerged": (bind(method, model), params)}
    found = latency(variants, model, prompt_tokens=4, new_tokens=3, rows=2, repeats=1)
    assert all(math.isfinite(value) for one in found.values() for value in one.values())
    assert all(one["prefill"] > 0 for one in found.values()) and found.keys() == variants.keys()


@pytest.mark.parametrize(("change", "words"), [
    ({"new_tokens": 0}, "new_tokens=0: must be at least 1"), ({"repeats": 0}, "repeats=0"),
    ({"prompt_tokens": 250}, "250 prompt tokens and 9 new ones are more than the model's 256 positions"),
])
def test_what_cannot_be_measured(tiny_model, change, words):
    options = {"prompt_tokens": 4, "new_tokens": 8, "repeats": 1} | change
    with pytest.raises(PeftJaxError, match=words):
        latency({"base": (tiny_model[0].apply, tiny_model[1])}, tiny_model[0], **options)
