import json
import os
import stat

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peft_jax.core import files, tree
from peft_jax.errors import PeftJaxError
from peft_jax.hub.load import load_config, load_pretrained
from peft_jax.hub.model_config import param_shapes
from peft_jax.hub.model_files import open_model
from peft_jax.hub.save import save_pretrained
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.models import Head
from peft_jax.models.llama import CausalLM, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=64,
    tie_word_embeddings=False,
)
TIED = LlamaConfig(**{**vars(CONFIG), "tie_word_embeddings": True})


def tiny(config=CONFIG, dtype=jnp.float32):
    """A model and random parameters."""
    rng = np.random.default_rng(0)
    flat = {path: jnp.asarray(rng.normal(size=shape), dtype) for path, shape in param_shapes(config).items()}
    return CausalLM(config, dtype=dtype, param_dtype=dtype), tree.unflatten(flat)


def assert_same(left, right):
    left, right = tree.flatten(left), tree.flatten(right)
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].dtype == right[path].dtype
        assert np.array_equal(left[path], right[path]), path


def tiny_tokenizer():
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = tokenizers.models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "good": 3}, unk_token="<pad>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def saved(tmp_path):
    """(folder, params) of an untied model."""
    model, params = tiny()
    save_pretrained(tmp_path / "model", model, params)
    return tmp_path / "model", params


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("most", [5_000_000_000, 4_000], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_saved_params_come_back_exactly(tmp_path, config, most, dtype):
    model, params = tiny(config, dtype)
    save_pretrained(tmp_path / "model", model, params, max_shard_bytes=most)
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) == (most == 4_000)
    again, loaded = load_pretrained(tmp_path / "model", dtype=dtype)
    assert again == model and load_config(tmp_path / "model") == config
    assert_same(loaded, params)


@pytest.mark.slow
def test_params_come_in_the_dtype_asked_for(saved):
    folder, params = saved
    model, loaded = load_pretrained(folder, dtype=jnp.bfloat16, remat=True)
    assert (model.dtype, model.param_dtype, model.remat) == (jnp.bfloat16, jnp.bfloat16, True)
    assert_same(loaded, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    with pytest.raises(PeftJaxError, match="dtype 'int8' is no floating-point type"):
        load_pretrained(folder, dtype="int8")


@pytest.mark.slow
def test_the_config_is_read_once_and_the_model_found_before_is_taken(saved, monkeypatch):
    folder, params = saved
    reads, read_json = [], files.read_json
    monkeypatch.setattr(files, "read_json", lambda path, *more, **named: reads.append(path.name) or
                        read_json(path, *more, **named))
    assert_same(load_pretrained(folder)[1], params)
    assert reads == ["config.json"]
    opening = open_model(folder, weights=False)
    assert_same(load_pretrained(opening)[1], params)
    assert reads == ["config.json"] * 2 and opening.config == load_config(folder)
    with pytest.raises(PeftJaxError, match="the head was given to open_model already"):
        load_pretrained(opening, head=Head("SEQ_CLS", 2))


@pytest.mark.slow
@pytest.mark.parametrize("most", [5_000_000_000, 4_000], ids=["one file", "shards"])
def test_transformers_opens_the_folder_with_the_same_logits(tmp_path, most):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, params = tiny()
    save_pretrained(tmp_path / "model", model, params, tiny_tokenizer(), max_shard_bytes=most)
    theirs, said = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(said.values()) and theirs.dtype == torch.float32
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.config.pad_token_id) == (1, 2, 0)
    ids = np.arange(10).reshape(2, 5)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    ours = np.asarray(jax.jit(model.apply)({"params": params}, ids))
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
    assert load_tokenizer(tmp_path / "model")("good").input_ids == [3]


def test_a_head_trained_away_from_the_embedding_is_saved_untied(tmp_path):
    model, params = tiny(TIED)
    params["lm_head"] = {"kernel": jnp.ones((16, 61))}
    save_pretrained(tmp_path / "model", model, params)
    assert not load_config(tmp_path / "model").tie_word_embeddings
    assert_same(load_pretrained(tmp_path / "model")[1], params)


@pytest.mark.slow
def test_saving_again_leaves_nothing_of_the_old_model_and_all_else(tmp_path, saved):
    folder, _ = saved
    model, params = tiny(TIED)
    (folder / "notes.txt").write_text("mine")
    save_pretrained(folder, model, params, max_shard_bytes=4_000)
    assert not (folder / "model.safetensors").exists() and (folder / "notes.txt").read_text() == "mine"
    save_pretrained(folder, model, params)
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "notes.txt"}
    assert_same(load_pretrained(folder)[1], params)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == stat.S_IMODE(
        (folder / "config.json").stat().st_mode)


