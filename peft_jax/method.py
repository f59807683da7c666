"""What a fine-tuning method is, how two become one, and how one is bound to a model."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from peft_jax import quant
from peft_jax.core import arguments, tree
from peft_jax.core.peft_format import Format
from peft_jax.core.tree import check_leaves as check_leaves
from peft_jax.core.tree import check_method_leaves, owns
from peft_jax.errors import PeftJaxError

TRAINABLE, FROZEN = "trainable", "frozen"


def _no_padding(params: Mapping[str, Any]) -> int:
    return 0


def _same_optimizer(optimizer: Any, total_steps: int) -> Any:
    return optimizer


class Method(NamedTuple):
    """A fine-tuning method: pure functions over a parameter tree.

    Fields:
      init: ``(rng, params, axes=None) -> params``. Adds leaves beside those that they change. Works on the tree alone,
        so on shapes too, under ``jax.eval_shape``. ``axes`` comes from :func:`peft_jax.kernel_axes`.
      intercept: ``(next_fun, args, kwargs, context) -> output``, a flax.linen interceptor that reads those leaves;
        ``context`` is a :class:`Context`.
      labels: ``(params) -> labels``: a string for each leaf, ``"frozen"`` or the name of an optimiser group.
      fold: ``(params) -> params`` with the method's leaves folded into the weights and gone; ``None`` where that cannot
        be done. Callers use :meth:`merge` and :attr:`mergeable`.
      config: the method's arguments in Hugging Face peft's words, with ``peft_type``; what a saved adapter states.
      padding: ``(params) -> int``: trainable elements that are only there to give stacked layers one shape. They are
        zero, stay zero, and are not counted as parameters.
      stored: how an adapter file holds the leaves, ``None`` where it does not.
      optimizer: ``(optax transformation, steps of the training) -> optax transformation`` over the trainable leaves,
        where a method has a say in what a step does to them.
      penalty: ``(params) -> float32 scalar``, added to the loss, in nats per answer token, where the method wants one.
      parts: the methods of a chain.
      prepare: ``(model, base params, batches) -> Method``, of a method whose ``init`` needs to see data first: what it
        gives is used in its place. ``batches`` can be gone through more than once, each is a dict of arrays as in
        training.
      convert: ``(path, array, KernelAxes, names) -> leaf`` of one entry of a leaf's stack, where the method changes a
        leaf's type: so weights can be read from a file without all of them being there in high precision. ``names`` are
        all the names of the leaf's module. ``init`` leaves alone what was converted.
      leaves: the names of all leaves that the method itself adds, trained and frozen; one that ends in a slash is a
        folder of such leaves. Empty where the method adds none, or does not say.
      base_quantization: the quantisation, a method with ``convert``, that ``init`` itself gives a plain base (LoftQ). A
        saved adapter belongs to a base that was quantised so.
      along: of leaves beside a kernel, what their axes run along, the stack left out: "inputs" or "outputs" of the
        kernel, or ``None``. On a mesh they are cut as it is.
    """

    init: Callable[..., tree.Tree]
    intercept: Callable[..., Any]
    labels: Callable[[Mapping[str, Any]], tree.Tree]
    fold: Callable[[Mapping[str, Any]], tree.Tree] | None
    config: Mapping[str, Any]
    padding: Callable[[Mapping[str, Any]], int] = _no_padding
    stored: Format | None = None
    optimizer: Callable[[Any, int], Any] = _same_optimizer
    penalty: Callable[[Mapping[str, Any]], jax.Array] | None = None
    parts: tuple["Method", ...] = ()
    prepare: Callable[..., "Method"] | None = None
    leaves: tuple[str, ...] = ()
    convert: Callable[..., Any] | None = None
    base_quantization: "Method | None" = None
    along: Mapping[str, tuple[str | None, ...]] = MappingProxyType({})

    def __repr__(self) -> str:
        """Its kind, or those of a chain: what a message or a notebook can show."""
        return f"Method({' + '.join(part.config.get('peft_type', '?') for part in self.parts or (self,))})"

    @property
    def mergeable(self) -> bool:
        """Whether the method can be folded into the weights of the model."""
        return self.fold is not None

    def merge(self, params: Mapping[str, Any]) -> tree.Tree:
        """Plain parameters that compute what ``params`` do with the method: its leaves folded into the weights.

        Raises ``PeftJaxError`` where the method is not :attr:`mergeable`, and where ``params`` lack its leaves.
        """
        if self.fold is None:
            raise PeftJaxError(f"merge: {_unmergeable(self)} cannot be folded into the weights: save the adapter "
                               "(save_adapter) and use bind(method, model). method.mergeable says so beforehand.")
        return self.fold(params)


def _unmergeable(method: Method) -> str:
    """The parts that cannot be merged, by their kinds."""
    return ", ".join(dict.fromkeys(part.config["peft_type"] for part in method.parts or (method,) if part.fold is None))


def _pass(next_fun, args, kwargs, context):
    return next_fun(*args, **kwargs)


def _frozen(params: Mapping[str, Any]) -> tree.Tree:
    return tree.map_paths(lambda path, leaf: FROZEN, params)


def _same(params):
    return params


# The base model as it is: nothing is added, nothing trains. Bound, it reads quantised leaves.
BASE = Method(init=lambda rng, params, axes=None: params, intercept=_pass, labels=_frozen, fold=_same,
              config={"peft_type": "BASE"})


def chain(*methods: Method) -> Method:
    """Several methods as one; the first is applied first. A leaf trains where any of them says so, one that a
    method added only where that method does.

    Raises ``PeftJaxError`` for no method, and on ``init`` and ``labels`` where two give one leaf different optimiser
    groups or one would train a trained leaf of the other.
    """
    if not methods:
        raise PeftJaxError("chain() was given no method: name at least one.")
    if odd := [one for one in methods if not isinstance(one, Method)]:
        raise PeftJaxError(f"chain: an argument is {arguments.described(odd[0])}: give methods, one by one, "
                           "chain(lora(), ia3()).")
    return Method(
        init=partial(_init_chain, methods),
        intercept=partial(_intercept_chain, methods),
        labels=partial(_label_chain, methods),
        fold=partial(_fold_chain, methods) if all(method.mergeable for method in methods) else None,
        config={"peft_type": "CHAIN", "methods": tuple(method.config for method in methods)},
        padding=lambda params: sum(method.padding(params) for method in methods),
        optimizer=partial(_chain_optimizer, methods),
        penalty=partial(_sum_penalties, methods) if any(method.penalty for method in methods) else None,
        parts=methods,
        prepare=partial(_prepare_chain, methods) if any(method.prepare for method in methods) else None,
        leaves=tuple(dict.fromkeys(name for method in methods for name in method.leaves)),
        convert=_conversion(methods),
        along={name: axes for method in methods for name, axes in method.along.items()},
    )


def _init_chain(methods, rng, params, axes=None) -> tree.Tree:
    for key, method in zip(jax.random.split(rng, len(methods)), methods, strict=True):
        params = method.init(key, params, axes=axes)
    _label_chain(methods, params)
    return params


def _intercept_chain(methods, next_fun, args, kwargs, context):
    for method in methods:
        next_fun = partial(with_interceptor, method.intercept, next_fun, context)
    return next_fun(*args, **kwargs)


def _label_chain(methods, params) -> tree.Tree:
    labels = _agree(methods, [tree.flatten(method.labels(params)) for method in methods])
    for path, leaf in tree.flatten(params).items():
        if labels[path] != FROZEN and quant.is_leaf(leaf):
            raise quant.cannot_train(path, leaf)
    return tree.map_paths(lambda path, _: labels[path], params)


def _fold_chain(methods, params) -> tree.Tree:
    for method in methods:
        check_method_leaves(method, params)
    for method in methods:  # the first is nearest to the weights, the next changes what it made of them
        params = method.merge(params)
    return params


def _chain_optimizer(methods, optimizer, total_steps):
    for method in methods:
        optimizer = method.optimizer(optimizer, total_steps)
    return optimizer


def _sum_penalties(methods, params) -> Any:
    return sum(method.penalty(params) for method in methods if method.penalty)


def _prepare_chain(methods, model, params, batches) -> Method:
    return chain(*[method.prepare(model, params, batches) if method.prepare else method for method in methods])


def _conversion(methods: Sequence[Method]) -> Callable[..., Any] | None:
    """Those of the first methods one by one; what stands behind another would not see what that does to plain weights.
    """
    first = [one.convert for one in itertools.takewhile(lambda one: one.convert, methods) if one.convert]

    def convert(path, array, axes, names):
        for one in first:
            array = one(path, array, axes, names)
        return array

    return convert if first else None


def with_interceptor(intercept, next_fun, context, *args, **kwargs):
    """A module's call ``next_fun`` with ``intercept`` around it."""
    return intercept(next_fun, args, kwargs, context)


def _agree(methods: Sequence[Method], labels: list[dict[str, str]]) -> dict[str, str]:
    """One label per leaf: its owner's, else the only one that is not frozen, if there is one."""
    merged = {}
    for path in labels[0]:
        owners = [own for own, method in enumerate(methods) if owns(method.leaves, path)]
        if owners and any(labels[own][path] != FROZEN for own in owners):
            _check_others(methods, labels, owners, path)
        groups = {labels[i][path] for i in owners or range(len(methods))} - {FROZEN}
        if len(groups) > 1:
            raise PeftJaxError(f"two methods of a chain put '{path}' into different groups: {sorted(groups)}.")
        merged[path] = groups.pop() if groups else FROZEN
    return merged


def _check_others(methods, labels, owners, path) -> None:
    for other in [i for i in range(len(methods)) if i not in owners and labels[i][path] != FROZEN]:
        kind, owner = (methods[i].config["peft_type"] for i in (other, owners[0]))
        first = f", or name {kind} first in the chain" if other > owners[0] else ""
        raise PeftJaxError(f"{kind} would train '{path}' too, a leaf of {owner}: leave that module out of one of "
                           f"them{first}.")


