"""Arguments that are swapped, or of another kind, are errors of one line that say what to give."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import peft_jax
from peft_jax import PeftJaxError
from peft_jax.models import CausalLM, LlamaConfig

CONFIG = LlamaConfig(32, 16, 16, 1, 2, 2, 8, 1e-5, 1e4, 64, True)
MODEL = CausalLM(CONFIG)
METHOD = peft_jax.lora(r=2, target_modules=("q_proj",))
TX = optax.sgd(0.1)


@pytest.fixture(scope="module")
def things():
    """What each argument's name stands for in the calls below."""
    base = MODEL.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = METHOD.init(jax.random.key(1), base)
    mixed_method, mixed = peft_jax.mix_adapters({"one": (METHOD, params)}, base)
    prefix = peft_jax.prefix(num_virtual_tokens=2)
    ids = np.ones((1, 4), np.int32)
    return {
        "method": METHOD, "model": MODEL, "params": params, "base": base, "base_params": base, "mesh":
        peft_jax.make_mesh(1, 1, 1), "labels": METHOD.labels(params), "tx": TX, "optimizer": TX,
        "apply": peft_jax.bind(METHOD, MODEL), "loss": lambda params: params["norm"]["scale"].sum(),
        "forward": lambda params: MODEL.apply({"params": params}, ids), "rng": jax.random.key(0), "folder": "out",
        "source": "no/such", "trainable": peft_jax.partition(params, METHOD)[0], "inputs": ids, "input_ids": ids,
        "attention_mask": ids, "adapters": {"one": (METHOD, params)}, "pairs": [(METHOD, params)], "weights": [1.0],
        "names": "one", "mixed_method": mixed_method, "mixed": mixed, "prefix": prefix,
        "prefixed": prefix.init(jax.random.key(1), base), "two_ids": np.ones(2, np.int32), "config": CONFIG,
        "memory": 10**9, "quantised": peft_jax.quantize("int8").init(None, base), "array": jnp.ones((64, 2)),
        "quant_type": "nf4", "precision": "bf16", "count": 1000, "dtype": "float32", "whole": 8, "chunk": 8,
    }  # fmt: skip


# {public function: (its first arguments in order, by name or by what stands for one above; keywords that it needs)}
CALLS = {
    "bind": "method model mesh",
    "check_read": "method forward params",
    "chain": "method params",
    "generate": "apply model params input_ids attention_mask",
    "init_state": "trainable tx rng",
    "kernel_axes": "model params inputs",
    "load_adapter": "source base_params",
    "load_pretrained": "source dtype",
    "make_step": "apply tx chunk",
    "mix_adapters": "adapters base_params",
    "partition": "params labels",
    "place": "method model params mesh",
    "plan": "method model optimizer",
    "prefix_from_ids": "prefix model prefixed two_ids",
    "quantize_array": "array quant_type",
    "recommend": "config memory",
    "requantize": "base quantised",
    "rule_of_thumb": "count precision",
    "save_adapter": "folder method model params",
    "save_pretrained": "folder model base",
    "shardings": "method model params mesh",
    "state_shardings": "trainable tx mesh",
    "use_adapters": "mixed_method mixed names",
    "weighted_adapter": "pairs weights base_params",
}
# Of one argument, or of several of one kind; quantize, lora and the other methods take peft's words, by name.
ALONE = {"Head", "KernelAxes", "Method", "METHODS", "PeftJaxError", "QuantizedArray", "Sampling", "TrainState",
         "combine", "count", "dequantize", "flatten", "load_config", "load_tokenizer", "make_mesh", "nbytes",
         "suggest_hardware", "unflatten", "untie", "value_and_grad"}
KEYWORDS = {"generate": {"max_new_tokens": 1, "stop_ids": (0,)}, "make_step": {}}
SWAPS = [(name, i, j) for name, order in CALLS.items() for i, j in itertools.combinations(range(len(order.split())), 2)
         if (name, i, j) != ("generate", 3, 4)]  # both are int (batch, seq)


def test_every_public_function_is_here():
    assert CALLS.keys() | ALONE | set(peft_jax.METHODS) == set(peft_jax.__all__)


