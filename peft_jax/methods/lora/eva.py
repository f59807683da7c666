"""EVA, explained variance adaptation (arXiv 2410.07170): a start and ranks for a LoRA from the inputs that it will see.

A module's A begins as the leading right singular vectors of its centred inputs X (tokens, in), B at zero. The ranks are
shared out anew: all modules' vectors compete by the share of their module's variance that they explain, and the best of
them, as many as there were ranks in all, are taken; no module gets more than ``rho`` times its own.

The decomposition is updated batch by batch (Ross et al. 2008, as peft's incremental PCA), with an exact SVD where peft
has a randomised one, over every real token. It ends with the batches, or once no wanted vector turns any more.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from peft_jax.core import kernel_axes, rows, targeting, tree, validation
from peft_jax.errors import PeftJaxError

DEFAULTS = {"rho": 2.0, "tau": 0.99, "whiten": False, "adjust_scaling_factors": True}


class Components(NamedTuple):
    """Of one stack of modules: vectors times singular values (*stack, k, in), mean (*stack, in), tokens so far, total
    variance times tokens (*stack)."""

    scaled: jax.Array
    mean: jax.Array
    tokens: jax.Array
    total: jax.Array


def settings(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """peft's ``EvaConfig`` with ``options`` in place of its defaults; raises ``PeftJaxError`` for what is none."""
    return validation.check_settings("eva_config", options, DEFAULTS, "{'rho': 1.0}")


def check(options: Mapping[str, Any] | None) -> None:
    """Raise ``PeftJaxError`` for a setting that there is not, or a value out of range."""
    asked = settings(options)
    for name in ("rho", "tau"):
        validation.check_number(f"eva_config['{name}']", asked[name])
    if asked["rho"] < 1 or not 0 < asked["tau"] <= 1:
        raise PeftJaxError(f"eva_config: rho={asked['rho']} must be at least 1, tau={asked['tau']} above 0, at most 1.")


def analyse(options: Mapping[str, Any] | None, model: Any, params: Mapping[str, Any],
            batches: Iterable[Mapping[str, Any]], targets: Sequence[targeting.Target], ranks: Mapping[str, int],
           ) -> tuple[dict[str, int], dict[str, jax.Array]]:
    """The ranks of the modules by name, those without one left out, and A by path, (*stack, in, rho times r).

    Args:
      options: ``eva_config``. targets: of the LoRA. ranks: of each module by name, before they are shared out.
      batches: dicts with ``input_ids`` and maybe ``positions`` (..., batch, seq) and, where there is padding,
        ``lengths`` (..., batch) or ``segment_ids`` (..., batch, seq), as :mod:`peft_jax.data.batches` has them.
    Raises:
      PeftJaxError: no batches, modules that the pass does not call or whose nn.scan withholds intermediates.
    """
    asked = settings(options)
    most = {target.path: round(asked["rho"] * max(ranks[name] for name in target.names)) for target in targets}
    widths = {target.path: min(most[target.path], math.prod(target.axes.inputs)) for target in targets}
    states: dict[str, Components] = {}
    groups: dict[str, str] = {}
    for batch in batches:
        inputs, real = _inputs(model, params, batch, targets)
        groups = groups or _equal(inputs)
        before = dict(states)
        for path in dict.fromkeys(groups.values()):
            one = states[path] if path in states else _empty(inputs[path], _width(path, groups, widths))
            states[path] = _update(one, inputs[path], real)
        if before and all(_settled(before[path], states[path], asked["tau"]) for path in states):
            break
    if not states:
        raise PeftJaxError("eva: there are no batches to look at.")
    states = {path: states[groups[path]] for path in groups}
    return _share(asked, targets, ranks, states), {t.path: _start(states[t.path], asked["whiten"]) for t in targets}


