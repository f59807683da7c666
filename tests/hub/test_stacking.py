"""Weights are quantised while they are read, one at a time, to the leaves that the method's init makes."""

import shutil
import tracemalloc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peft_jax import chain, load_pretrained, lora, make_mesh, quant, quantize, save_pretrained
from peft_jax.core import tree
from peft_jax.errors import PeftJaxError
from peft_jax.hub.families.gpt2 import FAMILY as GPT2
from peft_jax.hub.formats import safetensors_files
from peft_jax.hub.model_config import param_shapes
from peft_jax.hub.stacking import finite
from peft_jax.models.heads import Head
from peft_jax.models.llama import CausalLM, LlamaConfig
from peft_jax.parallel import partitioning
from tests.conftest import REAL

WIDE = LlamaConfig(
    vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, head_dim=16, rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=64,
    tie_word_embeddings=False,
)  # fmt: skip
DEEP = LlamaConfig(**{**vars(WIDE), "hidden_size": 256, "intermediate_size": 512, "head_dim": 64,
                      "num_hidden_layers": 12, "tie_word_embeddings": True})


def saved(folder, config=WIDE, model=CausalLM, dtype=jnp.float32):
    """The folder of a random model."""
    rng = np.random.default_rng(0)
    flat = {path: jnp.asarray(rng.normal(size=shape), dtype) for path, shape in param_shapes(config).items()}
    save_pretrained(folder, model(config), tree.unflatten(flat))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "wide")