def test_leaves_of_a_method_are_not_saved(tmp_path):
    model, params = tiny()
    params["layers"]["self_attn"]["q_proj"]["lora_a"] = jnp.zeros((3, 16, 2))
    with pytest.raises(PeftJaxError, match=r"'layers/self_attn/q_proj/lora_a'.* merge first"):
        save_pretrained(tmp_path / "model", model, params)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("change", "message"), [
    (lambda params: params.pop("norm"), r"params lack 'norm/scale' \(1 leaves in all\)"),
    (lambda params: params.update(norm={"scale": jnp.ones(3)}), r"'norm/scale' has shape \(3,\)"),
])
def test_params_that_do_not_fit_the_model_are_not_saved(tmp_path, change, message):
    model, params = tiny()
    change(params)
    with pytest.raises(PeftJaxError, match=message):
        save_pretrained(tmp_path / "model", model, params)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PeftJaxError, match="cannot be written to"):
        save_pretrained(tmp_path / "file" / "model", *tiny())


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_one_error_lists_all_tensors_that_do_not_fit(saved):
    folder, _ = saved

    def change(weights):
        del weights["model.layers.1.mlp.up_proj.weight"]
        weights["model.layers.0.self_attn.q_proj.lora_A.weight"] = np.ones(3, np.float32)
        weights["model.norm.weight"] = np.ones(5, np.float32)

    change_weights(folder, change)
    with pytest.raises(PeftJaxError) as caught:
        load_pretrained(folder)
    said = str(caught.value)
    assert "1 missing: model.layers.1.mlp.up_proj.weight;" in said
    assert "1 unexpected: model.layers.0.self_attn.q_proj.lora_A.weight;" in said
    assert "1 of another shape: model.norm.weight is [5], the config says [16]" in said


def test_tensors_that_follow_from_the_config_are_passed_over(saved):
    folder, params = saved
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    change_weights(folder, lambda weights: weights.update(inverse))
    assert_same(load_pretrained(folder)[1], params)


def test_a_head_beside_a_tied_embedding_must_equal_it(tmp_path):
    model, params = tiny(TIED)
    save_pretrained(tmp_path, model, params)
    embedding = np.asarray(params["embed_tokens"]["embedding"])
    change_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": embedding}))
    assert_same(load_pretrained(tmp_path)[1], params)
    change_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(PeftJaxError, match=r"its lm_head.weight differs from the embedding"):
        load_pretrained(tmp_path)


def test_a_bfloat16_file_is_read_into_float32(saved):
    folder, params = saved

    def halve(weights):
        for name in weights:
            weights[name] = weights[name].astype(ml_dtypes.bfloat16)

    change_weights(folder, halve)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert_same(load_pretrained(folder)[1], rounded)


def test_a_pickle_is_never_read(saved):
    folder, _ = saved
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(PeftJaxError, match=r"only pytorch_model.bin, a pickle"):
        load_pretrained(folder)


def test_a_missing_or_damaged_weight_file_is_named(tmp_path):
    model, params = tiny()
    save_pretrained(tmp_path, model, params, max_shard_bytes=4_000)
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:50])
    with pytest.raises(PeftJaxError, match="are damaged"):
        load_pretrained(tmp_path)
    first.unlink()
    with pytest.raises(PeftJaxError, match=f"lacks {first.name}"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({}))
    with pytest.raises(PeftJaxError, match="has no weight_map"):
        load_pretrained(tmp_path)


def test_a_folder_without_a_tokenizer_is_named(saved):
    with pytest.raises(PeftJaxError, match="has no tokenizer"):
        load_tokenizer(saved[0])


@pytest.fixture
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_pretrained(path, *tiny())
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_model_s_file_that_is_none_is_not_opened(folder, tmp_path, name):
    for file in folder.iterdir():
        if name != "model.safetensors.index.json" or file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(PeftJaxError, match=f"{name} is a named pipe, not a file"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "why"), [
    ("pipe", "is a named pipe"), ("zero", "is a device"), ("x" * 300, "is not there"), ("a\0b", "is not there")])
def test_a_source_that_no_model_can_be_is_named(tmp_path, name, why):
    if name == "pipe":
        os.mkfifo(tmp_path / name)
    if name == "zero":
        (tmp_path / name).symlink_to("/dev/zero")
    for read in (load_pretrained, load_config, load_tokenizer):
        with pytest.raises(PeftJaxError, match=why):
            read(tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 5}', '{"weight_map": {}}', '{"weight_map": {"a": 5}}',
                                     '{"weight_map": {"a": "../../x"}}', '{"weight_map": {"a": "x/\\u0000"}}', "{"])
def test_an_index_of_another_kind_is_named(folder, tmp_path, content):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(PeftJaxError, match=r"model\.safetensors\.index\.json") as error:
        load_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_that_are_no_floats_are_named(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"].view(np.int32)},
              tmp_path / "model.safetensors")
    with pytest.raises(PeftJaxError, match=r"'model\.norm\.weight' is of type int32, and weights are floats"):
        load_pretrained(tmp_path)