@pytest.mark.slow
@pytest.mark.parametrize("name, i, j", SWAPS)
def test_swapped_arguments_are_an_error_that_says_what_to_give(name, i, j, things, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [things[word] for word in CALLS[name].split()]
    arguments[i], arguments[j] = arguments[j], arguments[i]
    with pytest.raises(PeftJaxError) as error:
        getattr(peft_jax, name)(*arguments, **KEYWORDS.get(name, {}))
    message = str(error.value)
    assert "\n" not in message and any(word in message for word in ("give", "choose", "use ", "did you mean")), message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name, order in CALLS.items() if {"method", "model", "params"} & set(
    order.split())])
def test_methods_come_before_models_and_models_before_parameters(name):
    order = [word for word in inspect.signature(getattr(peft_jax, name)).parameters
             if word in ("folder", "method", "model", "params", "mesh")]
    assert order == sorted(order, key=("folder", "method", "model", "params", "mesh").index)


@pytest.mark.parametrize("name, value", [
    ("combine", METHOD), ("count", METHOD), ("dequantize", METHOD), ("flatten", MODEL), ("load_config", METHOD),
    ("load_tokenizer", MODEL), ("nbytes", METHOD), ("suggest_hardware", METHOD), ("unflatten", METHOD),
    ("untie", METHOD), ("value_and_grad", MODEL), ("make_mesh", METHOD)])  # fmt: skip
def test_one_argument_of_another_kind_is_an_error_that_says_what_to_give(name, value):
    with pytest.raises(PeftJaxError, match="give") as error:
        getattr(peft_jax, name)(value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call", [
    lambda base, params: peft_jax.bind(METHOD, MODEL)({"params": base}, jnp.zeros((1, 4), jnp.int32)),
    lambda base, params: peft_jax.partition(base, METHOD),
    lambda base, params: peft_jax.place(METHOD, MODEL, base, peft_jax.make_mesh(1, 1, 1)),
    lambda base, params: peft_jax.shardings(METHOD, MODEL, base, peft_jax.make_mesh(1, 1, 1)),
    lambda base, params: peft_jax.save_adapter("out", METHOD, MODEL, base),
    lambda base, params: peft_jax.check_read(METHOD, lambda params: params["norm"]["scale"], base),
    lambda base, params: METHOD.merge(base),
    lambda base, params: peft_jax.chain(METHOD, peft_jax.ia3()).merge(params),
    lambda base, params: peft_jax.partition(params, peft_jax.chain(METHOD, peft_jax.ia3())),
])  # fmt: skip
def test_a_tree_without_the_methods_leaves_is_an_error(call, things):
    with pytest.raises(PeftJaxError, match=r"hold none of .*'s leaves .*method.init\(rng, params\)"):
        call(things["base"], things["params"])


@pytest.mark.parametrize("call, words", [
    (lambda p: peft_jax.partition({"params": p}, METHOD), "params is a tree with 'params' inside: give the whole"),
    (lambda p: peft_jax.partition(p, p), "labels is a parameter tree: give method.labels(params), or the method"),
    (lambda p: peft_jax.partition(METHOD.labels(p), p), "params is labels"),
    (lambda p: peft_jax.bind(METHOD, MODEL)(p, jnp.zeros((1, 4), jnp.int32)), "give {'params': params} first"),
    (lambda p: peft_jax.bind(METHOD, MODEL)(jnp.zeros((1, 4)), p), "give {'params': params} first"),
    (lambda p: peft_jax.bind(peft_jax.lora, MODEL), "method is of type function: give a method, such as"),
    (lambda p: peft_jax.bind(METHOD, CausalLM), "model is the class CausalLM: give the model itself"),
    (lambda p: peft_jax.value_and_grad(lambda q: 0.0)(jnp.ones(3)), "params is of type ArrayImpl"),
    (lambda p: peft_jax.save_adapter("out", METHOD, p, MODEL),
     "save_adapter: model is a parameter tree: give the model itself, such as load_pretrained gives. The order is "
     "save_adapter(folder, method, model, params)."),
    (lambda p: peft_jax.plan(MODEL, METHOD, TX), "The order is plan(method, model, optimizer"),
    (lambda p: peft_jax.place(METHOD, Plain(), p, peft_jax.make_mesh(1, 1, 1)), "has no rules: give its class a field"),
    (lambda p: peft_jax.save_pretrained("out", Plain(), p), "is no model of peft_jax.models"),
])  # fmt: skip
def test_messages_say_what_was_given_and_what_to_give(call, words, things):
    with pytest.raises(PeftJaxError) as error:
        call(things["params"])
    assert words in str(error.value)


