import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from peft_jax import PeftJaxError
from peft_jax.core import kernel_axes, targeting
from peft_jax.core.kernel_axes import KernelAxes

NAME = "layers.3.self_attn.q_proj"


@pytest.mark.parametrize(("patterns", "meant"), [
    (("q_proj",), True), (("self_attn.q_proj",), True), ((NAME,), True), (("model." + NAME,), True), (("proj",), False),
    (("attn.q_proj",), False), ((), False), (None, False), ("q_proj", False), (r".*q_proj", True),
    (r"model\.layers\.\d+\..*\.(q|v)_proj", True), (r"layers\.[012]\..*", False),
])  # fmt: skip
def test_names_by_list_and_by_regex(patterns, meant):
    assert targeting.listed(patterns, NAME) == meant


def test_a_name_with_pefts_prefix_is_taken_as_it_is():
    assert targeting.listed(r"layers\.3\..*", NAME)
    assert not targeting.listed(r"layers\.3\..*", "model." + NAME)


def test_numbered_flax_names_are_known_by_pefts_too():
    assert targeting.listed(("layers.3.q_proj",), "encoder.layers_3.q_proj")
    assert targeting.listed(("layers_3.q_proj",), "encoder.layers_3.q_proj")


@pytest.mark.parametrize(("name", "pattern", "index"), [
    (NAME, None, 3), (NAME, "layers", 3), (NAME, ("h", "layers"), 3), (NAME, "h", None), ("lm_head", None, None),
    ("model.layers.1.experts.7.up", None, 1), ("encoder_2.block_5.up", "block", 5),
])  # fmt: skip
def test_the_layer_number_of_a_name(name, pattern, index):
    assert targeting.layer_index(name, pattern) == index


def test_the_first_matching_pattern_gives_the_value():
    patterns = {"layers.3.self_attn.q_proj": 1, "q_proj": 2, ".*": 3}
    assert [targeting.pattern_value(patterns, name, 0) for name in (NAME, "layers.13.q_proj", "up")] == [1, 2, 3]
    assert targeting.pattern_value({"proj": 1}, NAME, 0) == 0
    assert targeting.pattern_value(None, NAME, 8) == 8


@pytest.mark.parametrize(("modules", "name", "saved", "within"), [
    (("mlp",), "layers.mlp.up_proj", True, True), (("norm",), "layers.input_layernorm", True, False),
    (("lm_head",), "lm_head", True, True), (("model.norm",), "norm", True, True), (("head",), "lm_head", True, False),
    (("mlp.up_proj",), "layers.mlp.down_proj", False, False), ((), "lm_head", False, False),
    (None, "norm", False, False),
])  # fmt: skip
def test_modules_to_save_train_by_ending_and_exclude_by_name(modules, name, saved, within):
    """peft's two rules: its wrapper compares the ends of names as text, its adapters skip whole names."""
    assert (targeting.saved(modules, name), targeting.within(modules, name)) == (saved, within)


def test_names_of_stacked_modules():
    assert targeting.module_names("layers/mlp/up", (2,)) == ("layers.0.mlp.up", "layers.1.mlp.up")
    assert targeting.module_names("ScanBlock_0/up", (2,)) == ("ScanBlock_0.0.up", "ScanBlock_0.1.up")
    assert targeting.module_names("stages/h/up", (1, 2)) == ("stages.h.0.0.up", "stages.h.0.1.up")
    assert targeting.module_names("lm_head", ()) == ("lm_head",)


PARAMS = {
    "layers": {"attn": {"q": {"kernel": jnp.ones((2, 4, 4))}, "v": {"kernel": jnp.ones((2, 4, 4))}},
               "conv": {"kernel": jnp.ones((2, 3, 3, 4, 4))}},
    "lm_head": {"kernel": jnp.ones((4, 9))},
}  # fmt: skip
NONE = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "modules_to_save": None}


def find(target_modules, **changes):
    return [t.path for t in targeting.find(PARAMS, None, {"target_modules": target_modules, **NONE, **changes})]


def test_find_takes_a_stack_when_any_layer_is_meant():
    assert find(["q"]) == ["layers/attn/q"]
    assert find(["q", "v"], layers_to_transform=1, exclude_modules=["layers.1.attn.v"]) == ["layers/attn/q"]
    assert find("all-linear", exclude_modules=["conv"]) == ["layers/attn/q", "layers/attn/v"]
    assert find(["q", "lm_head"]) == ["layers/attn/q", "lm_head"]
    assert find(["q", "v"], modules_to_save=("v",)) == ["layers/attn/q"]


