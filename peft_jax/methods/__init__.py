"""Fine-tuning methods, one file each: this is their table of contents.

``METHODS`` are the names that ``config.method.name`` may have, ``FORMATS`` the kinds of adapter file that can be read.
"""

from peft_jax.methods import dora as _dora
from peft_jax.methods import ia3 as _ia3
from peft_jax.methods import lora as _lora
from peft_jax.methods.dora import dora
from peft_jax.methods.ia3 import ia3
from peft_jax.methods.lora import lora
from peft_jax.methods.lorafa import lorafa
from peft_jax.methods.loraplus import loraplus

METHODS = {"dora": dora, "ia3": ia3, "lora": lora, "lorafa": lorafa, "loraplus": loraplus}
FORMATS = (_dora.FORMAT, _ia3.FORMAT, _lora.FORMAT)

__all__ = ["FORMATS", "METHODS", "dora", "ia3", "lora", "lorafa", "loraplus"]
