"""What an adapter's two files may and may not say."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from peft_jax import (
    PeftJaxError,
    chain,
    dora,
    full,
    load_adapter,
    load_pretrained,
    lora,
    partition,
    prefix,
    quantize,
    save_adapter,
    save_pretrained,
)

METHOD = lora(r=2, init_lora_weights=False)


@pytest.fixture(scope="session")
def tuned(tiny_model):
    """The parameters of METHOD on the tiny model."""
    return METHOD.init(jax.random.key(0), tiny_model[1])


@pytest.fixture
def stored(tiny_model, tuned, tmp_path):
    """The folder of a plain adapter, and the base's params."""
    save_adapter(tmp_path / "adapter", METHOD, tiny_model[0], tuned)
    return tmp_path / "adapter", tiny_model[1]


def restate(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def restore(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path)


def test_a_list_with_names_of_other_models_loads_as_in_peft(stored):
    folder, base = stored
    _, before = load_adapter(folder, base)
    restate(folder, target_modules=["q_proj", "query_key_value", "v_proj"])
    jax.tree.map(np.testing.assert_array_equal, load_adapter(folder, base)[1], before)


@pytest.mark.parametrize("changes", [
    {"use_qalora": True}, {"lora_bias": True}, {"trainable_token_indices": [1, 2]},
    {"target_parameters": ["mlp.experts"]}, {"layer_replication": [[0, 2], [1, 3]]}, {"megatron_config": {"a": 1}},
    {"alora_invocation_tokens": [5]}, {"velora_config": {"rank": 1}}, {"kasa_config": {}, "use_bdlora": {"n": 1}},
    {"a_field_of_tomorrow": 3}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "olora"}, {"init_lora_weights": "loftq"}, {"init_lora_weights": "corda"},
    {"peft_type": "XLORA"}, {"target_modules": ["no_such_module"]},
])  # fmt: skip
def test_what_would_change_the_result_is_refused_by_name(stored, changes):
    folder, base = stored
    restate(folder, **changes)
    with pytest.raises(PeftJaxError, match=str(list(changes)[-1] if "peft_type" not in changes else "'XLORA' adapter")):
        load_adapter(folder, base)


@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal", False])
def test_inits_that_leave_the_base_alone_load(stored, init):
    folder, base = stored
    _, before = load_adapter(folder, base)
    restate(folder, init_lora_weights=init)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(folder, base)[1], before)


def test_every_wrong_tensor_is_listed_at_once(stored):
    folder, base = stored
    prefix = "base_model.model.model.layers"

    def break_it(tensors):
        tensors.pop(f"{prefix}.1.self_attn.q_proj.lora_A.weight")
        tensors[f"{prefix}.7.self_attn.q_proj.lora_A.weight"] = np.zeros((2, 32), np.float32)
        tensors[f"{prefix}.0.self_attn.v_proj.lora_B.weight"] = np.zeros((16, 3), np.float32)
        tensors["base_model.model.model.norm.weight"] = np.zeros(32, np.float32)

    restore(folder, break_it)
    with pytest.raises(PeftJaxError) as error:
        load_adapter(folder, base)
    for part in (f"1 missing: {prefix}.1.self_attn.q_proj.lora_A.weight",
                 f"2 unexpected: {prefix}.7.self_attn.q_proj.lora_A.weight",
                 "base_model.model.model.norm.weight",
                 f"{prefix}.0.self_attn.v_proj.lora_B.weight is [16, 3], the model needs [16, 2]"):  # fmt: skip
        assert part in str(error.value)


def test_a_base_weight_in_the_file_must_be_the_bases_own(stored):
    """peft stores embeddings beside the adapter after it resized them, and then loads them over the base's."""
    folder, base = stored
    _, before = load_adapter(folder, base)
    own = np.asarray(base["embed_tokens"]["embedding"])
    restore(folder, lambda tensors: {**tensors, "base_model.model.model.embed_tokens.weight": own})
    jax.tree.map(np.testing.assert_array_equal, load_adapter(folder, base)[1], before)
    restore(folder, lambda tensors: {**tensors, "base_model.model.model.embed_tokens.weight": own + 1})
    with pytest.raises(PeftJaxError, match=r"unexpected: base_model\.model\.model\.embed_tokens\.weight"):
        load_adapter(folder, base)


