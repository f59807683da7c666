"""The papers' experiments cannot be run here: each is checked by the number of parameters that it trains."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs import parse
from configs.check import check, tidy
from peft_jax import bind
from peft_jax.cli import console
from peft_jax.cli.build_method import build_method
from peft_jax.core import tree
from peft_jax.evaluation.objectives import objective_of
from peft_jax.hub import families, model_config
from peft_jax.hub.model_files import with_head

ROOT = Path(__file__).resolve().parents[1]

# The config.json of each model, as far as it decides shapes.
MODELS = {
    "openai-community/gpt2-medium": {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 1024, "n_layer": 24,
                                     "n_head": 16, "n_positions": 1024},
    "FacebookAI/roberta-base": {"model_type": "roberta", "vocab_size": 50265, "hidden_size": 768,
                                "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                                "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
                                "architectures": ["RobertaForMaskedLM"]},
    "FacebookAI/roberta-large": {"model_type": "roberta", "vocab_size": 50265, "hidden_size": 1024,
                                 "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                                 "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
                                 "architectures": ["RobertaForMaskedLM"]},
    "huggyllama/llama-7b": {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
                            "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "meta-llama/Llama-3.2-3B": {"model_type": "llama", "vocab_size": 128256, "hidden_size": 3072,
                                "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
                                "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
}

# experiment: (trainable, of all).
COUNTS = {
    "paper_lora_gpt2_e2e": (393_216, 354_823_168 + 393_216),
    "paper_lora_roberta_sst2": (887_042, 124_055_040 + 592_130 + 294_912),
    "paper_lora_llama_commonsense": (56_098_816, 6_794_514_432),
    "paper_lora_llama32_metamath": (9_175_040, 3_212_749_824 + 9_175_040),
    "paper_ia3_llama32_metamath": (286_720, 3_212_749_824 + 286_720),
    "paper_prefix_llama32_metamath": (11_468_800, 3_212_749_824 + 11_468_800),
    "paper_prefix_gpt2_e2e": (25_744_896, 354_823_168 + 25_744_896),
    "paper_houlsby_roberta_sst2": (835_968 + 1_051_650, 354_310_144 + 1_051_650 + 835_968),
}

# experiment: (an argument of the method, its value, trainable with it).
OTHERS = {
    "paper_prefix_llama32_metamath": [("num_virtual_tokens", 50, 2_867_200)],
    "paper_prefix_gpt2_e2e": [("prefix_projection", False, 245_760)],
}


def test_every_paper_experiment_is_counted():
    assert {file.stem for file in (ROOT / "experiments").glob("paper_*.py")} == COUNTS.keys()


def counts(config, sizes) -> tuple[int, int]:
    """(trainable, all) from shapes alone; raises where the forward pass would not read what is trained."""
    sizes = with_head(model_config.from_hf(sizes), objective_of(config.task).head(config.task))
    base = tree.unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32)
                           for path, shape in model_config.param_shapes(sizes).items()})
    method = build_method(config)
    params = jax.eval_shape(method.init, jax.random.key(0), base)
    apply = bind(method, families.of(sizes).model(sizes))
    jax.eval_shape(lambda leaves: apply({"params": leaves}, jnp.zeros((1, 4), jnp.int32)), params)
    return console.parameter_counts(method, base, params)


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_as_many_parameters_train_as_the_paper_or_peft_says(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, _ = parse.load_experiment(f"experiments/{name}.py")
    check(tidy(config.lock()))
    assert counts(config, MODELS[config.model.source]) == COUNTS[name]
    for key, value, count in OTHERS.get(name, ()):
        config.method[key] = value
        assert counts(config, MODELS[config.model.source])[0] == count
