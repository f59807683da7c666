"""Arguments that mean nothing, or not what was meant, are errors of one line."""

import jax
import pytest

from peft_jax import PeftJaxError, adalora, full, houlsby, ia3, loha, lokr, lora, oft, prompt, ptuning, trainable_tokens

WRONG = {
    "adalora pattern": lambda: adalora(rank_pattern={"layers.0.self_attn.q_proj.lora_E": 4}),
    "adalora steps": lambda: adalora(total_step="5"),
    "adalora tinit": lambda: adalora(tinit="2"),
    "full": lambda: full(5),
    "houlsby modules": lambda: houlsby(attention_modules=5),
    "houlsby saved": lambda: houlsby(modules_to_save=(3,)),
    "ia3 number": lambda: ia3(feedforward_modules=5),
    "ia3 regex": lambda: ia3(feedforward_modules="("),
    "layer": lambda: lora(layers_to_transform=True),
    "layers_pattern": lambda: lora(layers_to_transform=1, layers_pattern="("),
    "layers_patterns": lambda: lora(layers_to_transform=1, layers_pattern=("layers", "(")),
    "prompt": lambda: prompt(3, "TEXT", prompt_tuning_init_ids=5),
    "rank_pattern": lambda: lora(rank_pattern={"(": 1}),
    "rank_pattern key": lambda: lora(rank_pattern={5: 1}),
    "rslora": lambda: lora(use_rslora="False"),
    "packed": lambda: prompt(3, packed_texts="x"),
    "packed none": lambda: ptuning(3, packed_texts=0),
    "prompt of True": lambda: prompt(3, "TEXT", prompt_tuning_init_ids=[True]),
    "lokr": lambda: lokr(decompose_both="False"),
    "oft": lambda: oft(oft_block_size=4, coft="False"),
    "alpha": lambda: lora(lora_alpha=0),
    "loha alpha": lambda: loha(alpha=0),
    "tokens of True": lambda: trainable_tokens([True]),
    "tokens": lambda: trainable_tokens(5),
    "tokens none": lambda: trainable_tokens(None),
    "tokens of": lambda: trainable_tokens([5], 3),
}


@pytest.mark.parametrize("name", WRONG)
def test_values_of_the_wrong_type_are_errors_of_one_line(name):
    with pytest.raises(PeftJaxError) as error:
        WRONG[name]()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [lambda: adalora(deltaT=0), lambda: full(last_n_layers=0),
                                  lambda: houlsby(bottleneck_size=0)])
def test_what_is_no_rank_is_not_called_one(make):
    with pytest.raises(PeftJaxError, match=r"=0: give a whole number of at least 1\."):
        make()


MISSED = [
    (ia3(feedforward_modules="down_proj"), r"'down_proj', which matches none of the adapted.*did you mean down_proj"),
    (ia3(feedforward_modules=("dwn_proj",)), r"'dwn_proj', which matches none of the adapted.*did you mean down_proj"),
    (ia3(("k_proj",), ("down_proj", "up_proj")), "'down_proj', which matches none"),
    (lora(layers_to_transform=(0, -1)), "layers_to_transform has -1, which is no layer.*from 0 to 1"),
    (lora(layers_to_transform=2), "layers_to_transform has 2, which is no layer.*from 0 to 1"),
    (houlsby(leave_out=2), "leave_out has 2, which is no layer.*from 0 to 1"),
    (lora(layers_to_transform=1, layers_pattern="blocks"), "no numbers behind layers_pattern='blocks'"),
]


@pytest.mark.parametrize(("method", "said"), MISSED)
def test_names_and_layers_that_the_model_lacks_are_errors(tiny_model, method, said):
    with pytest.raises(PeftJaxError, match=said):
        jax.eval_shape(lambda params: method.init(jax.random.key(0), params), tiny_model[1])


def test_a_default_need_not_match(tiny_model):
    jax.eval_shape(lambda params: ia3(("k_proj",)).init(jax.random.key(0), params), tiny_model[1])
