"""Virtual tokens in GPT-2, whose positions are learned and whose keys come from a joint projection."""

import jax
import numpy as np
import pytest

import peft_jax
from peft_jax import PeftJaxError, bind, chain, load_adapter, lora, prefix, prefix_from_ids, prompt, ptuning
from tests import peer, properties

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# name: (method, its arguments, peft's config class); 4 virtual tokens each.
CASES = {
    "prefix": (prefix, {}, "PrefixTuningConfig"),
    "prefix zero": (prefix, {"init_weights": "zero", "num_layers": 2, "token_dim": 16, "num_attention_heads": 4},
                    "PrefixTuningConfig"),
    "prefix projection": (prefix, {"prefix_projection": True}, "PrefixTuningConfig"),
    "prefix zero projection": (prefix, {"prefix_projection": True, "encoder_hidden_size": 5, "init_weights": "zero"},
                               "PrefixTuningConfig"),
    "prompt": (prompt, {}, "PromptTuningConfig"),
    "prompt of the vocabulary": (prompt, {"prompt_tuning_init": "SAMPLE_VOCAB"}, "PromptTuningConfig"),
    "ptuning mlp": (ptuning, {"encoder_hidden_size": 5}, "PromptEncoderConfig"),
    "ptuning lstm": (ptuning, {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2,
                               "encoder_hidden_size": 6}, "PromptEncoderConfig"),
}  # fmt: skip


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """(makes a fresh torch model, Flax model, params)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=37, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "ln_" in name and "weight" in name else 0.0, 0.2)
    theirs.save_pretrained(folder)
    return lambda: transformers.GPT2LMHeadModel.from_pretrained(folder).eval(), *peft_jax.load_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_moved_here_opens_in_peft(gpt2, case, tmp_path):
    make, options, _ = CASES[case]
    peer.check_opens_in_peft(gpt2, make(4, **options), tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_trained_by_peft_loads_here(gpt2, case, tmp_path):
    """And as many parameters train here as there, the network's included."""
    make, options, kind = CASES[case]
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)
    network = "projection" in case or make is ptuning
    peer.check_loads_from_peft(gpt2, config, tmp_path, whole=not network)
    count, _ = peft.get_peft_model(gpt2[0](), config).get_nb_trainable_parameters()
    method = make(4, **options)
    params = method.init(jax.random.key(0), gpt2[2])
    assert peft_jax.count(peft_jax.partition(params, method.labels(params))[0]) == count


@pytest.mark.slow
@pytest.mark.parametrize("case", ["prefix projection", "prompt"])  # of each place where virtual tokens enter the model
def test_it_trains_and_under_remat_too(gpt2, case):
    make, options, _ = CASES[case]
    properties.check_training(make(4, **options), *gpt2[1:], peer.IDS)
    properties.check_remat(make(4, **options), *gpt2[1:], peer.IDS)


@pytest.mark.slow
@pytest.mark.parametrize("method", [prefix(4), prefix(4, shift_positions=False), prompt(4)],
                         ids=["prefix", "unshifted", "prompt"])
def test_packing_padding_and_a_cache_change_nothing(gpt2, method):
    properties.check_packing(method, *gpt2[1:], peer.IDS)
    properties.check_decoding(method, *gpt2[1:], peer.IDS)


@pytest.mark.slow
def test_generates_as_peft_does(gpt2, peer_bases, tmp_path):
    """With positions that are learned and with rotary ones, in one process of peft."""
    methods = {"prefix": prefix(4), "prompt": prompt(4), "ptuning": ptuning(4)}
    cases = {f"gpt2/{name}": (gpt2, method) for name, method in methods.items()}
    cases |= {f"llama/{name}": (peer_bases["llama"], methods[name]) for name in ("prefix", "prompt")}
    peer.check_generates_as_peft(cases, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [prefix, prompt])
