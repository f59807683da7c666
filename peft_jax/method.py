"""What a fine-tuning method is, and how several become one."""

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
      init: ``(rng, params, axes=None) -> params``. Adds the method's leaves beside those that it changes. It needs no
        values, so it works on shapes too, under ``jax.eval_shape``. ``axes`` comes from :func:`peft_jax.kernel_axes`.
      intercept: ``(next_fun, args, kwargs, context) -> output``, a flax.linen interceptor that reads those leaves;
        ``context`` is a :class:`Context`.
      labels: ``(params) -> labels``: a string for each leaf, ``"frozen"`` or the name of an optimiser group.
      fold: ``(params) -> params`` with the method's leaves folded into the weights and gone; ``None`` where that cannot
        be done. Callers use :meth:`merge` and :attr:`mergeable`.
      config: the method's arguments in Hugging Face peft's words, with ``peft_type``; what a saved adapter states.
      padding: ``(params) -> int``: how many trainable elements only fill stacked layers up to one shape. They are zero,
        stay zero, and do not count as parameters.
      stored: how an adapter file holds the leaves; ``None`` where no file can.
      optimizer: ``(optax transformation, steps of the training) -> optax transformation`` over the trainable leaves.
        A method sets it to change the steps: AdaLoRA sets ranks to zero in them. Clipping goes before it.
      penalty: ``(params) -> float32 scalar``, added to the loss, in nats per answer token; ``None`` for no penalty.
      parts: the methods of a chain; empty for one that is none.
      prepare: ``(model, base params, batches) -> Method``, where ``init`` needs to see data; ``None`` elsewhere. The
        method that it returns is the one to use. It may go through ``batches`` more than once; each is a dict of
        arrays, as in training.
      convert: ``(path, array, KernelAxes, names) -> leaf``, where the method changes a leaf's type. ``array`` is one
        entry of the leaf's stack, so that a file can be read piece by piece and its weights never lie in memory in
        high precision. ``names`` are those of the module, one for each entry. ``init`` leaves such leaves as they are.
      leaves: the names of all leaves that the method adds, trained or frozen. A name that ends in a slash is a folder
        of such leaves. Empty where the method adds none, or does not tell.
      base_quantization: a method with ``convert``, where ``init`` itself quantises a plain base, as LoftQ does. A
        saved adapter then fits only a base that was quantised in this way.
      along: ``{leaf: (for each of its axes behind the stack)}``: "inputs" or "outputs" where the axis runs along the
        kernel's, else ``None``. A mesh cuts such an axis as it cuts the kernel's.
      vectors: names of trained leaves of one axis for each module, scales or biases, which weight decay leaves alone
        by default. "bias", "scale" and what ends in "_bias" need not be named.
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
    vectors: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Its kind, or those of a chain: what a message or a notebook can show."""
        return f"Method({' + '.join(part.config.get('peft_type', '?') for part in self.parts or (self,))})"

    @property
    def mergeable(self) -> bool:
        """Whether the method can be folded into the weights of the model."""
        return self.fold is not None

    def merge(self, params: Mapping[str, Any]) -> tree.Tree:
        """Plain parameters that compute what ``params`` do with the method: its leaves folded into the weights.

        Quantised leaves become the plain arrays that they stand for, adapted or not.

        Raises ``PeftJaxError`` where the method is not :attr:`mergeable`, and where ``params`` lack its leaves or hold
        anything but arrays.
        """
        if self.fold is None:
            raise PeftJaxError(f"merge: {_unmergeable(self)} cannot be folded into the weights: save the adapter "
                               "(save_adapter) and use bind(method, model). method.mergeable says so beforehand.")
        tree.flatten_arrays(params)
        return tree.map_paths(lambda _, leaf: quant.plain(leaf), self.fold(params))


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
    """Several methods as one; the first is applied first. A chain among them counts as its parts.

    A leaf that a method added trains if that method trains it. Any other leaf trains if one of the methods trains it.

    Raises ``PeftJaxError`` for no method. ``init`` and ``labels`` of the chain raise it where two methods put one leaf
    into different optimiser groups, and where one method would train a trained leaf of another.
    """
    if not methods:
        raise PeftJaxError("chain() was given no method: name at least one.")
    if odd := [one for one in methods if not isinstance(one, Method)]:
        raise PeftJaxError(f"chain: an argument is {arguments.described(odd[0])}: give methods, one by one, "
                           "chain(lora(), ia3()).")
    methods = tuple(part for one in methods for part in one.parts or (one,))
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
        vectors=tuple(dict.fromkeys(name for method in methods for name in method.vectors)),
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
    """The conversions of the methods in front, in order, up to the first method without one.

    A method behind it would have to see what that one does to plain weights.
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