def assert_same(left, right):
    """Buffer by buffer, dtypes and what is said of quantised leaves too."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "dtype"), [
    ({"double_quant": True}, "float32"),
    ({"quant_type": "fp4", "exclude_modules": ["down_proj"]}, "bfloat16"),
    ({"quant_type": "int4_affine", "block_size": 32, "target_modules": ["q_proj", "embed_tokens"]}, "float32"),
    ({"quant_type": "int8", "block_size": None, "target_modules": ["down_proj", "lm_head"]}, "float16"),
], ids=str)
def test_loaded_leaves_are_those_that_init_makes(folder, arguments, dtype):
    method = quantize(**arguments)
    model, loaded = load_pretrained(folder, dtype, method=method)
    plain_model, plain = load_pretrained(folder, dtype)
    assert model == plain_model
    expected = method.init(jax.random.key(0), plain)
    assert any(map(quant.is_leaf, tree.flatten(loaded).values()))
    assert_same(loaded, expected)
    assert_same(method.init(jax.random.key(0), loaded), expected)


@pytest.mark.slow
def test_of_a_chain_the_first_method_counts(folder):
    plain = load_pretrained(folder)[1]
    qlora = chain(quantize(double_quant=True), lora(r=2))
    loaded = load_pretrained(folder, method=qlora)[1]
    assert_same(qlora.init(jax.random.key(1), loaded), qlora.init(jax.random.key(1), plain))
    pissa = chain(lora(r=2, init_lora_weights="pissa"), quantize())
    for method in (lora(r=2), pissa):
        assert_same(load_pretrained(folder, method=method)[1], plain)


@pytest.mark.slow
def test_a_new_head_is_converted_as_init_would(tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(vocab_size=31, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=32)).save_pretrained(tmp_path)
    method = quantize(target_modules=["classifier"], block_size=32)
    head = {"head": Head("SEQ_CLS", num_labels=3), "rng": jax.random.key(3)}
    loaded = load_pretrained(tmp_path, method=method, **head)[1]
    assert_same(loaded, method.init(jax.random.key(0), load_pretrained(tmp_path, **head)[1]))


@pytest.mark.slow
def test_kernels_of_gpt2_lie_the_other_way_in_the_file(tmp_path):
    config = GPT2.read("gpt2", {"model_type": "gpt2", "vocab_size": 31, "n_embd": 32, "n_layer": 2, "n_head": 2,
                                "n_positions": 32})
    saved(tmp_path, config, lambda config: GPT2.model(config))
    method = quantize(block_size=32, target_modules=["c_attn"])
    assert_same(load_pretrained(tmp_path, method=method)[1],
                method.init(jax.random.key(0), load_pretrained(tmp_path)[1]))


@pytest.mark.slow
def test_no_more_than_one_tensor_is_plain_at_a_time(tmp_path, monkeypatch):
    """Arrays that were read die before the next is read, and no float array of jax's outlives its conversion."""
    saved(tmp_path, DEEP, dtype=jnp.bfloat16)
    alive, counts, floats, read = [], [], [], safetensors_files.Tensor.read
    before = {id(array) for array in jax.live_arrays()}

    def watched(tensor):
        counts.append(sum(one() is not None for one in alive))
        floats.append(sum(array.nbytes for array in jax.live_arrays()
                          if id(array) not in before and array.dtype == jnp.float32 and array.ndim < 3))
        value = read(tensor)
        alive.append(weakref.ref(value))
        return value

    monkeypatch.setattr(safetensors_files.Tensor, "read", watched)
    load_pretrained(tmp_path, method=quantize())  # jax's own memory, for programs, is taken here
    counts.clear()
    tracemalloc.start()
    params = load_pretrained(tmp_path, method=quantize())[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = 4 * DEEP.hidden_size * DEEP.intermediate_size
    plain = 4 * sum(leaf.size for leaf in tree.flatten(params).values())
    assert len(counts) == 12 * 9 + 2 and max(counts) == 0
    # what is left of float32 arrays of jax's own are constants, no weights
    assert max(floats) < largest / 4
    # as read (2 bytes a value), cast, and handed over to jax; all leaves in float32 would not fit in
    assert tree.nbytes(params) < peak < tree.nbytes(params) + 4 * largest < plain / 4


@pytest.mark.parametrize(("method", "message"), [
    (quantize(target_modules=["up_prj"]), "target_modules has 'up_prj', which matches no kernel"),
    (quantize(exclude_modules=["layers.1.mlp.up_proj"]), "is one leaf for 3 layers, .* 'layers.1.mlp.up_proj'"),
    ("nf4", r"method is a str: give a method, quantize\(\"nf4\"\)"),
])
def test_bad_methods_are_named_before_anything_is_read(folder, monkeypatch, method, message):
    monkeypatch.setattr(safetensors_files.Tensor, "read", lambda tensor: pytest.fail("a tensor was read"))
    with pytest.raises(PeftJaxError, match=message):
        load_pretrained(folder, method=method)


@pytest.mark.slow
def test_what_stands_on_quantised_leaves_is_merged_before_it_is_saved(folder, tmp_path):
    qlora = chain(quantize(), lora(r=2))
    model, params = load_pretrained(folder, method=qlora)
    params = qlora.init(jax.random.key(0), params)
    with pytest.raises(PeftJaxError, match=r"lora_a' \(of \d+ such leaves\) is no plain weight of the model: merge"):
        save_pretrained(tmp_path / "model", model, params)
    assert list(tmp_path.iterdir()) == []
    save_pretrained(tmp_path / "model", model, qlora.merge(params))
    assert_same(load_pretrained(tmp_path / "model")[1], qlora.merge(params))


@pytest.mark.real
def test_smollm2_is_quantised_to_the_same_bits(smollm2):
    method = quantize(double_quant=True)
    assert_same(load_pretrained(REAL, method=method)[1], method.init(jax.random.key(0), smollm2[1]))


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, quantize("nf4", block_size=32, double_quant=True)], ids=["plain", "nf4"])
def test_weights_go_from_the_file_to_the_devices_that_hold_them(tmp_path, method):
    """The same values as on one device; of a kernel or an embedding each device has a quarter (fsdp 2 x tensor 2)."""
    folder = saved(tmp_path / "even", LlamaConfig(**{**vars(WIDE), "vocab_size": 64, "intermediate_size": 128}))
    whole, spread = (tree.flatten(load_pretrained(folder, method=method, mesh=mesh)[1])
                     for mesh in (None, make_mesh(2, 2, 2)))
    lies = tree.flatten(partitioning.by_rules(tree.unflatten(whole), make_mesh(2, 2, 2), CausalLM.sharding))
    cut = 0
    for path, leaf in whole.items():
        parts = zip(*(jax.tree.leaves(one[path]) for one in (whole, spread, lies)), strict=True)
        for there, here, where in parts:
            np.testing.assert_array_equal(np.asarray(here), np.asarray(there), err_msg=path)
            assert here.dtype == there.dtype and here.sharding == where
        if path.endswith(("kernel", "embedding")):
            codes = spread[path].codes if quant.is_leaf(leaf) else spread[path]
            cut += 1
            assert {shard.data.size for shard in codes.addressable_shards} == {codes.size // 4}
    assert cut == 9


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn"])
def test_what_is_no_number_is_seen_in_every_type(dtype):
    array = np.linspace(-3, 3, 3001).astype(dtype)
    assert finite(array) and finite(array[:0]) and finite(array.reshape(-1, 1).T[:, ::2])
    for odd in (np.nan, -np.nan, np.inf, -np.inf)[:2 if dtype.startswith("float8") else 4]:
        for place in (0, 1500, 3000):
            broken = array.copy()
            broken[place] = odd
            assert not finite(broken), (odd, place)
    assert finite(np.array([jnp.finfo(dtype).max, jnp.finfo(dtype).min, jnp.finfo(dtype).tiny], dtype))


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, quantize(block_size=32)], ids=["plain", "quantised"])
@pytest.mark.parametrize("odd, dtype, words", [
    (np.nan, "float32", "holds NaN or infinity: the file is damaged"),
    (-np.inf, "bfloat16", "holds NaN or infinity: the file is damaged"),
    (1e5, "float16", "holds numbers beyond float16, which would be infinity: load it in bfloat16 or float32"),
])  # fmt: skip
def test_weights_that_are_no_numbers_are_named_with_their_tensor(folder, tmp_path, method, odd, dtype, words):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name][3, 5] = odd
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PeftJaxError, match=f"the tensor '{name}' {words}"):
        load_pretrained(tmp_path, dtype, method=method)
