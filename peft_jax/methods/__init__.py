"""Fine-tuning methods, one file each: this is their table of contents.

``METHODS`` are the names that ``config.method.name`` may have, ``FORMATS`` the kinds of adapter file that can be read.
"""

from peft_jax.methods import adalora as _adalora
from peft_jax.methods import hra as _hra
from peft_jax.methods import ia3 as _ia3
from peft_jax.methods import loha as _loha
from peft_jax.methods import lokr as _lokr
from peft_jax.methods import lora as _lora
from peft_jax.methods import oft as _oft
from peft_jax.methods import vera as _vera
from peft_jax.methods.adalora import adalora
from peft_jax.methods.hra import hra
from peft_jax.methods.ia3 import ia3
from peft_jax.methods.loha import loha
from peft_jax.methods.lokr import lokr
from peft_jax.methods.lora import lora
from peft_jax.methods.oft import oft
from peft_jax.methods.vera import vera

METHODS = {"adalora": adalora, "hra": hra, "ia3": ia3, "loha": loha, "lokr": lokr, "lora": lora, "oft": oft,
           "vera": vera}
FORMATS = (_adalora.FORMAT, _hra.FORMAT, _ia3.FORMAT, _loha.FORMAT, _lokr.FORMAT, _lora.FORMAT, _oft.FORMAT,
           _vera.FORMAT)

__all__ = ["FORMATS", "METHODS", "adalora", "hra", "ia3", "loha", "lokr", "lora", "oft", "vera"]
