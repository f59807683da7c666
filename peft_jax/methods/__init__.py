"""Fine-tuning methods, one file each: this is their table of contents.

``METHODS`` are the names that ``config.method.name`` may have, ``FORMATS`` the kinds of adapter file that can be read.
"""

from peft_jax.methods import ia3 as _ia3
from peft_jax.methods import loha as _loha
from peft_jax.methods import lokr as _lokr
from peft_jax.methods import lora as _lora
from peft_jax.methods.ia3 import ia3
from peft_jax.methods.loha import loha
from peft_jax.methods.lokr import lokr
from peft_jax.methods.lora import lora

METHODS = {"ia3": ia3, "loha": loha, "lokr": lokr, "lora": lora}
FORMATS = (_ia3.FORMAT, _loha.FORMAT, _lokr.FORMAT, _lora.FORMAT)

__all__ = ["FORMATS", "METHODS", "ia3", "loha", "lokr", "lora"]