@pytest.mark.parametrize(("call", "message"), [
    (lambda: find(["q", "vv"]), "target_modules has 'vv', which matches no kernel of this model"),
    (lambda: find(["lm_hea"]), r"did you mean lm_head\?"),
    (lambda: find(["q"], layers_to_transform=(5,)), "layers_to_transform has 5, which is no layer.*from 0 to"),
    (lambda: find(["q", "conv"]), "'layers/conv' is a kernel of 5 axes"),
    (lambda: find("q"), r"has 'q', which matches no kernel.*a string is a regex.*give the list \('q',\)"),
    (lambda: find("attn.q"), r"a string is a regex.*give the list \('attn.q',\)"),
    (lambda: find("lm_hea"), r"a string is a regex for whole names, as in peft; did you mean lm_head\?"),
    (lambda: find("layers/attn/q"), "a string is a regex for whole names, as in peft; choose one of"),
])  # fmt: skip
def test_patterns_that_cannot_be_met_are_errors(call, message):
    with pytest.raises(PeftJaxError, match=message):
        call()


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.DenseGeneral((2, 4), axis=-1, name="inner")(x).reshape(*x.shape), None


def stack_of(axis):
    return nn.scan(Body, variable_axes={"params": axis}, split_rngs={"params": True}, length=3)


class Layouts(nn.Module):
    """One of each kernel layout."""

    @nn.compact
    def __call__(self, x, everything):
        heads = nn.DenseGeneral((2, 3), name="heads")(x)
        out = nn.DenseGeneral(5, axis=(-2, -1), name="out")(heads)
        image = nn.Conv(4, (3,), name="conv")(x)
        stacked, _ = stack_of(0)(name="layers")(x, None)
        if everything:
            nn.Dense(2, name="uncalled")(x)
        return out.sum() + image.sum() + stacked.sum()


def test_axes_are_read_off_a_traced_pass():
    model, x = Layouts(), jnp.ones((1, 6, 8))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), x, True))["params"]
    axes = kernel_axes.kernel_axes(model, params, x, False)
    assert axes == {
        "heads/kernel": KernelAxes("DenseGeneral", (), (8,), (2, 3)),
        "out/kernel": KernelAxes("DenseGeneral", (), (2, 3), (5,)),
        "conv/kernel": KernelAxes("Conv", (), (), (3, 8, 4)),
        "layers/inner/kernel": KernelAxes("DenseGeneral", (3,), (8,), (2, 4)),
    }


class Wide(nn.Conv):
    """A convolution of another name."""


class Towers(nn.Module):
    """Two convolutions and a Dense; ``text`` is called only when asked for."""

    @nn.compact
    def __call__(self, x, text=True):
        x = nn.ConvTranspose(4, (3,), name="patches")(Wide(4, (3,), name="wide")(x))
        if text:
            nn.Dense(3, name="text")(x)
        return nn.Dense(2, name="image")(x)


def test_all_linear_leaves_convolutions_out():
    model, x = Towers(), jnp.ones((1, 6, 8))
    params = model.init(jax.random.key(0), x)["params"]
    axes = kernel_axes.kernel_axes(model, params, x)
    assert [t.path for t in targeting.find(params, axes, {"target_modules": "all-linear", **NONE})] == ["text", "image"]
    with pytest.raises(PeftJaxError, match=r"'wide' is a Wide \(convolution\) of unknown input"):
        targeting.find(params, axes, {"target_modules": ("wide", "text"), **NONE})


def test_a_module_that_is_not_called_is_an_error():
    model, x = Towers(), jnp.ones((1, 6, 8))
    params = model.init(jax.random.key(0), x)["params"]
    axes = kernel_axes.kernel_axes(model, params, x, text=False)
    for target_modules in ("all-linear", ("image", "text")):
        with pytest.raises(PeftJaxError, match="'text' is a module that the traced pass never called: exclude"):
            targeting.find(params, axes, {"target_modules": target_modules, **NONE})
    chosen = targeting.find(params, axes, {"target_modules": "all-linear", **NONE, "exclude_modules": ("text",)})
    assert [target.path for target in chosen] == ["image"]


def test_a_leaf_that_is_no_stack_of_its_kernel_is_an_error():
    stack, x = stack_of(1)(), jnp.ones((1, 6, 8))
    params = jax.eval_shape(stack.init, jax.random.key(0), x, None)["params"]
    with pytest.raises(PeftJaxError, match=r"'inner/kernel' is .* only stacks in front are understood"):
        kernel_axes.kernel_axes(stack, params, x, None)


@pytest.mark.parametrize("formula, count", [
    ("btd,dnh->bnth", 1), ("...nh,nhd->...d", 2), ("b t d, d h -> b t h", 1), ("btd,dh->bh", 0), ("bdd,dh->bh", 0),
    ("btd,dhh->bth", 0), ("btd,hd->bth", 0), ("btd,tdh->bth", 0), ("...d,dh->h", 0), ("b...d,dh->b...h", 0)])
def test_a_formula_is_a_product_with_the_kernel_s_inputs_in_front_or_of_unknown_axes(formula, count):
    assert kernel_axes.input_count(nn.Einsum((2, 3), formula)) == count


def test_a_module_contracts_the_axes_of_its_input_in_their_order():
    assert kernel_axes.input_axes(nn.DenseGeneral(4, axis=(-1, -3)), 4) == (1, 3)
