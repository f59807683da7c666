"""Compacter (arXiv 2106.04647, eq. 4 to 6): adapters whose matrices are sums of Kronecker products.

    D = sum_i A_i (x) (S_i T_i)       i = 1 .. phm_dim; U likewise; placed and used as a Houlsby adapter's

A_i (p, p), p = phm_dim, are shared by all adapters of the model, at the root of the tree: ``phm_rule`` (p, p, p). In
each adapted module stand, for D, ``phm_down_left`` (*stack, p, width/p, r) and ``phm_down_right`` (*stack, p, r, b/p);
for U ``phm_up_left`` (*stack, p, b/p, r) and ``phm_up_right`` (*stack, p, r, width/p); biases and the rest as in
``bottleneck.py``. Not factorised, a pair is one leaf, ``phm_down`` (*stack, p, width/p, b/p); a
factorised rule is ``phm_rule_left`` (p, p, 1) and ``phm_rule_right`` (p, 1, p).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core import validation
from peft_jax.core.peft_format import PREFIX, Format, Naming, Slot, arguments_of
from peft_jax.core.targeting import Patterns
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method
from peft_jax.methods.bottleneck import bottleneck as bn
from peft_jax.methods.bottleneck import placement


def compacter(reduction_factor: float = 32.0, non_linearity: str = "gelu", *, phm_dim: int = 4, phm_rank: int = 1,
              factorized_phm_W: bool = True, shared_phm_rule: bool = True, factorized_phm_rule: bool = False,
              phm_init_range: float = 1e-4, phm_bias: bool = True, bottleneck_size: int | None = None,
              mh_adapter: bool = True, output_adapter: bool = True, scaling: float | str = 1.0,
              original_ln_before: bool = False, ln_before: bool = False, ln_after: bool = False, dropout: float = 0.0,
              leave_out: int | tuple[int, ...] = (), attention_modules: Patterns = ("self_attn",),
              output_modules: Patterns = ("mlp",),
              norm_modules: Patterns = ("input_layernorm", "post_attention_layernorm"), hidden_size: int | None = None,
              modules_to_save: tuple[str, ...] | None = None) -> Method:
    """Compacter; arguments and defaults are AdapterHub's ``CompacterConfig``'s, the rest as of
    :func:`peft_jax.bottleneck`. Compacter++ is ``mh_adapter=False, original_ln_before=True``.

    Args:
      phm_dim: p, the number of products; it must divide the width and the bottleneck. phm_rank: r.
      factorized_phm_W, factorized_phm_rule: whether each S_i T_i, each A_i, is a product of two leaves.
      shared_phm_rule: False gives each matrix of each module an A of its own.
      phm_init_range: standard deviation of a shared A at the start, small so that training starts near the base model;
        an A that is not shared starts with 0.01. phm_bias: whether there are biases.

    >>> method = compacter(2, phm_dim=2, mh_adapter=False)
    >>> params = method.init(jax.random.key(0), {"mlp": {"down_proj": {"kernel": jnp.ones((8, 12))}}})
    >>> params["phm_rule"].shape, params["mlp"]["phm_down_left"].shape, params["mlp"]["phm_down_right"].shape
    ((2, 2, 2), (2, 6, 1), (2, 1, 3))
    """
    for name, number in (("phm_dim", phm_dim), ("phm_rank", phm_rank)):
        validation.check_whole(name, number)
    rules = {"factorized_phm_W": factorized_phm_W, "shared_phm_rule": shared_phm_rule,
             "factorized_phm_rule": factorized_phm_rule, "phm_bias": phm_bias}
    validation.check_switches(rules, *rules)
    validation.check_number("phm_init_range", phm_init_range)
    return bn.build(
        MATRICES, FORMAT, **rules, phm_dim=phm_dim, phm_rank=phm_rank, phm_init_range=phm_init_range,
        reduction_factor=reduction_factor, non_linearity=non_linearity, bottleneck_size=bottleneck_size,
        mh_adapter=mh_adapter, output_adapter=output_adapter, scaling=scaling, original_ln_before=original_ln_before,
        ln_before=ln_before, ln_after=ln_after, dropout=dropout, leave_out=leave_out,
        attention_modules=attention_modules, output_modules=output_modules, norm_modules=norm_modules,
        hidden_size=hidden_size, modules_to_save=modules_to_save, is_parallel=False)


def _start(config: Mapping[str, Any], key: jax.Array, place: placement.Place) -> dict[str, jax.Array]:
    """Glorot-normal S and T (or their product), zero biases, as AdapterHub starts them."""
    p, narrow = config["phm_dim"], bn.size(config, place.width)
    if place.width % p or narrow % p:
        raise PeftJaxError(f"phm_dim={p} does not divide the width {place.width} and the bottleneck {narrow} of "
                           f"'{place.path}': choose another, or another bottleneck_size.")
    new = {}
    for number, (name, rows, columns) in enumerate([("down", place.width, narrow), ("up", narrow, place.width)]):
        k = jax.random.fold_in(key, number)
        new |= _pair(config["factorized_phm_W"], k, f"phm_{name}", (*place.stack, p), rows // p, columns // p,
                     config["phm_rank"])
        if not config["shared_phm_rule"]:
            new |= _rule(config, jax.random.fold_in(k, 2), f"phm_{name}_rule", place.stack, 0.01)
        if config["phm_bias"]:
            new[f"adapter_{name}_bias"] = jnp.zeros((*place.stack, columns), jnp.float32)
    return new


def _pair(factorised: bool, key: jax.Array, name: str, front: tuple[int, ...], rows: int, columns: int, rank: int,
          ) -> dict[str, jax.Array]:
    parts = {f"{name}_left": (rows, rank), f"{name}_right": (rank, columns)} if factorised else {name: (rows, columns)}
    return {leaf: jax.random.normal(k, (*front, *shape), jnp.float32) * (2 / sum(shape)) ** 0.5
            for k, (leaf, shape) in zip(jax.random.split(key), parts.items())}


def _rule(config: Mapping[str, Any], key: jax.Array, name: str, stack: tuple[int, ...], deviation: float,
          ) -> dict[str, jax.Array]:
    p = config["phm_dim"]
    parts = {f"{name}_left": (p, 1), f"{name}_right": (1, p)} if config["factorized_phm_rule"] else {name: (p, p)}
    return {leaf: deviation * jax.random.normal(k, (*stack, p, *shape), jnp.float32)
            for k, (leaf, shape) in zip(jax.random.split(key), parts.items())}


def _shared(config: Mapping[str, Any], key: jax.Array) -> dict[str, jax.Array]:
    return _rule(config, key, "phm_rule", (), config["phm_init_range"]) if config["shared_phm_rule"] else {}


def _read(get: Callable[[str], Any], context: Any) -> tuple:
    def matrix(name: str) -> jax.Array:
        rule = _product(get, f"phm_{name}_rule")
        rule = _product(context.params.get, "phm_rule") if rule is None else rule
        inner = _product(get, f"phm_{name}")
        product = jnp.einsum("iab,icd->acbd", rule, inner, precision="highest")
        return product.reshape(rule.shape[1] * inner.shape[1], -1)

    return matrix("down"), get("adapter_down_bias"), matrix("up"), get("adapter_up_bias")


def _product(get: Callable[[str], Any], name: str) -> Any:
    """The leaf of that name, or the product of its left and right part; ``None`` where there is neither."""
    left = get(f"{name}_left")
    return get(name) if left is None else jnp.matmul(left, get(f"{name}_right"), precision="highest")


def _slots(config: Mapping[str, Any], flat: Mapping[str, Any], trained: Sequence[str], naming: Naming,
           ) -> dict[str, Slot]:
    """What modules share is stored under its own name."""
    shared = {path for path in trained if path in ROOT}
    rest = placement.slots(KEYS, config, flat, [path for path in trained if path not in shared], naming)
    return rest | {f"{PREFIX}{path}": Slot(path) for path in shared}


def _keys() -> dict[str, str]:
    """Both matrices' leaves and the keys of their tensors, ``adapter_down.W_left`` and so on in AdapterHub's words."""
    keys = {}
    for name in ("down", "up"):
        to = f"adapter_{name}"
        keys |= {f"phm_{name}": f"{to}.W", f"phm_{name}_left": f"{to}.W_left", f"phm_{name}_right": f"{to}.W_right",
                 f"phm_{name}_rule": f"{to}.phm_rule", f"phm_{name}_rule_left": f"{to}.phm_rule_left",
                 f"phm_{name}_rule_right": f"{to}.phm_rule_right", f"adapter_{name}_bias": f"{to}.b"}
    return keys


KEYS = _keys()
ROOT = ("phm_rule", "phm_rule_left", "phm_rule_right")
MATRICES = bn.Matrices(kind="COMPACTER", keys=KEYS, start=_start, read=_read, shared=_shared)
FORMAT = Format(kind="COMPACTER", make=compacter, arguments=arguments_of(compacter), slots=_slots)
# In tables and benchmarks.
SHOWN = {"arguments": {"reduction_factor": 16}, "note": "reduction 16", "checked": "`adapters` 1.3, golden values"}
