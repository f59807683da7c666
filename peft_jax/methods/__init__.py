"""Fine-tuning methods, one file each: this is their table of contents.

``METHODS`` are the names that ``config.method.name`` may have, ``FORMATS`` the kinds of adapter file that can be read.
"""

from peft_jax.methods import bottleneck as _bottleneck
from peft_jax.methods import compacter as _compacter
from peft_jax.methods import ia3 as _ia3
from peft_jax.methods import lora as _lora
from peft_jax.methods.bottleneck import bottleneck
from peft_jax.methods.compacter import compacter
from peft_jax.methods.houlsby import houlsby
from peft_jax.methods.ia3 import ia3
from peft_jax.methods.lora import lora
from peft_jax.methods.parallel_adapter import parallel_adapter
from peft_jax.methods.pfeiffer import pfeiffer

METHODS = {
    "bottleneck": bottleneck,
    "compacter": compacter,
    "houlsby": houlsby,
    "ia3": ia3,
    "lora": lora,
    "parallel_adapter": parallel_adapter,
    "pfeiffer": pfeiffer,
}
FORMATS = (_bottleneck.FORMAT, _compacter.FORMAT, _ia3.FORMAT, _lora.FORMAT)

__all__ = ["FORMATS", "METHODS", *METHODS]
