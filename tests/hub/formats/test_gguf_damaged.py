"""Damaged and hostile .gguf files: one line each, at once, and never another model in silence."""

import struct

import gguf as writer_package
import numpy as np
import pytest

from peft_jax.errors import PeftJaxError
from peft_jax.hub import download
from peft_jax.hub.formats import gguf_header
from peft_jax.hub.load import load_config, load_pretrained
from peft_jax.hub.tokenizer import load_tokenizer
from tests.hub.formats.test_gguf import write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path.read_bytes()


@pytest.fixture
def refused(tmp_path):
    """``refused(bytes, why)``: neither the model nor its tokenizer is read of such a file."""
    def check(content, why):
        (tmp_path / "m.gguf").write_bytes(content)
        for read in (load_pretrained, load_tokenizer, lambda path: load_pretrained(path, keep_quantised=True)):
            with pytest.raises(PeftJaxError, match=f"m.gguf.*{why}") as error:
                read(tmp_path / "m.gguf")
            assert "\n" not in str(error.value)
    return check


def string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def renamed(whole, key, other):
    """The file with another key of the same length: the first is missing then."""
    assert len(key) == len(other) and whole.count(string(key)) == 1
    return whole.replace(string(key), string(other))


REQUIRED = ["llama.block_count", "llama.context_length", "llama.embedding_length", "llama.feed_forward_length",
            "llama.attention.head_count", "llama.attention.layer_norm_rms_epsilon"]
OF_TOKENS = [f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "token_type", "merges", "eos_token_id")]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_key_that_is_missing_is_named(whole, refused, key):
    refused(renamed(whole, key, "general" + "." * (len(key) - 7)), f"has no '{key}'")


@pytest.mark.parametrize("key", OF_TOKENS)
def test_a_key_of_the_tokenizer_that_is_missing_is_named(whole, tmp_path, key):
    (tmp_path / "m.gguf").write_bytes(renamed(whole, key, "general" + "." * (len(key) - 7)))
    with pytest.raises(PeftJaxError, match=f"m.gguf has no '{key}'"):
        load_tokenizer(tmp_path / "m.gguf")


def test_a_key_that_may_change_the_model_is_named(whole, refused):
    refused(renamed(whole, "llama.rope.freq_base", "llama.rope.freq_bass"), "'llama.rope.freq_bass', which may change")


U32, F32, STR, BOOL = 4, 6, 8, 7


def with_value(whole, key, kind, packed):
    """The file with another value, of four bytes, of a key that has such a one."""
    at = whole.index(string(key)) + len(string(key))
    return whole[:at] + struct.pack("<I", kind) + packed + whole[at + 8:]


@pytest.mark.parametrize(("key", "kind", "packed", "why"), [
    ("llama.block_count", U32, struct.pack("<I", 1_000_000), "num_hidden_layers=1000000, where a whole number"),
    ("llama.block_count", U32, struct.pack("<I", 0), "'llama.block_count' = 0, where a whole number from 1"),
    ("llama.block_count", F32, struct.pack("<f", 2.0), "'llama.block_count' = 2.0, where"),
    ("llama.attention.head_count", U32, struct.pack("<I", 0), "'llama.attention.head_count' = 0"),
    ("llama.attention.head_count", U32, struct.pack("<I", 5), "correct config.json|do not fit"),
    ("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", float("nan")), "= nan, where a number above 0"),
    ("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", -1.0), "= -1.0, where a number above 0"),
    ("llama.rope.freq_base", F32, struct.pack("<f", float("inf")), "= inf, where a number above 0"),
    ("llama.embedding_length", U32, struct.pack("<I", 64), "do not fit"),
    ("llama.feed_forward_length", U32, struct.pack("<I", 65), "do not fit"),
    ("llama.block_count", 99, bytes(4), "unknown type 99"),
])
def test_a_value_that_cannot_be_is_named(whole, refused, key, kind, packed, why):
    refused(with_value(whole, key, kind, packed), why)


@pytest.mark.parametrize(("key", "value"), [("eos_token_id", 10**6), ("bos_token_id", 10**6)])
def test_a_special_token_that_there_is_not_is_named(whole, tmp_path, key, value):
    (tmp_path / "m.gguf").write_bytes(with_value(whole, f"tokenizer.ggml.{key}", U32, struct.pack("<I", value)))
    with pytest.raises(PeftJaxError, match=f"m.gguf has 'tokenizer.ggml.{key}' = {value}, and .* tokens"):
        load_tokenizer(tmp_path / "m.gguf")