def test_bfloat16_adapters_load_as_float32(stored):
    folder, base = stored
    restore(folder, lambda tensors: {key: value.astype(jnp.bfloat16) for key, value in tensors.items()})
    _, params = load_adapter(folder, base)
    leaf = params["layers"]["self_attn"]["q_proj"]["lora_a"]
    assert leaf.dtype == jnp.float32 and np.array_equal(leaf, leaf.astype(jnp.bfloat16).astype(jnp.float32))


def test_keys_without_the_prefix_are_an_error(stored):
    folder, base = stored
    restore(folder, lambda tensors: {key.removeprefix("base_model.model."): value for key, value in tensors.items()})
    with pytest.raises(PeftJaxError, match=r"without peft's 'base_model.model.' in front"):
        load_adapter(folder, base)


def test_missing_damaged_and_pickled_files_are_errors(stored, tmp_path):
    folder, base = stored
    with pytest.raises(PeftJaxError, match=r"no adapter_config\.json and no adapter_model\.safetensors"):
        load_adapter(tmp_path / "nowhere", base)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(PeftJaxError, match="is a pickle"):
        load_adapter(folder, base)
    (folder / "adapter_model.safetensors").write_bytes(b"\x08")
    with pytest.raises(PeftJaxError, match="damaged"):
        load_adapter(folder, base)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(PeftJaxError, match="not readable as JSON"):
        load_adapter(folder, base)


def test_the_folder_of_a_run_is_no_adapter_but_holds_one(stored):
    with pytest.raises(PeftJaxError, match=r"it holds no adapter that can be read; '.*/adapter' does"):
        load_adapter(stored[0].parent, stored[1])


def test_a_hub_id_that_cannot_be_had_is_an_error(tiny_model):
    with pytest.raises(PeftJaxError, match="'org/no-such-adapter' is no local path and could not be had"):
        load_adapter("org/no-such-adapter", tiny_model[1])


@pytest.mark.parametrize("error", [OSError("disk full"), SafetensorError("I/O error: No space left on device")])
def test_a_failed_save_leaves_the_older_adapter_whole(stored, tiny_model, tuned, monkeypatch, error):
    folder, base = stored
    _, before = load_adapter(folder, base)
    monkeypatch.setattr("safetensors.numpy.save_file", lambda *a, **k: (_ for _ in ()).throw(error))
    with pytest.raises(PeftJaxError, match=f"adapter cannot be written to .*{error}"):
        save_adapter(folder, METHOD, tiny_model[0], tuned)
    with pytest.raises(PeftJaxError, match=f"model cannot be written to .*{error}"):
        save_pretrained(folder.parent / "model", *tiny_model)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(folder, base)[1], before)
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_a_disk_that_is_full_while_the_tokenizer_is_written(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """tokenizers raises a bare Exception then."""
    full = "File too large (os error 27)"
    monkeypatch.setattr(type(tiny_tokenizer), "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(Exception(full)))
    with pytest.raises(PeftJaxError, match=r"model cannot be written to .*File too large"):
        save_pretrained(tmp_path / "model", *tiny_model, tiny_tokenizer)
    assert not list(tmp_path.iterdir())


def replaces_until(number, error):
    """``os.replace`` that raises once, at the call of that number; and the list of its targets."""
    calls, replace = [], os.replace

    def failing(source, target):
        calls.append(target)
        if len(calls) == number:
            raise error
        replace(source, target)

    return failing, calls


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_an_overwrite_that_fails_half_way_is_undone(stored, tiny_model, tuned, monkeypatch, number):
    """Two old files go, two new ones come; whichever move fails, the old two are back."""
    folder, _ = stored
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    new = jax.tree.map(lambda leaf: leaf * 1, tuned)
    new["layers"]["self_attn"]["q_proj"]["lora_b"] += 1
    with monkeypatch.context() as patch, pytest.raises(PeftJaxError, match="cannot be written"):
        patch.setattr(os, "replace", replaces_until(number, OSError("gone"))[0])
        save_adapter(folder, METHOD, tiny_model[0], new)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["adapter", "model"])
def test_a_process_that_dies_within_an_overwrite_leaves_nothing_loadable(tiny_model, tuned, tmp_path, monkeypatch,
                                                                         what):
    """Between any two moves the folder, as another process would find it, loads as the old, as the new, or not."""
    old, new = tiny_model[1], jax.tree.map(lambda leaf: leaf + 1, tiny_model[1])
    save = {"adapter": lambda base, r: save_adapter(tmp_path, lora(r=r), tiny_model[0],
                                                    lora(r=r).init(jax.random.key(0), base)),
            "model": lambda base, r: save_pretrained(tmp_path, tiny_model[0], base)}[what]
    read = {"adapter": lambda: load_adapter(tmp_path, old)[0].config["r"],
            "model": lambda: float(load_pretrained(tmp_path)[1]["norm"]["scale"][0])}[what]
    save(old, 2)
    before, seen, replace = read(), [], os.replace

    def looked_at(source, target):
        replace(source, target)
        try:
            seen.append(read())
        except PeftJaxError:
            seen.append(None)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", looked_at)
        save(new, 3)
    assert before != read() and seen[:3] == [None] * 3 and seen[3:] == [read()]


def test_what_a_file_cannot_hold_is_not_saved(tiny_model, tuned, tmp_path):
    model, other = tiny_model[0], lora(r=2, lora_alpha=99)
    with pytest.raises(PeftJaxError, match="lora_scaling' is not what this method's r and lora_alpha give"):
        save_adapter(tmp_path / "a", other, model, tuned)
    with pytest.raises(PeftJaxError, match="two methods of the chain both store 'base_model"):
        save_adapter(tmp_path / "a", chain(METHOD, METHOD), model, tuned)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("made", "leaf"), [
    (dora(r=2), "layers/self_attn/q_proj/lora_magnitude"),
    (chain(METHOD, prefix(3)), "layers/self_attn/core/prefix"), (chain(METHOD, full("norm/.*")), "full/norm.scale"),
])  # fmt: skip
def test_leaves_of_another_method_are_not_dropped(tiny_model, tmp_path, made, leaf):
    model, base = tiny_model
    params = made.init(jax.random.key(0), base)
    with pytest.raises(PeftJaxError, match=f"'{leaf}' .* is neither the model's nor of LORA, and would be lost"):
        save_adapter(tmp_path / "a", METHOD, model, params)
    assert not list(tmp_path.iterdir())
    save_adapter(tmp_path / "a", made, model, params)


