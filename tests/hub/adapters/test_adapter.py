"""Adapters trained here give the same logits in real peft, and those made and trained by real peft the same here."""

import jax
import numpy as np
import pytest

import peft_jax
from peft_jax import bind, combine, flatten, load_adapter, lora, partition, save_adapter, untie
from tests.peer import IDS, assert_close, forward, torch_logits, train_there
from tests.properties import moved, trained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


# name: (model, LoraConfig's arguments). The same words make the adapter here and in peft.
CASES = {
    "defaults": ("llama", {}),
    "all-linear": ("qwen2", {"target_modules": "all-linear", "lora_alpha": 16, "lora_dropout": 0.1}),
    "excluded": ("llama", {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]}),
    "excluded by regex": ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"}),
    "regex": ("llama", {"target_modules": r"model\.layers\.[02]\.(self_attn\.(q|v)_proj|mlp\.up_proj)"}),
    "patterns": ("llama", {"target_modules": ["q_proj", "v_proj", "up_proj"],
                           "rank_pattern": {"layers.1.self_attn.q_proj": 5, "up_proj": 1, r".*\.2\..*v_proj": 3},
                           "alpha_pattern": {"^model.layers.0.mlp.up_proj": 3, "v_proj": 32}}),
    "rslora": ("llama", {"use_rslora": True, "lora_alpha": 6, "rank_pattern": {"layers.0.self_attn.v_proj": 4}}),
    "layers": ("llama", {"layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "one layer": ("qwen2", {"layers_to_transform": 1, "init_lora_weights": "gaussian", "bias": "all"}),
    "bias all": ("qwen2", {"bias": "all"}),
    "bias lora_only": ("qwen2", {"bias": "lora_only", "target_modules": ["k_proj", "o_proj"]}),
    "bias all and saved": ("qwen2", {"bias": "all", "target_modules": ["q_proj"], "modules_to_save": ["k_proj"]}),
    "norms": ("llama", {"modules_to_save": ["norm"]}),
    "block": ("llama", {"modules_to_save": ["mlp"]}),
    "head": ("llama", {"modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"modules_to_save": ["model.embed_tokens"]}),
    "head adapted": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "tied": ("tied", {"target_modules": "all-linear"}),
    "tied head": ("tied", {"modules_to_save": ["lm_head"]}),
    "tied embedding": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "tied head and embedding": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied head adapted": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "tie kept": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
}


def made_here(peer_bases, case, **changes):
    """(method, params, model) of a case, its base untied where peft unties it."""
    name, options = CASES[case]
    _, model, base = peer_bases[name]
    if name == "tied" and case not in ("tied", "tie kept"):
        base = untie(base)
    options = {"r": 2, **options, **changes}
    options.pop("ensure_weight_tying", None)
    method = lora(**options)
    return method, method.init(jax.random.key(0), base), model


def moved_here(peer_bases, case):
    """The same with A and B random and every other trainable leaf moved, as if trained."""
    method, params, model = made_here(peer_bases, case, init_lora_weights=False)
    labels, rng = flatten(method.labels(params)), np.random.default_rng(0)
    moved = {path: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in flatten(params).items()
             if labels[path] == "trainable" and "lora" not in path}
    return method, combine(params, peft_jax.unflatten(moved)), model


def peft_model(fresh, options):
    torch.manual_seed(1)
    return peft.get_peft_model(fresh(), peft.LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", **options}))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["patterns", "tied head and embedding"])
def test_trained_here_opens_in_peft(peer_bases, case, tmp_path):
    method, before, model = made_here(peer_bases, case)
    params = trained(method, model, before, IDS)
    apply = jax.jit(bind(method, model))
    ours, base = apply({"params": params}, IDS), apply({"params": before}, IDS)
    assert np.abs(np.asarray(ours - base)).max() > 0.05 * np.abs(base).max()

    save_adapter(tmp_path / "adapter", method, model, params)
    theirs = peft.PeftModel.from_pretrained(peer_bases[CASES[case][0]][0](), tmp_path / "adapter")
    assert_close(ours, torch_logits(theirs))
    assert_close(forward(model, method.merge(params)), torch_logits(theirs.merge_and_unload()))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_saved_here_opens_in_peft(peer_bases, case, tmp_path):
    method, params, model = moved_here(peer_bases, case)
    save_adapter(tmp_path / "adapter", method, model, params)
    theirs = peft.PeftModel.from_pretrained(peer_bases[CASES[case][0]][0](), tmp_path / "adapter")
    assert_close(forward(model, method.merge(params)), torch_logits(theirs))


@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded_are_the_same_bits(peer_bases, case, tmp_path):
    method, params, model = moved_here(peer_bases, case)
    save_adapter(tmp_path / "adapter", method, model, params)
    again, loaded = load_adapter(tmp_path / "adapter", peer_bases[CASES[case][0]][2])
    assert flatten(loaded).keys() == flatten(params).keys()
    for path, leaf in flatten(params).items():
        assert leaf.dtype == flatten(loaded)[path].dtype and np.array_equal(leaf, flatten(loaded)[path]), path
    assert flatten(again.labels(loaded)) == flatten(method.labels(params))
    names = {file.name for file in tmp_path.iterdir()} | {file.name for file in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter", "adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_trained_by_peft_loads_here(peer_bases, case, tmp_path):
    fresh, model, base = peer_bases[CASES[case][0]]
    theirs = peft_model(fresh, CASES[case][1])
    train_there(theirs)
    theirs.save_pretrained(tmp_path)
    method, params = load_adapter(tmp_path, base)
    assert_close(forward(model, method.merge(params)), torch_logits(theirs))
    if case in ("patterns", "one layer"):
        assert_close(bind(method, model)({"params": params}, IDS), torch_logits(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_as_many_parameters_train_as_in_peft(peer_bases, case):
    method, params, _ = made_here(peer_bases, case)
    trainable, _ = partition(params, method.labels(params))
    count, _ = peft_model(peer_bases[CASES[case][0]][0], CASES[case][1]).get_nb_trainable_parameters()
    assert peft_jax.count(trainable) - method.padding(params) == count


@pytest.mark.slow
def test_peft_finds_the_base_model_itself(tiny_folder, tiny_model, tmp_path, monkeypatch):
    """By the whole path, wherever it is opened from; of Hub ids see tests/hub/test_download.py."""
    model, base = tiny_model
    method = lora(r=2, target_modules=("q_proj",))
    params = moved(method, method.init(jax.random.key(0), base))
    monkeypatch.chdir(tiny_folder.parent)
    save_adapter(tmp_path / "adapter", method, model, params, base_model=tiny_folder.name)
    monkeypatch.chdir(tmp_path)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert_close(bind(method, model)({"params": params}, IDS), torch_logits(theirs))
    assert load_adapter(tmp_path / "adapter", base)[0].config["r"] == 2


def test_the_config_says_what_peft_says(peer_bases, tmp_path):
    method, params, model = moved_here(peer_bases, "defaults")
    save_adapter(tmp_path, method, model, params, base_model="org/base")
    ours = peft.PeftConfig.from_pretrained(tmp_path)
    theirs = peft_model(peer_bases["llama"][0], {"target_modules": ["q_proj", "v_proj"]}).peft_config["default"]
    assert (ours.base_model_name_or_path, ours.task_type, ours.inference_mode) == ("org/base", "CAUSAL_LM", True)
    same = {name: value for name, value in vars(theirs).items()
            if name not in ("base_model_name_or_path", "inference_mode", "init_lora_weights", "target_modules")}
    assert {name: getattr(ours, name) for name in same} == same
    assert set(ours.target_modules) == set(theirs.target_modules)


def test_patterns_that_peft_reads_otherwise_are_spelled_out(peer_bases, tmp_path):
    """Without peft's "model." in front a regex matches here, and in peft nothing."""
    fresh, model, base = peer_bases["llama"]
    method = lora(r=2, target_modules=r"layers\.[01]\.self_attn\.q_proj", init_lora_weights=False,
                  alpha_pattern={r"^layers\.1\.self_attn\.q_proj": 5}, rank_pattern={"^layers.0.self_attn.q_proj": 3})
    params = method.init(jax.random.key(0), base)
    save_adapter(tmp_path, method, model, params)
    assert_close(forward(model, method.merge(params)), torch_logits(peft.PeftModel.from_pretrained(fresh(), tmp_path)))
    again, loaded = load_adapter(tmp_path, base)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert again.padding(loaded) == method.padding(params)


@pytest.mark.real
def test_smollm2_exchanges_adapters_with_peft(smollm2, smollm2_peer, tmp_path):
    model, base, tokenizer = smollm2
    batch = tokenizer(["Review: a delight.\nIn one word, the movie is", "Gravity is"], padding=True,
                      padding_side="left", return_tensors="np")
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def logits(theirs):
        positions = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
        with torch.no_grad():
            return theirs.eval()(torch.tensor(ids), attention_mask=torch.tensor(mask),
                                 position_ids=positions).logits.numpy()[mask.astype(bool)]

    def own_logits(method, params):
        return np.asarray(jax.jit(bind(method, model))({"params": params}, ids, mask))[mask.astype(bool)]

    method = lora(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    params = method.init(jax.random.key(0), base)
    save_adapter(tmp_path / "ours", method, model, params, base_model="HuggingFaceTB/SmolLM2-135M-Instruct")
    theirs = peft.PeftModel.from_pretrained(smollm2_peer(), tmp_path / "ours")
    assert_close(own_logits(method, params), logits(theirs))

    theirs = peft.get_peft_model(smollm2_peer(), peft.LoraConfig(r=4, use_rslora=True, task_type="CAUSAL_LM"))
    train_there(theirs, ids=ids[:1], rate=0.01)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_close(own_logits(*load_adapter(tmp_path / "theirs", base)), logits(theirs))
