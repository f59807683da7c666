"""BERT, RoBERTa and DistilBERT at Hugging Face: ``config.json`` to ``EncoderConfig`` and back, modules' names."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from peft_jax.core import labels
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.hub.families.family import Family, check_heads, completed
from peft_jax.hub.families.hf_names import embedding, linear, norm
from peft_jax.models.bert import ACTIVATIONS, Encoder, EncoderConfig
from peft_jax.models.heads import POOLINGS, Head

CLASSES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
TASKS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification", None: "Model"}

# EncoderConfig's field: the key in config.json.
_BERT = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings", "layer_norm_eps": "layer_norm_eps",
    "type_vocab_size": "type_vocab_size", "hidden_act": "hidden_act",
}  # fmt: skip
_DISTIL = {
    "vocab_size": "vocab_size", "hidden_size": "dim", "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "max_position_embeddings": "max_position_embeddings", "hidden_act": "activation",
}  # fmt: skip
KEYS = {"bert": _BERT, "roberta": _BERT, "distilbert": _DISTIL}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# What a config.json that leaves a key out means: the defaults of transformers' configuration classes.
_COMMON = {"max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2,
           "position_embedding_type": "absolute", "is_decoder": False, "num_labels": 2, "id2label": None,
           "architectures": None, "pooling": "first"}
DEFAULTS = {
    "bert": {**_COMMON, "pad_token_id": 0},
    "roberta": {**_COMMON, "pad_token_id": 1},
    "distilbert": {**_COMMON, "activation": "gelu", "pad_token_id": 0},
}


def read(kind: str, given: Mapping[str, Any]) -> EncoderConfig:
    """The model that a config dict of type ``kind`` describes; its head is the one that ``architectures`` names.

    Raises ``PeftJaxError`` for a missing size or a feature that is not supported (activation, relative positions, use
    as a decoder).
    """
    keys = KEYS[kind]
    c = completed(kind, given, [keys[name] for name in _SIZES], DEFAULTS[kind])
    if c["position_embedding_type"] != "absolute" or c["is_decoder"]:
        raise PeftJaxError(f"a {kind} model with position_embedding_type={c['position_embedding_type']!r}, "
                           f"is_decoder={c['is_decoder']} is not supported: only encoders with absolute positions are.")
    fields = {name: c[key] for name, key in keys.items()}
    if fields["hidden_act"] not in ACTIVATIONS:
        raise PeftJaxError(f"hidden_act '{fields['hidden_act']}' is not supported in a {kind} model: "
                           f"{nearest(fields['hidden_act'], ACTIVATIONS)}")
    check_heads(kind, fields["hidden_size"], fields["num_attention_heads"])
    offset = (c["pad_token_id"] or 0) + 1 if kind == "roberta" else 0
    if fields["max_position_embeddings"] <= offset or (kind == "roberta" and c["pad_token_id"] is None):
        raise PeftJaxError(f"the {kind} config has max_position_embeddings={fields['max_position_embeddings']} and "
                           f"pad_token_id={c['pad_token_id']}, behind which its positions begin: correct config.json.")
    fields["max_position_embeddings"] -= offset
    types = {"type_vocab_size": 0} if kind == "distilbert" else {}
    return EncoderConfig(**{**fields, **types}, position_offset=offset, model_type=kind, head=_head(kind, c))


def _head(kind: str, c: Mapping[str, Any]) -> Head | None:
    named = [name.removeprefix(CLASSES[kind]) for name in c["architectures"] or ()]
    tasks = [task for task, ending in TASKS.items() if task and ending in named]
    if not tasks:
        return None
    if c["pooling"] not in POOLINGS:
        raise PeftJaxError(f"pooling '{c['pooling']:.60}' is not supported: {nearest(c['pooling'], POOLINGS)}")
    return Head(tasks[0], len(c["id2label"] or ()) or c["num_labels"], c["pooling"], labels.names(c["id2label"]))


def write(config: EncoderConfig) -> dict[str, Any]:
    """The config dict. Pooling by the mean, which transformers does not have, is a key that only we read."""
    kind, head = config.model_type, config.head
    task = TASKS[head.task_type if head else None]
    result = {"architectures": [CLASSES[kind] + task],
              **{key: getattr(config, name) for name, key in KEYS[kind].items()}}
    result["max_position_embeddings"] += config.position_offset
    if kind == "roberta":
        result |= {"pad_token_id": config.position_offset - 1}
    if head:
        result |= labels.fields(head.labels or [f"LABEL_{i}" for i in range(head.num_labels)])
        result |= {"pooling": head.pooling} if head.pooling != "first" else {}
    return result


def _bert(prefix: str) -> dict:
    inside = f"{prefix}encoder.layer.{{}}."
    return {
        "embeddings/word_embeddings": embedding(f"{prefix}embeddings.word_embeddings"),
        "embeddings/position_embeddings": embedding(f"{prefix}embeddings.position_embeddings"),
        "embeddings/token_type_embeddings": embedding(f"{prefix}embeddings.token_type_embeddings"),
        "embeddings/LayerNorm": norm(f"{prefix}embeddings.LayerNorm"),
        "encoder/layer/attention/self/query": linear(f"{inside}attention.self.query"),
        "encoder/layer/attention/self/key": linear(f"{inside}attention.self.key"),
        "encoder/layer/attention/self/value": linear(f"{inside}attention.self.value"),
        "encoder/layer/attention/output/dense": linear(f"{inside}attention.output.dense"),
        "encoder/layer/attention/output/LayerNorm": norm(f"{inside}attention.output.LayerNorm"),
        "encoder/layer/intermediate/dense": linear(f"{inside}intermediate.dense"),
        "encoder/layer/output/dense": linear(f"{inside}output.dense"),
        "encoder/layer/output/LayerNorm": norm(f"{inside}output.LayerNorm"),
        "classifier": linear("classifier"),
    }


_DISTILBERT = {
    "embeddings/word_embeddings": embedding("distilbert.embeddings.word_embeddings"),
    "embeddings/position_embeddings": embedding("distilbert.embeddings.position_embeddings"),
    "embeddings/LayerNorm": norm("distilbert.embeddings.LayerNorm"),
    "transformer/layer/attention/q_lin": linear("distilbert.transformer.layer.{}.attention.q_lin"),
    "transformer/layer/attention/k_lin": linear("distilbert.transformer.layer.{}.attention.k_lin"),
    "transformer/layer/attention/v_lin": linear("distilbert.transformer.layer.{}.attention.v_lin"),
    "transformer/layer/attention/out_lin": linear("distilbert.transformer.layer.{}.attention.out_lin"),
    "transformer/layer/sa_layer_norm": norm("distilbert.transformer.layer.{}.sa_layer_norm"),
    "transformer/layer/ffn/lin1": linear("distilbert.transformer.layer.{}.ffn.lin1"),
    "transformer/layer/ffn/lin2": linear("distilbert.transformer.layer.{}.ffn.lin2"),
    "transformer/layer/output_layer_norm": norm("distilbert.transformer.layer.{}.output_layer_norm"),
    "pre_classifier": linear("pre_classifier"),
    "classifier": linear("classifier"),
}

_family = partial(Family, read=read, write=write, model=Encoder, heads=("classifier",))
FAMILIES = (
    _family(kinds={"bert": "BertModel"}, modules={**_bert("bert."), "pooler/dense": linear("bert.pooler.dense")},
            prefix="bert.", other_heads=r"(bert\.)?pooler\..*|(cls|classifier|qa_outputs)\..*"),
    _family(kinds={"roberta": "RobertaModel"}, prefix="roberta.",
            modules={**_bert("roberta."), "classifier/dense": linear("classifier.dense"),
                     "classifier/out_proj": linear("classifier.out_proj")},
            other_heads=r"(roberta\.)?pooler\..*|(lm_head|classifier|qa_outputs)\..*"),
    _family(kinds={"distilbert": "DistilBertModel"}, modules=_DISTILBERT, prefix="distilbert.",
            other_heads=r"(vocab_\w+|pre_classifier|classifier|qa_outputs)\..*"),
)
