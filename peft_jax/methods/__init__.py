"""Fine-tuning methods, one file each: this is their table of contents.

``METHODS`` are the names that ``config.method.name`` may have, ``FORMATS`` the kinds of adapter file that can be read.
"""

from peft_jax.methods import ia3 as _ia3
from peft_jax.methods import loha as _loha
from peft_jax.methods import lokr as _lokr
from peft_jax.methods import lora as _lora
from peft_jax.methods import prefix as _prefix
from peft_jax.methods import prompt as _prompt
from peft_jax.methods import ptuning as _ptuning
from peft_jax.methods.ia3 import ia3
from peft_jax.methods.loha import loha
from peft_jax.methods.lokr import lokr
from peft_jax.methods.lora import lora
from peft_jax.methods.prefix import prefix, prefix_from_ids
from peft_jax.methods.prompt import prompt
from peft_jax.methods.ptuning import ptuning

METHODS = {
    "ia3": ia3,
    "loha": loha,
    "lokr": lokr,
    "lora": lora,
    "prefix": prefix,
    "prompt": prompt,
    "ptuning": ptuning,
}
FORMATS = (
    _ia3.FORMAT,
    _loha.FORMAT,
    _lokr.FORMAT,
    _lora.FORMAT,
    _prefix.FORMAT,
    _prefix.FORMAT_UNSHIFTED,
    _prompt.FORMAT,
    _ptuning.FORMAT,
)

__all__ = [
    "FORMATS",
    "METHODS",
    "ia3",
    "loha",
    "lokr",
    "lora",
    "prefix",
    "prefix_from_ids",
    "prompt",
    "ptuning",
]
