"""Blocks of a .gguf file as quantised leaves: what they stand for is what the ``gguf`` package dequantises."""

import jax
import numpy as np
import pytest

from peft_jax import bind, load_pretrained, nbytes, quant, quantize
from peft_jax.core import tree
from peft_jax.errors import PeftJaxError
from peft_jax.hub import download
from peft_jax.hub.formats import gguf, gguf_blocks
from tests.conftest import REAL
from tests.hub.formats.test_gguf import D, F, write_gguf

CODECS = {"Q4_0": "int4", "Q4_1": "int4_affine", "Q8_0": "int8"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(folder, kinds):
    write_gguf(folder / "tiny.gguf", kinds=kinds)
    return folder / "tiny.gguf"


def assert_equal(kept, plain):
    """Leaf by leaf; quantised ones by what they stand for, to the bit."""
    for path, leaf in tree.flatten(plain).items():
        assert np.array_equal(quant.plain(kept[path]), leaf) and kept[path].dtype == leaf.dtype, path


@pytest.mark.slow
@pytest.mark.parametrize("kind", CODECS)
def test_kept_blocks_stand_for_what_gguf_dequantises(tmp_path, cache, kind):
    file = written(tmp_path, lambda name: kind)
    model, params = load_pretrained(file, keep_quantised=True)
    assert not (cache / "converted").exists() or not list((cache / "converted").iterdir())  # no floats on the disk
    kept = tree.flatten(params)
    matrices = [path for path, leaf in kept.items() if quant.is_leaf(leaf)]
    assert sorted(matrices) == sorted(path for path in kept if path.endswith(("/kernel", "/embedding")))
    bits = {"Q4_0": 4.5, "Q4_1": 5, "Q8_0": 8.5}[kind]
    for path in matrices:
        assert (kept[path].quant_type, kept[path].block_size) == (CODECS[kind], 32)
        assert kept[path].scales.dtype == np.float16 and kept[path].nbytes * 8 == bits * kept[path].size
    plain_model, plain = load_pretrained(file)
    assert_equal(kept, plain)
    ids = np.arange(12).reshape(2, 6)
    run = jax.jit(bind(quantize(), model))
    ours, expected = run({"params": params}, ids), jax.jit(plain_model.apply)({"params": plain}, ids)
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()
    half = tree.flatten(load_pretrained(file, "bfloat16", keep_quantised=True)[1])
    assert_equal(half, load_pretrained(file, "bfloat16")[1])


def test_of_a_mixed_file_other_types_become_plain_or_what_the_method_says(tmp_path):
    types = {"attn_q": "F16", "ffn_up": "Q5_0", "token_embd": "F16"}
    file = written(tmp_path, lambda name: types.get(name.split(".")[-2], "Q4_0"))
    kept, plain = tree.flatten(load_pretrained(file, keep_quantised=True)[1]), load_pretrained(file)[1]
    odd = {"embed_tokens/embedding", "layers/self_attn/q_proj/kernel", "layers/mlp/up_proj/kernel"}
    assert {path for path in kept if path.endswith(("kernel", "embedding")) and not quant.is_leaf(kept[path])} == odd
    assert_equal(kept, plain)
    method = quantize("int4", block_size=32)
    both, made = (tree.flatten(p) for p in (load_pretrained(file, method=method, keep_quantised=True)[1],
                                            method.init(None, plain)))
    assert not quant.is_leaf(both["embed_tokens/embedding"])
    for path in odd - {"embed_tokens/embedding"}:
        assert jax.tree.all(jax.tree.map(np.array_equal, both[path], made[path]))
    assert np.array_equal(both["layers/mlp/down_proj/kernel"].codes, kept["layers/mlp/down_proj/kernel"].codes)


@pytest.mark.slow
def test_layers_of_several_types_are_one_leaf_where_the_method_makes_them_alike(tmp_path):
    file = written(tmp_path, lambda name: "F16" if name.startswith("blk.1.ffn_up") else "Q4_0")
    with pytest.raises(PeftJaxError, match=r"'model.layers.1.mlp.up_proj.weight' is plain, .* \(int4, blocks of 32\)"):
        load_pretrained(file, keep_quantised=True)
    method = quantize("int4", block_size=32)
    up, first = (tree.flatten(p)["layers/mlp/up_proj/kernel"] for p in (
        load_pretrained(file, method=method, keep_quantised=True)[1], load_pretrained(file)[1]))
    assert up.scales.dtype == np.float32 and up.stack == (2,)
    assert np.array_equal(quant.dequantize(up)[0], first[0])
    again = quant.quantize_array(first[1], "int4", block_size=32)
    assert np.array_equal(quant.dequantize(up)[1], quant.dequantize(again))
    with pytest.raises(PeftJaxError, match=r"quantised already, with quant_type='int4', .*keep_quantised=False"):
        load_pretrained(file, method=quantize(), keep_quantised=True)


@pytest.mark.slow
def test_without_being_kept_blocks_are_quantised_anew_one_at_a_time(tmp_path, cache, monkeypatch):
    file = written(tmp_path, lambda name: "Q4_1")
    method = quantize("int8", block_size=None)
    expected = method.init(None, load_pretrained(file)[1])
    monkeypatch.setattr(gguf, "convert", lambda path, weights=False: pytest.fail("all of the model was made float32"))
    found = load_pretrained(file, method=method)[1]
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


def test_halves_of_bytes_by_hand():
    """The low halves of a block's 16 bytes are values 0 to 15, the high ones the rest."""
    found = np.arange(16, dtype=np.uint8) | (np.arange(16, dtype=np.uint8)[::-1] << 4)
    values = [*range(16), *range(15, -1, -1)]
    pairs = gguf_blocks._pairs(found[None])
    assert [half for byte in pairs[0].tolist() for half in (byte >> 4, byte & 15)] == values


@pytest.mark.parametrize(("change", "message"), [
    ({"mystery.weight": np.zeros(3, np.float32)}, "a tensor 'mystery.weight'"),
    ({"arch": "qwen2"}, "architecture 'qwen2'"),
    ({"blk.0.ffn_up.weight": np.zeros((F, 2 * D), np.float32)}, r"up_proj.weight is \[64, 64\], the config says"),
])
def test_what_is_not_read_is_named(tmp_path, change, message):
    write_gguf(tmp_path / "tiny.gguf", **change)
    with pytest.raises(PeftJaxError, match=message):
        load_pretrained(tmp_path / "tiny.gguf", keep_quantised=True)


@pytest.mark.real
def test_smollm2_keeps_its_blocks(smollm2, monkeypatch):
    monkeypatch.delenv(download.CACHE_VARIABLE)
    _, params = load_pretrained(REAL, method=quantize("int4_affine", block_size=32), keep_quantised=True)
    assert_equal(tree.flatten(params), smollm2[1])
    assert nbytes(params) < 100e6  # the file, tokenizer and all, has 98.3 MB