def test_a_chain_of_which_nothing_is_stored_is_not_saved(tiny_model, tmp_path):
    method = chain(quantize(block_size=16), quantize(block_size=16))
    with pytest.raises(PeftJaxError, match="no method of the chain has an adapter file"):
        save_adapter(tmp_path / "a", method, tiny_model[0], method.init(jax.random.key(0), tiny_model[1]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [10**6, 10**12, 10**30])
def test_a_rank_that_no_file_can_hold_is_an_error_before_anything_is_made(stored, rank):
    folder, base = stored
    restore(folder, lambda tensors: dict(list(tensors.items())[:1]))
    restate(folder, r=rank)
    with pytest.raises(PeftJaxError, match=r"asks for .* numbers to train, its file has 64: one of them is damaged"):
        load_adapter(folder, base)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_none_is_an_error_naming_its_tensor(stored, value):
    folder, base = stored
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    restore(folder, lambda tensors: {**tensors, key: np.full_like(tensors[key], value)})
    with pytest.raises(PeftJaxError, match=f"1 with NaN or infinite values: {key}"):
        load_adapter(folder, base)


def test_an_adapter_is_not_loaded_onto_another(stored, tuned):
    """Nor onto the frozen part of its tree, which has the scalings in it."""
    for params in (tuned, partition(tuned, METHOD.labels(tuned))[1]):
        with pytest.raises(PeftJaxError, match=r"already hold LORA.*wants the plain model's base_params, .*/lora_"):
            load_adapter(stored[0], params)


def test_params_without_the_adapter_are_not_saved(tiny_model, tuned, tmp_path):
    for params in (tiny_model[1], METHOD.merge(tuned)):
        with pytest.raises(PeftJaxError, match="hold none of LORA's leaves"):
            save_adapter(tmp_path / "a", METHOD, tiny_model[0], params)
    assert not list(tmp_path.iterdir())


def test_layers_that_the_model_does_not_have_are_skipped_as_in_peft(stored, tuned):
    folder, base = stored
    restate(folder, layers_to_transform=[0, 1, 7])
    assert load_adapter(folder, base)[0].config["layers_to_transform"] == (0, 1)
