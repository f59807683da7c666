"""The exchange of adapters with real Hugging Face peft, the same checks for every method that peft has."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

import peft_jax
from peft_jax import bind, flatten, load_adapter, partition, save_adapter
from peft_jax.core import tree
from peft_jax.method import owns
from tests.properties import moved, plain_logits, trained

SIZES = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 32}
MODELS = {"llama": ("Llama", False), "tied": ("Llama", True), "qwen2": ("Qwen2", False)}  # Qwen2 has biases
GPT2 = {"vocab_size": 37, "n_embd": 16, "n_inner": 24, "n_layer": 3, "n_head": 4, "n_positions": 32}
IDS = np.arange(20).reshape(2, 10) * 7 % SIZES["vocab_size"]

# Of tiny encoders: DistilBERT has names of its own.
ENCODERS = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 32, "num_labels": 3}
DISTIL = {"vocab_size": 37, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32,
          "num_labels": 3}
ENCODER_IDS = np.arange(20).reshape(2, 10) * 7 % 33 + 3
SEQUENCE, TOKEN = "ForSequenceClassification", "ForTokenClassification"

# Fields that say how training began, by which a loaded adapter does not begin again.
STARTS = {"init_weights", "prefix_projection", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
          "encoder_reparameterization_type"}


def make_bases(tmp_path_factory):
    """See the fixture ``peer_bases``."""
    import torch
    import transformers

    torch.set_num_threads(1)  # tiny products: threads would only wait for one another

    def make(kind, tied, folder):
        torch.manual_seed(0)
        theirs = getattr(transformers, f"{kind}ForCausalLM")(
            getattr(transformers, f"{kind}Config")(**SIZES, tie_word_embeddings=tied)).eval()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
        theirs.save_pretrained(folder)
        fresh = getattr(transformers, f"{kind}ForCausalLM").from_pretrained
        return (lambda: fresh(folder).eval()), *peft_jax.load_pretrained(folder)

    return {name: make(*options, tmp_path_factory.mktemp(name)) for name, options in MODELS.items()}


def make_encoder(name, folder):
    """(makes a fresh torch model, Flax model, params) of a tiny random encoder of the torch class ``name``."""
    import torch
    import transformers

    torch.manual_seed(0)
    kind = name.split("For")[0].removesuffix("Model")
    config = getattr(transformers, f"{kind}Config")(**(DISTIL if kind == "DistilBert" else ENCODERS))
    theirs = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in parameter_name.lower() else 0.0, 0.3)
    theirs.save_pretrained(folder)
    fresh = getattr(transformers, name).from_pretrained
    return (lambda: fresh(folder).eval()), *peft_jax.load_pretrained(folder)


def make_gpt2(folder):
    """The same of a tiny GPT-2, whose head is tied to an embedding called ``wte``."""
    import torch
    import transformers

    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "ln_" in name and "weight" in name else 0.0, 0.2)
    theirs.save_pretrained(folder)
    return lambda: transformers.GPT2LMHeadModel.from_pretrained(folder).eval(), *peft_jax.load_pretrained(folder)


def torch_logits(model):
    """Logits for ``IDS``; those of virtual tokens in front, which peft gives too, are left out."""
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()[:, -IDS.shape[1]:]


def forward(model, params):
    """Logits of plain parameters for ``IDS``; compiled once for each model."""
    return plain_logits(model, params, IDS)


def assert_close(ours, theirs, relative=1e-4):
    assert np.abs(np.asarray(ours) - theirs).max() <= relative * np.abs(theirs).max()


def bound_logits(method, model, params):
    return np.asarray(jax.jit(bind(method, model))({"params": params}, IDS))


def first_fast(cases):
    """``cases`` for parametrize, all but the first slow: the others differ from it in options."""
    return [pytest.param(case, marks=[pytest.mark.slow] if number else []) for number, case in enumerate(cases)]


def train_there(model, steps=2, ids=IDS, rate=0.05):
    import torch

    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.tensor(ids), labels=torch.tensor(ids)).loss.backward()
        optimizer.step()


def as_made(method, params):
    """``change`` for a method that starts from random leaves and pads them: padding stays zero."""
    return params


def trained_here(base):
    """``change`` for :func:`check_opens_in_peft`: a few training steps."""
    return lambda method, params: trained(method, base[1], params, IDS)


def check_opens_in_peft(base, method, folder, relative=1e-4, change=moved):
    """Made and moved here, saved, opened by peft: the same logits, merged too; loaded here: the same bits.

    ``change(method, params)`` moves the leaves; by training where padding must stay zero.
    """
    import peft

    fresh, model, params = base
    before = method.init(jax.random.key(0), params)
    tuned = change(method, before)
    ours = bound_logits(method, model, tuned)
    assert np.abs(ours - forward(model, params)).max() > 1e-2 * np.abs(ours).max()  # else nothing would be tested
    save_adapter(folder, method, model, tuned)
    theirs = peft.PeftModel.from_pretrained(fresh(), folder)
    assert_close(ours, torch_logits(theirs), relative)
    if method.mergeable:
        assert_close(forward(model, method.merge(tuned)), ours, relative)
    check_same_bits(model, params, method, tuned, folder)


def check_same_bits(model, params, method, tuned, folder):
    """What was saved to ``folder`` loads as ``tuned``, bit for bit, zeros of layers that are not adapted aside; what
    was there for training only is folded away."""
    again, loaded = load_adapter(folder, params)
    kept = flatten(tuned)
    for part in method.parts or (method,):
        _, kept = part.stored.plain(part.config, kept)
    before = flatten(method.labels(tuned))
    assert flatten(again.labels(loaded)) == {path: before.get(path, "trainable") for path in kept}
    assert {path: leaf.dtype for path, leaf in kept.items()} == {path: x.dtype for path, x in flatten(loaded).items()}
    if not method.padding(tuned):  # moved padding is not in the file
        for path, leaf in kept.items():
            np.testing.assert_array_equal(leaf, flatten(loaded)[path], err_msg=path)
    with tempfile.TemporaryDirectory() as other:
        save_adapter(other, again, model, loaded)
        tensors, stated = ([(Path(at) / name).read_bytes() for at in (folder, other)]
                           for name in ("adapter_model.safetensors", "adapter_config.json"))
        assert tensors[0] == tensors[1]
        was, now = map(json.loads, stated)
        assert {name for name in was | now if was.get(name) != now.get(name)} <= STARTS


def check_loads_from_peft(base, config, folder, relative=1e-4, whole=True):
    """Made and trained by peft with ``config``, saved, loaded here: the same logits and, where the ``whole`` of what
    peft trained is in its file, as many trained parameters.

    What can be merged is merged, for that compiles nothing: :func:`check_opens_in_peft` shows it to be the same.
    """
    import peft
    import torch

    fresh, model, params = base
    torch.manual_seed(1)
    theirs = peft.get_peft_model(fresh(), config)
    count, _ = theirs.get_nb_trainable_parameters()
    before = torch_logits(theirs)
    train_there(theirs)
    expected = torch_logits(theirs)
    assert np.abs(expected - before).max() > 1e-2 * np.abs(before).max()
    theirs.save_pretrained(folder)
    method, tuned = load_adapter(folder, params)
    ours = forward(model, method.merge(tuned)) if method.mergeable else bound_logits(method, model, tuned)
    assert_close(ours, expected, relative)
    trainable, _ = partition(tuned, method.labels(tuned))
    assert not whole or peft_jax.count(trainable) - method.padding(tuned) == count
    return method, tuned


GENERATE = """
import sys, json, torch, transformers, peft
folder, names, ids, new = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
ids, found = torch.tensor(ids), {}
for name in names:
    base = transformers.AutoModelForCausalLM.from_pretrained(folder + "/" + name.split("/")[0] + "/base").eval()
    model = peft.PeftModel.from_pretrained(base, folder + "/" + name).eval()
    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                            eos_token_id=None, pad_token_id=0)
    found[name] = tokens[:, -new:].tolist()