@pytest.mark.parametrize("name", peft_jax.METHODS)
def test_a_methods_own_functions_say_that_they_want_a_tree(name):
    """In a loop: ``method.labels`` goes to optax, which may call it with anything."""
    method = peft_jax.METHODS[name](**({"token_indices": (1,)} if name == "trainable_tokens" else {}))
    base = {"up": {"kernel": jnp.ones((4, 4))}}
    calls = (lambda: method.labels(MODEL), lambda: method.init(base, jax.random.key(0)))
    for call in calls + ((lambda: method.merge(MODEL),) if method.mergeable else ()):
        with pytest.raises(PeftJaxError, match=r"the tree is a (model|random key): give nested dicts of arrays"):
            call()


@pytest.mark.parametrize("method", [METHOD, peft_jax.full(), peft_jax.quantize(target_modules=("q_proj",))])
def test_a_leaf_that_is_no_array_is_an_error_that_names_it(method):
    boxed = {"q_proj": {"kernel": nn.Partitioned(jnp.ones((4, 4)), names=(None, None))}}
    with pytest.raises(PeftJaxError, match=r"'q_proj/kernel' is of type Partitioned: give arrays: params = .*unbox"):
        method.init(jax.random.key(0), boxed)
    with pytest.raises(PeftJaxError, match=r"'q_proj/kernel' is of type list: give arrays\.$"):
        method.init(jax.random.key(0), {"q_proj": {"kernel": [[1.0]]}})
    with pytest.raises(PeftJaxError, match="'q_proj/kernel' is of type Partitioned"):
        peft_jax.kernel_axes(nn.Dense(4), boxed, jnp.ones((1, 4)))


def test_a_method_in_a_message_is_short():
    with pytest.raises(PeftJaxError, match=r"^r=Method\(QUANTIZE \+ LORA\): a rank is a whole number of at least 1.$"):
        peft_jax.lora(peft_jax.chain(peft_jax.quantize("int8"), METHOD))


def test_kernels_of_unknown_axes_are_told_apart():
    """One of three axes may be a stack, where no axes were passed; where they were, passing them is no advice."""
    params = {"conv": {"kernel": jnp.ones((3, 4, 5))}}
    method, axes = peft_jax.lora(r=2, target_modules=("conv",)), "pass axes=peft_jax.kernel_axes"
    with pytest.raises(PeftJaxError, match=f"'conv/kernel' of three axes was read as a stack of layers: {axes}"):
        method.init(jax.random.key(0), params)
    with pytest.raises(PeftJaxError, match=f"a kernel of 4 axes of unknown .*: exclude it, or {axes}"):
        method.init(jax.random.key(0), {"conv": {"kernel": jnp.ones((3, 3, 4, 5))}})
    layouts = peft_jax.kernel_axes(Convolution(), params, jnp.ones((1, 7, 4)))
    with pytest.raises(PeftJaxError, match=r"'conv' is a Conv of unknown input and output axes: exclude it\.$"):
        method.init(jax.random.key(0), params, layouts)


class Convolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(5, (3,), use_bias=False, name="conv")(x)


class Plain:
    """A model of somebody else: all that is asked of it here is that it has an ``apply``."""

    def apply(self, variables):
        return variables


def test_partition_takes_the_method_or_its_labels(things):
    params = things["params"]
    for one, other in zip(peft_jax.partition(params, METHOD), peft_jax.partition(params, METHOD.labels(params))):
        assert peft_jax.flatten(one).keys() == peft_jax.flatten(other).keys()
    assert list(peft_jax.flatten(peft_jax.partition(params, METHOD)[0])) == [
        "layers/self_attn/q_proj/lora_a", "layers/self_attn/q_proj/lora_b"]
