"""Fine-tuning methods, one file each: this is their table of contents.

``METHODS`` are the names that ``config.method.name`` may have, ``FORMATS`` the kinds of adapter file that can be read.
"""

from peft_jax.methods import adalora as _adalora
from peft_jax.methods import bitfit as _bitfit
from peft_jax.methods import bottleneck as _bottleneck
from peft_jax.methods import compacter as _compacter
from peft_jax.methods import dora as _dora
from peft_jax.methods import full as _full
from peft_jax.methods import hra as _hra
from peft_jax.methods import ia3 as _ia3
from peft_jax.methods import ln_tuning as _ln_tuning
from peft_jax.methods import loha as _loha
from peft_jax.methods import lokr as _lokr
from peft_jax.methods import lora as _lora
from peft_jax.methods import oft as _oft
from peft_jax.methods import prefix as _prefix
from peft_jax.methods import prompt as _prompt
from peft_jax.methods import ptuning as _ptuning
from peft_jax.methods import trainable_tokens as _trainable_tokens
from peft_jax.methods import vera as _vera
from peft_jax.methods.adalora import adalora
from peft_jax.methods.bitfit import bitfit
from peft_jax.methods.bottleneck import bottleneck
from peft_jax.methods.compacter import compacter
from peft_jax.methods.dora import dora
from peft_jax.methods.full import full
from peft_jax.methods.houlsby import houlsby
from peft_jax.methods.hra import hra
from peft_jax.methods.ia3 import ia3
from peft_jax.methods.ln_tuning import ln_tuning
from peft_jax.methods.loha import loha
from peft_jax.methods.lokr import lokr
from peft_jax.methods.lora import lora
from peft_jax.methods.lorafa import lorafa
from peft_jax.methods.loraplus import loraplus
from peft_jax.methods.oft import oft
from peft_jax.methods.parallel_adapter import parallel_adapter
from peft_jax.methods.pfeiffer import pfeiffer
from peft_jax.methods.prefix import prefix, prefix_from_ids
from peft_jax.methods.prompt import prompt
from peft_jax.methods.ptuning import ptuning
from peft_jax.methods.quantize import quantize, requantize
from peft_jax.methods.trainable_tokens import trainable_tokens
from peft_jax.methods.vera import vera

METHODS = {
    "adalora": adalora,
    "bitfit": bitfit,
    "bottleneck": bottleneck,
    "compacter": compacter,
    "dora": dora,
    "full": full,
    "houlsby": houlsby,
    "hra": hra,
    "ia3": ia3,
    "ln_tuning": ln_tuning,
    "loha": loha,
    "lokr": lokr,
    "lora": lora,
    "lorafa": lorafa,
    "loraplus": loraplus,
    "oft": oft,
    "parallel_adapter": parallel_adapter,
    "pfeiffer": pfeiffer,
    "prefix": prefix,
    "prompt": prompt,
    "ptuning": ptuning,
    "quantize": quantize,
    "trainable_tokens": trainable_tokens,
    "vera": vera,
}
FORMATS = (
    _adalora.FORMAT,
    _bitfit.FORMAT,
    _bottleneck.FORMAT,
    _compacter.FORMAT,
    _dora.FORMAT,
    _full.FORMAT,
    _hra.FORMAT,
    _ia3.FORMAT,
    _ln_tuning.FORMAT,
    _loha.FORMAT,
    _lokr.FORMAT,
    _lora.FORMAT,
    _oft.FORMAT,
    _prefix.FORMAT,
    _prefix.FORMAT_UNSHIFTED,
    _prompt.FORMAT,
    _ptuning.FORMAT,
    _trainable_tokens.FORMAT,
    _vera.FORMAT,
)

__all__ = [
    "FORMATS",
    "METHODS",
    "adalora",
    "bitfit",
    "bottleneck",
    "compacter",
    "dora",
    "full",
    "houlsby",
    "hra",
    "ia3",
    "ln_tuning",
    "loha",
    "lokr",
    "lora",
    "lorafa",
    "loraplus",
    "oft",
    "parallel_adapter",
    "pfeiffer",
    "prefix",
    "prefix_from_ids",
    "prompt",
    "ptuning",
    "quantize",
    "requantize",
    "trainable_tokens",
    "vera",
]