def test_padding_as_in_peft(gpt2, make, side, tmp_path):
    """With the positions that peft gives: as told behind a prefix, of every token, padding too, behind a prompt."""
    fresh, model, base = gpt2
    method = make(4)
    params = properties.moved(method, method.init(jax.random.key(0), base))
    peft_jax.save_adapter(tmp_path, method, model, params)
    mask = np.arange(10)[None] >= np.array([[0], [4]])
    mask = mask if side == "left" else mask[:, ::-1]
    counted = np.maximum(mask.cumsum(1) - 1, 0) if make is prefix else np.arange(10)[None].repeat(2, 0)
    given = {"position_ids": torch.tensor(counted)} if make is prefix else {}
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path)(
            torch.tensor(peer.IDS), attention_mask=torch.tensor(mask.astype(int)), **given).logits.numpy()[:, -10:]
    ours = np.asarray(bind(method, model)({"params": params}, peer.IDS, mask, positions=counted))
    peer.assert_close(ours[mask], theirs[mask])


@pytest.mark.slow
def test_starts_from_a_text(gpt2):
    """A prompt and a prefix of a text are that text in front."""
    _, model, base = gpt2
    behind = np.concatenate([np.tile([7, 3, 9, 7], (2, 1)), peer.IDS], axis=1)
    expected = np.asarray(model.apply({"params": base}, behind))[:, 4:]
    of_text = prefix(4, prefix_init_ids=(7, 3, 9)).prepare(model, base, ())
    for method in (prompt(4, "TEXT", prompt_tuning_init_ids=(7, 3, 9)), of_text):
        params = method.init(jax.random.key(0), base)
        peer.assert_close(peer.bound_logits(method, model, params), expected, 1e-5)
    unshifted = prefix(4, shift_positions=False)
    with pytest.raises(PeftJaxError, match="rotary positions only"):
        prefix_from_ids(unshifted, model, unshifted.init(jax.random.key(0), base), [7, 3, 9, 7])
    with pytest.raises(PeftJaxError, match=r"init what method.prepare"):
        prefix(4, prefix_init_ids=(7, 3, 9)).init(jax.random.key(0), base)
    with pytest.raises(PeftJaxError, match="has 37, the embedding ends at 36"):
        prefix(4, prefix_init_ids=(7, 37)).prepare(model, base, ())


@pytest.mark.slow
def test_beside_lora_in_one_file(gpt2, tmp_path):
    _, model, base = gpt2
    method = chain(lora(r=2, target_modules=("c_attn",)), prefix(4, modules_to_save="ln_f"))
    params = properties.moved(method, method.init(jax.random.key(0), base), by=0.1)
    peft_jax.save_adapter(tmp_path, method, model, params)
    again, loaded = load_adapter(tmp_path, base)
    peer.assert_close(peer.bound_logits(again, model, loaded), peer.bound_logits(method, model, params), 1e-5)
    properties.check_training(method, model, base, peer.IDS)


@pytest.mark.slow
@pytest.mark.parametrize("make", [prefix, prompt])
def test_a_saved_module_is_exchanged_with_peft(gpt2, make, tmp_path):
    peer.check_opens_in_peft(gpt2, make(4, modules_to_save=("ln_f",)), tmp_path / "ours")
    kind = "PrefixTuningConfig" if make is prefix else "PromptTuningConfig"
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4, modules_to_save=["ln_f"])
    peer.check_loads_from_peft(gpt2, config, tmp_path / "theirs")
    with pytest.raises(PeftJaxError, match=r"modules_to_save has 'ln_x', which is no module.*did you mean ln_f"):
        make(4, modules_to_save="ln_x").init(jax.random.key(0), gpt2[2])


@pytest.mark.slow
@pytest.mark.parametrize("make", [prefix, prompt])
def test_more_tokens_than_positions_are_an_error(gpt2, make):
    """Padding is not counted, nor are positions that are given: of those that there are not the states are NaN."""
    _, model, base = gpt2
    method, ids = make(4), np.ones((1, 30), np.int32)
    params, apply = method.init(jax.random.key(0), base), bind(method, model)
    for run in (lambda: apply({"params": params}, 1, 30, method="init_cache"), lambda: apply({"params": params}, ids),
                lambda: jax.jit(apply)({"params": params}, ids), lambda: apply({"params": params}, ids, ids)):
        with pytest.raises(PeftJaxError, match="30 tokens and 4 virtual ones are more than the model's 32 positions"):
            run()
    assert np.isnan(apply({"params": params}, ids, positions=np.arange(30)[None])[:, 28:]).all()
    assert not np.isnan(apply({"params": params}, ids, np.arange(30)[None] > 1)).any()
    assert not np.isnan(apply({"params": params}, ids[:, :28])).any()
