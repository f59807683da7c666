"""Virtual tokens in encoders, which see the text: peft's numbers where it has them, packing, means, the equation."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import peft_jax
from peft_jax import Head, PeftJaxError, bind, load_adapter, prefix, prompt, ptuning, save_adapter
from peft_jax.data.batches import Batches
from peft_jax.data.labelled import Labelled
from peft_jax.train.loss import batch_loss
from tests.peer import ENCODER_IDS, SEQUENCE, TOKEN, assert_close, check_same_bits
from tests.properties import moved

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = ENCODER_IDS
MASK = np.arange(10)[None] < np.array([[10], [6]])  # behind the text: in front of it peft counts padding too
METHODS = {
    "prefix": (prefix, {}, "PrefixTuningConfig"),
    "projection": (prefix, {"prefix_projection": True, "encoder_hidden_size": 5}, "PrefixTuningConfig"),
    "prompt": (prompt, {}, "PromptTuningConfig"),
    "ptuning": (ptuning, {"encoder_hidden_size": 5}, "PromptEncoderConfig"),
}
TEXTS = (slice(0, 4), slice(4, 10))  # of a packed row


# (torch class, method) that peft has: for DistilBERT it has no prefix. Pairwise: every method with every family, every
# method with both heads, every family with both heads.
PAIRS = [(family + (SEQUENCE if (number + offset) % 2 else TOKEN), method)
         for offset, family in enumerate(("Bert", "Roberta", "DistilBert")) for number, method in enumerate(METHODS)
         if family != "DistilBert" or METHODS[method][0] is not prefix] + [("BertModel", method) for method in METHODS]


def torch_output(model, **given):
    """Of real tokens, or of each text, without what peft gives of virtual tokens."""
    with torch.no_grad():
        found = model.eval()(torch.tensor(IDS), attention_mask=torch.tensor(MASK.astype(int)), **given)[0].numpy()
    return found[:, -10:][MASK] if found.ndim == 3 else found


def output(method, model, params, **given):
    found = np.asarray(jax.jit(bind(method, model))({"params": params}, IDS, MASK, **given))
    return found[MASK] if found.ndim == 3 else found


@partial(jax.jit, static_argnums=0)
def plain_output(model, base):
    return model.apply({"params": base}, IDS, MASK)


def saved(name):
    return None if name.endswith("Model") else ("classifier",)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_made_here_opens_in_peft(encoder_bases, name, case, tmp_path):
    (fresh, model, base), (make, options, _) = encoder_bases(name), METHODS[case]
    method = make(4, **options, modules_to_save=saved(name))
    params = moved(method, method.init(jax.random.key(0), base))
    save_adapter(tmp_path, method, model, params)
    ours = output(method, model, params)
    plain = np.asarray(plain_output(model, base))
    assert np.abs(ours - (plain[MASK] if plain.ndim == 3 else plain)).max() > 1e-2 * np.abs(ours).max()
    assert_close(ours, torch_output(peft.PeftModel.from_pretrained(fresh(), tmp_path)))
    check_same_bits(model, base, method, params, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_trained_by_peft_loads_here(encoder_bases, name, case, tmp_path):
    """peft itself adds "classifier" and "score" to modules_to_save for a classification task."""
    (fresh, model, base), (make, options, kind) = encoder_bases(name), METHODS[case]
    task = {SEQUENCE: "SEQ_CLS", TOKEN: "TOKEN_CLS"}.get(name[name.find("For"):], "FEATURE_EXTRACTION")
    sizes = {"token_dim": 16, "num_attention_heads": 4} if "Distil" in name else {}  # peft cannot tell them
    torch.manual_seed(1)
    theirs = peft.get_peft_model(fresh(), getattr(peft, kind)(task_type=task, num_virtual_tokens=4, **options, **sizes))
    count, _ = theirs.get_nb_trainable_parameters()
    before = torch_output(theirs)
    optimizer = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        theirs(torch.tensor(IDS))[0].sin().sum().backward()
        optimizer.step()
    expected = torch_output(theirs)
    assert np.abs(expected - before).max() > 1e-2 * np.abs(before).max()
    theirs.save_pretrained(tmp_path)
    method, params = load_adapter(tmp_path, base)
    assert_close(output(method, model, params), expected)
    started = make(4, **options, modules_to_save=saved(name))
    params = started.init(jax.random.key(0), base)
    assert peft_jax.count(peft_jax.partition(params, started.labels(params))[0]) == count


@pytest.mark.slow
@pytest.mark.parametrize("case", ["prefix", "prompt"])
def test_token_types_are_pefts(encoder_bases, case, tmp_path):
    """Virtual tokens are of type 0. peft reads the file of a classifier only with the classifier in it."""
    (fresh, model, base), (make, _, _) = encoder_bases(f"Bert{SEQUENCE}"), METHODS[case]
    method, types = make(4, modules_to_save="classifier"), (np.arange(10) > 3).astype(int)[None].repeat(2, 0)
    params = moved(method, method.init(jax.random.key(0), base))
    save_adapter(tmp_path, method, model, params)
    theirs = torch_output(peft.PeftModel.from_pretrained(fresh(), tmp_path), token_type_ids=torch.tensor(types))
    assert_close(output(method, model, params, token_type_ids=types), theirs)
    assert np.abs(output(method, model, params) - theirs).max() > 1e-2 * np.abs(theirs).max()


def test_peft_has_no_prefix_for_distilbert(encoder_bases):
    fresh, _, _ = encoder_bases(f"DistilBert{SEQUENCE}")
    theirs = peft.get_peft_model(fresh(), peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4,
                                                                  token_dim=16, num_attention_heads=4))
    with pytest.raises(ValueError, match="does not support past key values"):
        theirs(torch.tensor(IDS))


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"DistilBert{SEQUENCE}", f"Bert{TOKEN}"])
def test_the_equation_of_a_prefix_written_out(encoder_bases, name):
    """Each layer's attention, from its queries, keys and values: every token sees the prefix and every token."""
    _, model, base = encoder_bases(name)
    method = prefix(3)
    params = moved(method, method.init(jax.random.key(0), base))
    layers = []

    def look(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if context.module.name == "core" and context.method_name == "__call__":
            jax.debug.callback(lambda *all_: layers.append(all_), *args[:3], out, ordered=True)
        return out

    with nn.intercept_methods(look):
        bind(method, model)({"params": params}, IDS[:1])
    jax.effects_barrier()
    held = next(leaf for path, leaf in peft_jax.flatten(params).items() if path.endswith("core/prefix"))
    held = np.asarray(held).reshape(2, 3, 2, 4, 4)
    assert len(layers) == 2
    for layer, (query, key, value, out) in enumerate(layers):
        key, value = (np.concatenate([held[layer, :, i], x[0]]) for i, x in enumerate((key, value)))
        scores = np.einsum("tnh,snh->nts", query[0], key) / np.sqrt(4)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), value)
        np.testing.assert_allclose(out[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "pooling", "jitted"), [
    ("prefix", "first", True), ("prefix", "mean", True), ("prompt", "first", True), ("prompt", "mean", True),
    ("prompt", "first", False), ("ptuning", "first", True)])  # fmt: skip
