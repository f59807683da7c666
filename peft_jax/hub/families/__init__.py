"""The families of models that can be read and written: their table of contents."""

from typing import Any

from peft_jax.errors import PeftJaxError, nearest
from peft_jax.hub.families import bert, gpt2, llama
from peft_jax.hub.families.family import Family

FAMILIES = (llama.FAMILY, gpt2.FAMILY, *bert.FAMILIES)
KINDS = {kind: family for family in FAMILIES for kind in family.kinds}


def of(config: Any) -> Family:
    """The family of a model's config. Raises ``PeftJaxError`` where it is of none."""
    kind = getattr(config, "model_type", type(config).__name__)
    if kind not in KINDS:
        raise PeftJaxError(f"model_type '{kind}' is not supported: {nearest(kind, KINDS)}")
    return KINDS[kind]