def at_tensor(whole, name):
    """Where the count of a tensor's axes stands."""
    return whole.index(string(name)) + len(string(name))


AXES, TYPE, OFFSET = 0, 4 + 16, 4 + 16 + 4  # of a matrix: a count, two sizes, a type, an offset


@pytest.mark.parametrize(("field", "packed", "why"), [
    (AXES, struct.pack("<I", 2**31), "would have 2,147,483,648 axes"),
    (AXES + 4, struct.pack("<Q", 0), "has the shape"),
    (AXES + 4, struct.pack("<Q", 2**63), "would end at byte"),
    (AXES + 4, struct.pack("<Q", 33), "has the shape"),
    (AXES + 12, struct.pack("<Q", 2**62), "would end at byte"),
    (TYPE, struct.pack("<I", 999), "999 is not a valid GGMLQuantizationType"),
    (OFFSET, struct.pack("<Q", 2**64 - 32), "is said to begin at byte"),
    (OFFSET, struct.pack("<Q", 0), "is said to begin at byte 0"),
    (OFFSET, struct.pack("<Q", 2**40), "is said to begin at byte"),
])
def test_a_tensor_that_cannot_lie_there_is_named(whole, refused, field, packed, why):
    at = at_tensor(whole, "blk.1.ffn_up.weight") + field
    refused(whole[:at] + packed + whole[at + len(packed):], why)


@pytest.mark.parametrize(("name", "other", "why"), [
    ("blk.1.ffn_up.weight", "blk.0.ffn_up.weight", "stands there twice"),
    ("blk.1.ffn_up.weight", "blk.7.ffn_up.weight", "1 missing: .*layers.1.mlp.up_proj.weight; 1 unexpected"),
    ("blk.1.ffn_up.weight", "blk...ffn_up.weight", "has a tensor 'blk...ffn_up.weight'"),
    ("blk.1.ffn_up.weight", "blk.01ffn_up.weight", "has a tensor"),
    ("blk.1.ffn_up.weight", "x" * 19, "has a tensor 'xxx"),
    ("token_embd.weight", "token_embd.wEight", "no table of embeddings 'token_embd.weight'"),
])
def test_a_tensor_of_an_odd_name_is_named(whole, refused, name, other, why):
    refused(renamed(whole, name, other), why)


@pytest.mark.parametrize(("at", "packed", "why"), [
    (0, b"GGUX", "does not begin with GGUF"), (4, struct.pack("<I", 9), "its version is 9"),
    (4, struct.pack(">I", 3), "the other byte order"), (8, struct.pack("<Q", 2**63), "tensors and"),
    (16, struct.pack("<Q", 2**63), "tensors and"), (8, struct.pack("<Q", 99), "cannot be read as a GGUF file"),
    (16, struct.pack("<Q", 9999), "cannot be read as a GGUF file"), (24, struct.pack("<Q", 2**62), "there are fewer"),
])
def test_a_count_that_is_wrong_is_noticed(whole, refused, at, packed, why):
    refused(whole[:at] + packed + whole[at + len(packed):], why)


def test_a_list_of_more_values_than_there_are_is_noticed(whole, refused):
    at = whole.index(string("tokenizer.ggml.token_type")) + len(string("tokenizer.ggml.token_type")) + 8
    refused(whole[:at] + struct.pack("<Q", 10**18) + whole[at + 8:], "a list of 1,000,000,000,000,000,000 values")
    refused(whole[:at] + struct.pack("<Q", 10**6) + whole[at + 8:], "cannot be read as a GGUF file")


def test_a_file_that_ends_early_is_noticed_wherever(whole, tmp_path):
    for length in (0, 3, 20, 100, 1000, 5000, len(whole) - 4096):
        (tmp_path / "m.gguf").write_bytes(whole[:length])
        with pytest.raises(PeftJaxError, match=r"m\.gguf cannot be read as a GGUF file"):
            load_config(tmp_path / "m.gguf")


def test_the_header_says_what_the_gguf_package_reads(whole, tmp_path):
    (tmp_path / "m.gguf").write_bytes(whole)
    theirs, ours = writer_package.GGUFReader(tmp_path / "m.gguf"), gguf_header.read(tmp_path / "m.gguf")
    assert {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")} == ours.fields
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert (info.kind, info.start, info.nbytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        assert np.array_equal(info.floats(), writer_package.quants.dequantize(tensor.data, tensor.tensor_type))
