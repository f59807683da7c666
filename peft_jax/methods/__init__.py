"""Fine-tuning methods, one file each: this is their table of contents.

``METHODS`` are the names that ``config.method.name`` may have, ``FORMATS`` the kinds of adapter file that can be read.
"""

from peft_jax.methods import bitfit as _bitfit
from peft_jax.methods import full as _full
from peft_jax.methods import ia3 as _ia3
from peft_jax.methods import ln_tuning as _ln_tuning
from peft_jax.methods import lora as _lora
from peft_jax.methods import trainable_tokens as _trainable_tokens
from peft_jax.methods.bitfit import bitfit
from peft_jax.methods.full import full
from peft_jax.methods.ia3 import ia3
from peft_jax.methods.ln_tuning import ln_tuning
from peft_jax.methods.lora import lora
from peft_jax.methods.trainable_tokens import trainable_tokens

METHODS = {"bitfit": bitfit, "full": full, "ia3": ia3, "ln_tuning": ln_tuning, "lora": lora,
           "trainable_tokens": trainable_tokens}
FORMATS = (_bitfit.FORMAT, _full.FORMAT, _ia3.FORMAT, _ln_tuning.FORMAT, _lora.FORMAT, _trainable_tokens.FORMAT)

__all__ = ["FORMATS", "METHODS", "bitfit", "full", "ia3", "ln_tuning", "lora", "trainable_tokens"]