def test_texts_of_a_packed_row_do_not_see_one_another(encoder_bases, case, pooling, jitted):
    """Nor padding, on either side: each has the answer that it has alone."""
    (make, options, _), (_, model, base) = METHODS[case], encoder_bases(f"Bert{SEQUENCE}")
    model = model.clone(config=model.config.__class__(**{**vars(model.config), "head": Head("SEQ_CLS", 3, pooling)}))
    method = make(4, **options, **({} if make is prefix else {"packed_texts": 3}))
    params = moved(method, method.init(jax.random.key(0), base))
    apply = bind(method, model)
    whole = jax.jit(lambda ids, mask=None: apply({"params": params}, ids, mask))
    alone = np.concatenate([whole(IDS[:1, at]) for at in TEXTS])
    left = np.roll(IDS[:1], 6, axis=1), (np.arange(10) >= 6)[None]
    assert_close(whole(*left), alone[:1], 1e-5)

    def answers(ids, segments):
        states = apply({"params": params}, ids, segment_ids=segments, method="hidden")
        return apply({"params": params}, states[0, np.array([0, 4])], method="head")

    segments = np.array([[1] * 4 + [2] * 6 + [0] * 2])
    packed = (jax.jit(answers) if jitted else answers)(np.pad(IDS[:1], ((0, 0), (0, 2))), segments)
    assert_close(packed, alone, 1e-5)