print(json.dumps(found))
"""


def check_generates_as_peft(cases, folder, new=6):
    """Greedy decoding of two prompts of one length gives peft's tokens, with each of ``cases``.

    These are ``{"model/method": (base, method)}``; all of them are generated in one process of peft.

    peft 0.21 gives other tokens with transformers 5.24 (LOG.md): setup.py keeps the tests below it.
    """
    ours = {}
    for name, ((fresh, model, params), method) in cases.items():
        tuned = moved(method, method.init(jax.random.key(0), params))
        save_adapter(folder / name, method, model, tuned)
        fresh().save_pretrained((folder / name).parent / "base")
        ours[name] = peft_jax.generate(bind(method, model), model, tuned, IDS, np.ones_like(IDS), max_new_tokens=new,
                                       stop_ids=(SIZES["vocab_size"],))
    arguments = str(folder), json.dumps(list(cases)), json.dumps(IDS.tolist()), str(new)
    run = subprocess.run([sys.executable, "-c", GENERATE, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    for name, theirs in json.loads(run.stdout.splitlines()[-1]).items():
        np.testing.assert_array_equal(ours[name], theirs, err_msg=name)


def check_virtual_on_real(fresh, model, params, ids, method, config, folder):
    """Moved here and opened by peft, made by peft and opened here: the same logits of a real model."""
    import peft
    import torch

    def logits(theirs):
        with torch.no_grad():
            return theirs(torch.tensor(ids)).logits.numpy()[:, -ids.shape[1]:]

    tuned = moved(method, method.init(jax.random.key(0), params), by=0.1)
    save_adapter(folder / "ours", method, model, tuned)
    assert_close(jax.jit(bind(method, model))({"params": tuned}, ids),
                 logits(peft.PeftModel.from_pretrained(fresh(), folder / "ours")))
    theirs = peft.get_peft_model(fresh(), config).eval()
    theirs.save_pretrained(folder / "theirs")
    again, loaded = load_adapter(folder / "theirs", params)
    assert_close(jax.jit(bind(again, model))({"params": loaded}, ids), logits(theirs))


def check_saved_without_the_base(method, model, tuned, whole):
    """As in the folder ``whole``: of what is neither trained nor the method's, a file needs the shapes alone, so that
    nothing else has to travel from other processes."""
    labels, apart = flatten(method.labels(tuned)), Path(f"{whole}, apart")
    save_adapter(apart, method, model, tree.map_paths(
        lambda path, leaf: leaf if labels[path] != "frozen" or owns(method.leaves, path) else
        jax.eval_shape(lambda leaf: leaf, leaf), tuned))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (apart / name).read_bytes() == (whole / name).read_bytes()
