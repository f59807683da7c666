"""Checkpoints that transformers saved of models that bitsandbytes quantised, read bit for bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peft_jax import bind, chain, lora, quant, quantize, save_adapter
from peft_jax.core import tree
from peft_jax.errors import PeftJaxError
from peft_jax.hub.families.hf_names import hf_module
from peft_jax.hub.formats import bitsandbytes as bnb
from peft_jax.hub.load import families, load_pretrained
from peft_jax.hub.save import save_pretrained
from tests.properties import moved, trained

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")

SIZES = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4}
NESTED = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
MERGE = quantize()


def quantised(folder, plain, dtype=torch.float32, **settings):
    """Write what transformers makes of the model in ``plain``; returns it."""
    settings = {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype} | settings
    config = transformers.BitsAndBytesConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=dtype).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "plain"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def nested(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "nested"
    return folder, quantised(folder, plain, **NESTED)


def pairs(model, params, theirs):
    """(path, our entry of the stack, their module) of all quantised leaves; fails where those are not the same."""
    table, found = families.of(model.config).modules, []
    for path, leaf in tree.flatten(params).items():
        for i in range(leaf.stack[0]) if quant.is_leaf(leaf) else ():
            name = hf_module(table, path.rpartition("/")[0], i)
            found.append((path, jax.tree.map(lambda buffer, i=i: buffer[i], leaf), theirs.get_submodule(name)))
    kind = bitsandbytes.nn.Linear4bit
    assert len(found) == sum(isinstance(module, kind) for module in theirs.modules()) > 0
    return found


def assert_bits(ours, module):
    """Codes, scales and, of doubly quantised ones, their scales and mean."""
    state = module.weight.quant_state
    packed = module.weight.data.contiguous().view(torch.uint8)
    assert np.array_equal(ours.codes.reshape(-1), packed.numpy().reshape(-1))
    assert ours.scales.dtype == state.absmax.numpy().dtype
    assert np.array_equal(ours.scales.reshape(-1), state.absmax.numpy())
    assert (ours.quant_type, ours.block_size, ours.double_quant) == (state.quant_type, state.blocksize, state.nested)
    if state.nested:
        assert np.array_equal(ours.nested, state.state2.absmax.numpy()) and float(ours.mean) == state.offset.item()


def theirs_plain(module):
    return bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float().numpy().T


def assert_logits(model, params, theirs, tolerance, vocab=61):
    """Their inference rounds to bfloat16 on CPUs that have it, whatever the dtype; under gradients it does not."""
    ids = np.arange(18).reshape(2, 9) * 999 % vocab  # of a real model words: its first ids are for special purposes
    theirs.enable_input_require_grads()
    expected = theirs(torch.tensor(ids)).logits.detach().float().numpy()
    ours = np.asarray(jax.jit(bind(MERGE, model))({"params": params}, ids), np.float32)
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()
    return ours


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "dtype"), [
    (NESTED, "float32"), ({"bnb_4bit_quant_type": "fp4"}, "float32"),
    ({"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16}, "bfloat16"),
    ({**NESTED, "bnb_4bit_quant_type": "fp4", "llm_int8_skip_modules": ["down_proj", "lm_head"]}, "bfloat16"),
], ids=["nf4 nested", "fp4", "nf4 stored as bfloat16", "fp4 nested, modules left out"])
def test_leaves_are_theirs_to_the_bit_and_so_are_logits(plain, tmp_path, settings, dtype):
    theirs = quantised(tmp_path, plain, getattr(torch, dtype), **settings)
    model, params = load_pretrained(tmp_path, dtype)
    for path, ours, module in pairs(model, params, theirs):
        assert_bits(ours, module)
        assert np.array_equal(np.asarray(quant.dequantize(ours), np.float32), theirs_plain(module)), path
        assert ours.dtype == dtype
    assert_logits(model, params, theirs, 1e-5 if dtype == "float32" else 2**-6)  # bfloat16 has eight bits


def test_rows_that_blocks_do_not_divide(tmp_path):
    """Their own products of such rows are wrong on the CPU, so bytes are compared."""
    sizes = {**SIZES, "hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 2, "num_key_value_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "plain")
    theirs = quantised(tmp_path / "packed", tmp_path / "plain", **NESTED)
    model, params = load_pretrained(tmp_path / "packed")
    for _, ours, module in pairs(model, params, theirs):
        assert_bits(ours, module)


@pytest.mark.slow
def test_kernels_of_gpt2_lie_the_other_way_in_plain_files(tmp_path):
    config = transformers.GPT2Config(vocab_size=61, n_embd=64, n_layer=2, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "plain")
    theirs = quantised(tmp_path / "packed", tmp_path / "plain", bnb_4bit_quant_type="nf4")
    model, params = load_pretrained(tmp_path / "packed")
    for _, ours, module in pairs(model, params, theirs):
        assert_bits(ours, module)
    assert_logits(model, params, theirs, 1e-5)


@pytest.mark.slow
def test_qlora_begins_on_it_or_on_its_plain_values(nested):
    folder, _ = nested
    qlora = chain(quantize(double_quant=True), lora(r=2))
    _, params = load_pretrained(folder, method=qlora)
    base = qlora.init(jax.random.key(0), params)["layers"]["self_attn"]["q_proj"]
    assert base["kernel"] is params["layers"]["self_attn"]["q_proj"]["kernel"] and "lora_a" in base
    _, again = load_pretrained(folder, keep_quantised=False)
    expected = tree.flatten(MERGE.merge(params))
    for path, leaf in tree.flatten(again).items():
        assert not quant.is_leaf(leaf) and np.array_equal(leaf, expected[path])
    with pytest.raises(PeftJaxError, match=r"quantised already, with quant_type='nf4', .*keep_quantised=False"):
        load_pretrained(folder, method=quantize("fp4"))
    _, fp4 = load_pretrained(folder, method=quantize("fp4", target_modules=["up_proj"]), keep_quantised=False)
    assert fp4["layers"]["mlp"]["up_proj"]["kernel"].quant_type == "fp4"


def edited(folder, target, change, config=None):
    """A copy of a checkpoint with other tensors and other settings of its quantisation."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    given = json.loads((folder / "config.json").read_text())
    given["quantization_config"] |= config or {}
    (target / "config.json").write_text(json.dumps(given))
    return target


UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


def put(name, value):
    return lambda tensors: tensors.update({name: value})


def restate(**changes):
    def change(tensors):
        state = json.loads(tensors[STATE].tobytes()) | changes
        tensors[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    return change


@pytest.mark.slow
@pytest.mark.parametrize(("change", "config", "message"), [
    (put(f"{UP}.quant_map", np.arange(16, dtype=np.float32)), {}, "'model.layers.1.mlp.up_proj.weight' has another "
     "quant_map than bitsandbytes' for nf4"),
    (put(f"{UP}.nested_quant_map", np.zeros(256, np.float32)), {}, "has another nested_quant_map"),
    (put(f"{UP}.absmax", np.zeros(3, np.uint8)), {}, "has absmax of 3 uint8 instead of 128 uint8"),
    (put(UP, np.zeros((5, 1), np.uint8)), {}, "has codes of 5 uint8 instead of 4096 uint8"),
    (lambda tensors: tensors.pop(f"{UP}.absmax"), {}, "has no absmax: fetch"),
    (lambda tensors: tensors.pop(UP), {}, "has no codes: fetch"),
    (lambda tensors: tensors.pop(STATE), {}, "not the quant_state of that weight"),
    (put(STATE, np.frombuffer(b"\x80\x04}.", np.uint8)), {}, "holds no quant_state as bitsandbytes writes it"),
    (put(STATE, np.zeros(9, np.float32)), {}, "holds no quant_state as bitsandbytes writes it"),
    (restate(shape=[64, 128]), {}, r"up_proj.weight is \[64, 128\], the config says \[128, 64\]"),
    (restate(shape=[-128, -64]), {}, "only nf4 and fp4 matrices in blocks"),
    (restate(blocksize=48), {}, "says nf4 in blocks of 48"),
    (restate(blocksize=128), {}, "has absmax of 128 uint8 instead of 64 uint8"),
    (restate(nested_blocksize=128), {}, "scales in blocks of 128"),
    (restate(nested_offset=None), {}, "with the mean None"),
    (restate(nested_offset=1e39), {}, "with the mean 1e"),
    (put(f"{UP}.nested_absmax", np.full(1, np.nan, np.float32)), {}, "has NaN or infinite values in nested_absmax"),
    (put(STATE, np.frombuffer(b"[" * 100_000, np.uint8)), {}, "holds no quant_state as bitsandbytes writes it"),
    (lambda tensors: tensors.update(bnb.written(EMBEDDING, quant.quantize_array(np.ones((64, 61), np.float32)))), {},
     "'model.embed_tokens.weight' is the 'embed_tokens/embedding', and of what bitsandbytes quantised only kernels"),
    (restate(quant_type="fp4"), {}, "up_proj.weight.quant_state.bitsandbytes__nf4' says fp4, and config.json nf4"),
    (restate(), {"bnb_4bit_quant_type": "fp4"}, "says nf4, and config.json fp4"),
    (restate(), {"quant_method": "gptq"}, "is quantised by 'gptq', which is not read"),
    (restate(), {"load_in_8bit": True}, r"is quantised by LLM.int8\(\)"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_fit_or_is_not_read_is_named(nested, tmp_path, change, config, message):
    with pytest.raises(PeftJaxError, match=message):
        load_pretrained(edited(nested[0], tmp_path / "edited", change, config))


@pytest.mark.slow
def test_layers_of_one_stack_are_quantised_alike(plain, tmp_path):
    quantised(tmp_path, plain, llm_int8_skip_modules=["model.layers.1.mlp.up_proj"])
    with pytest.raises(PeftJaxError, match=r"'model.layers.1.mlp.up_proj.weight' is plain, .* \(fp4, blocks of 64"):
        load_pretrained(tmp_path)
    _, params = load_pretrained(tmp_path, keep_quantised=False, method=quantize())
    assert params["layers"]["mlp"]["up_proj"]["kernel"].stack == (2,)


def test_int8_checkpoints_of_theirs_are_refused(plain, tmp_path):
    quantised(tmp_path, plain, load_in_4bit=False, load_in_8bit=True)
    with pytest.raises(PeftJaxError, match=r"is quantised by LLM.int8\(\)"):
        load_pretrained(tmp_path)


@pytest.mark.real
def test_smollm2_as_bitsandbytes_quantises_it(smollm2, tmp_path):
    save_pretrained(tmp_path / "plain", *smollm2[:2])
    theirs = quantised(tmp_path / "packed", tmp_path / "plain", **NESTED)
    model, params = load_pretrained(tmp_path / "packed")
    for path, ours, module in pairs(model, params, theirs):
        assert_bits(ours, module)
        assert np.array_equal(quant.dequantize(ours, jnp.float32), theirs_plain(module)), path
    base = assert_logits(model, params, theirs, 1e-4, 49152)
    method = chain(quantize(double_quant=True), lora(r=4, target_modules="all-linear"))
    params, ids = moved(method, method.init(jax.random.key(0), params), by=0.01), np.arange(18).reshape(2, 9) * 999
    save_adapter(tmp_path / "adapter", method, model, params)
    ours = np.asarray(jax.jit(bind(method, model))({"params": params}, ids))
    expected = peft_logits(theirs, tmp_path / "adapter", ids)
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max() < 0.05 * np.abs(ours - base).max()


def peft_logits(theirs, folder, ids):
    import peft

    tuned = peft.PeftModel.from_pretrained(theirs, folder)
    tuned.enable_input_require_grads()  # see assert_logits
    return tuned(torch.tensor(ids)).logits.detach().float().numpy()


@pytest.mark.slow
def test_an_adapter_trained_on_a_quantised_base_is_peft_s_on_bitsandbytes(plain, nested, tmp_path):
    """The base quantised here, the adapter trained on it; there bitsandbytes' base of the same weights."""
    (folder, _), ids = nested, np.arange(18).reshape(2, 9) % 61
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    method = chain(quantize(double_quant=True), lora(r=4, target_modules="all-linear"))
    model, base = load_pretrained(plain, method=method)
    params = trained(method, model, method.init(jax.random.key(0), base), ids)
    save_adapter(tmp_path, method, model, params)
    ours = np.asarray(jax.jit(bind(method, model))({"params": params}, ids))
    expected = peft_logits(theirs, tmp_path, ids)
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