def test_more_texts_than_were_told_are_seen(encoder_bases):
    """Under jit nobody can count them: the states of those that have no virtual tokens are NaN, no others."""
    _, model, base = encoder_bases(f"Bert{SEQUENCE}")
    method = prompt(4)
    params, apply = method.init(jax.random.key(0), base), bind(method, model)
    segments = np.array([[1] * 4 + [2] * 6])
    states = jax.jit(lambda s: apply({"params": params}, IDS[:1], segment_ids=s, method="hidden"))(segments)
    assert np.isnan(states[0, 4:]).all() and not np.isnan(states[0, :4]).any()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["prompt", "ptuning"])
def test_the_mean_is_over_the_text_alone(encoder_bases, case):
    (make, options, _), (_, bare, base) = METHODS[case], encoder_bases("BertModel")
    method = make(4, **options)
    params = moved(method, method.init(jax.random.key(0), base))
    states = np.asarray(bind(method, bare)({"params": params}, IDS, MASK))
    expected = np.stack([row[real].mean(0) for row, real in zip(states, MASK, strict=True)])
    config = bare.config.__class__(**{**vars(bare.config), "head": Head("SEQ_CLS", 3, "mean")})
    means = bind(method, bare.clone(config=config))({"params": params}, IDS, MASK, method="hidden")
    assert_close(means[:, 0], expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "collate"), [("prefix", "pack"), ("prompt", "pack"), ("prompt", "pad"),
                                               ("ptuning", "pack")])
def test_a_run_prepares_it_for_its_batches(encoder_bases, case, collate):
    """The loss of a batch is that of its texts one by one, under jit and remat, and every leaf has a gradient."""
    from ml_collections.config_dict import ConfigDict

    (make, options, _), (_, model, base) = METHODS[case], encoder_bases(f"Roberta{SEQUENCE}")
    texts = [Labelled(row[:length].astype(np.int32), label) for row, length, label in
             zip(np.tile(IDS, (3, 1)), (3, 9, 5, 4, 10, 6), (0, 1, 2, 2, 1, 0), strict=True)]
    batches = Batches(texts, ConfigDict({"collate": collate, "batch_size": 6, "width_multiple": 4, "buckets": 2,
                                         "rows": 2 if collate == "pack" else 0, "row_length": 0}))
    batch = batches.at(0)
    assert ("segment_ids" in batch) == (collate == "pack")
    method = make(4, **options, modules_to_save="classifier")
    method = method.prepare(model, base, [batch]) if method.prepare else method
    params = method.init(jax.random.key(0), base)
    apply = bind(method, model)
    mask = np.arange(10)[None] < np.array([[len(text.input_ids)] for text in texts])
    alone = -jax.nn.log_softmax(jax.jit(apply)({"params": params}, np.tile(IDS, (3, 1)), mask))
    alone = sum(alone[i, text.label] for i, text in enumerate(texts))
    trainable, frozen = peft_jax.partition(params, method.labels(params))

    def loss(leaves, remat):
        computing = bind(method, model.clone(remat=remat))
        return batch_loss(computing, peft_jax.combine(frozen, leaves), batch, chunk=64)[0]

    for remat in (False, True):
        found, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(trainable, remat)
        np.testing.assert_allclose(found, alone, rtol=1e-5)
        assert all(np.abs(leaf).max() > 0 for leaf in peft_jax.flatten(gradient).values())


@pytest.mark.slow
def test_what_an_encoder_cannot_do_is_an_error(encoder_bases, tmp_path):
    _, model, base = encoder_bases(f"DistilBert{SEQUENCE}")
    with pytest.raises(PeftJaxError, match="keys of a text can be had from a decoder"):
        prefix(4, prefix_init_ids=(3, 4)).prepare(model, base, ())
    method = prompt(4)
    params = method.init(jax.random.key(0), base)
    with pytest.raises(PeftJaxError, match=r"attention_mask has shape \(2, 9\), input_ids \(2, 10\)"):
        bind(method, model)({"params": params}, IDS, np.ones((2, 9), int))
    save_adapter(tmp_path, method, model, params)
    stated = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stated["task_type"], stated["token_dim"], stated["num_attention_heads"]) == ("SEQ_CLS", 16, 4)
    wide = np.ones((1, 30), np.int32)
    with pytest.raises(PeftJaxError, match="30 tokens and 4 virtual ones are more than the model's 32 positions"):
        bind(method, model)({"params": params}, wide)
    assert jnp.isfinite(bind(method, model)({"params": params}, wide[:, :28])).all()