def _inputs(model: Any, params: Mapping[str, Any], batch: Mapping[str, Any], targets: Sequence[targeting.Target],
           ) -> tuple[dict[str, jax.Array], jax.Array]:
    """{path: inputs (*stack, tokens, in)} of one batch, and which tokens are real (tokens,)."""
    paths = {target.path: target.axes for target in targets}

    def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path = tree.join(context.module.path)
        if context.method_name == "__call__" and path in paths:
            (x, *_), _ = kernel_axes.input_first(context.module, "__call__", args, kwargs)
            x = kernel_axes.inputs_last(context.module, x)
            flat = x.astype(jnp.float32).reshape(-1, math.prod(paths[path].inputs))
            context.module.sow("intermediates", "seen", flat)
        return next_fun(*args, **kwargs)

    width = np.shape(batch["input_ids"])[-1]
    given = {name: np.asarray(batch[name]).reshape(-1) if name == "lengths" else
             np.asarray(batch[name]).reshape(-1, width)
             for name in ("input_ids", "positions", *rows.NAMES) if name in batch}
    with nn.intercept_methods(note):
        _, seen = model.apply({"params": params}, **given, mutable=["intermediates"])
    flat = {path: _at(seen.get("intermediates", {}), path) for path in paths}
    absent = [path for path, x in flat.items() if x is None or x.shape[:-2] != paths[path].stack]
    if absent:
        raise PeftJaxError(f"eva: the inputs of '{absent[0]}' cannot be seen: the pass does not call it, or calls it "
                           "more than once, or its nn.scan lacks variable_axes={'intermediates': 0}.")
    return flat, jnp.asarray(rows.real_tokens(given)).ravel()


def _at(seen: Mapping[str, Any], path: str) -> Any:
    node: Any = seen
    for part in (*path.split("/"), "seen"):
        node = node.get(part, {})
    return node[0] if len(node) == 1 else None


def _equal(inputs: Mapping[str, jax.Array]) -> dict[str, str]:
    """{path: the first path with the same inputs}: queries, keys and values share one decomposition."""
    first: dict[str, str] = {}
    for path, x in inputs.items():
        first[path] = next((p for p in dict.fromkeys(first.values()) if inputs[p].shape == x.shape
                            and bool((inputs[p] == x).all())), path)
    return first


def _width(path: str, groups: Mapping[str, str], widths: Mapping[str, int]) -> int:
    return int(max(widths[other] for other, first in groups.items() if first == path))


def _empty(x: jax.Array, width: int) -> Components:
    stack = x.shape[:-2]
    return Components(scaled=jnp.zeros((*stack, width, x.shape[-1])), mean=jnp.zeros((*stack, x.shape[-1])),
                      tokens=jnp.zeros(()), total=jnp.zeros(stack))


@jax.jit
def _update(components: Components, x: jax.Array, real: jax.Array) -> Components:
    """The decomposition of all tokens so far, from that of the earlier ones and the new ``x`` (*stack, tokens, in)."""
    new = real.sum()
    count = components.tokens + new
    mean = (x * real[:, None]).sum(-2) / jnp.maximum(new, 1)
    centred = (x - mean[..., None, :]) * real[:, None]
    shift = jnp.sqrt(components.tokens * new / jnp.maximum(count, 1)) * (components.mean - mean)
    rows = jnp.concatenate([components.scaled, centred, shift[..., None, :]], -2)
    _, s, v = jnp.linalg.svd(rows, full_matrices=False)
    most = components.scaled.shape[-2]
    scaled = s[..., :most, None] * v[..., :most, :]
    total = components.total + (centred**2).sum((-2, -1)) + (shift**2).sum(-1)
    both = (components.tokens * components.mean + new * mean) / jnp.maximum(count, 1)[..., None]
    return Components(scaled=scaled, mean=both, tokens=count, total=total)


def _unit(scaled: jax.Array) -> jax.Array:
    length = jnp.linalg.norm(scaled, axis=-1, keepdims=True)
    return scaled / jnp.where(length > 0, length, 1)


def _settled(before: Components, after: Components, tau: float) -> bool:
    turned = (_unit(before.scaled) * _unit(after.scaled)).sum(-1)
    return bool((jnp.abs(turned) >= tau).all())


def _share(asked: Mapping[str, Any], targets: Sequence[targeting.Target], ranks: Mapping[str, int],
           states: Mapping[str, Any]) -> dict[str, int]:
    """The new rank of each module that keeps one; of equal shares the earlier module's is taken."""
    offers = []
    for target in targets:
        components = states[target.path]
        explained = np.asarray((components.scaled**2).sum(-1) / jnp.maximum(components.total, 1e-30)[..., None])
        for name, shares in zip(target.names, explained.reshape(len(target.names), -1), strict=True):
            offers += [(share, name) for share in shares[:round(asked["rho"] * ranks[name])]]
    offers.sort(key=lambda offer: -offer[0])
    taken = [name for _, name in offers[:sum(ranks.values())]]
    return {name: taken.count(name) for name in ranks if name in taken}


def _start(components: Components, whiten: bool) -> jax.Array:
    vectors = _unit(components.scaled)
    if whiten:
        size = jnp.linalg.norm(components.scaled, axis=-1, keepdims=True)
        vectors = vectors / jnp.sqrt(jnp.where(size > 0, size, 1))
    return jnp.swapaxes(vectors, -1, -2)
