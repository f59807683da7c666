"""Methods that put leaves beside chosen kernels: what they share. A method adds its equation and its leaves' layout.

Beside each chosen kernel stand the method's leaves, with the kernel's stack in front, and one frozen leaf (*stack) that
is zero for the layers of a stack that are not adapted: its shape says what the stack is, so that nothing else has to.
:func:`method` puts the parts of such a method together; where one differs, it replaces that field.
"""

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from peft_jax import quant
from peft_jax.core import targeting, tree, validation
from peft_jax.core.kernel_axes import HOLDERS
from peft_jax.core.peft_format import Format
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.method import FROZEN, TRAINABLE, Method, check_leaves
from peft_jax.quant import plain

SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
Leaves = Callable[..., Mapping[str, Any]]  # (key, target, kernel) -> leaves beside the kernel
Trains = Callable[[str, Mapping[str, Any]], bool]  # (path of a leaf, flat params) -> whether it trains


def method(config: Mapping[str, Any], *, trained: Sequence[str], switch: str, leaves: Leaves,
           intercept: Callable[..., Any], stored: Format, fold: Callable[..., jax.Array] | None = None,
           along: Mapping[str, tuple[str | None, ...]] | None = None, unused: Sequence[str] = (),
           holders: Sequence[str] = ("kernel",), first: str = "") -> Method:
    """The method that puts leaves beside chosen kernels.

    Args:
      config: the arguments, tidied and checked.
      trained: names of its leaves that train; switch: of the frozen one (*stack).
      leaves: ``(config, key, target, kernel) -> {name: leaf}`` beside one kernel.
      intercept: as of :class:`Method`.
      stored, along: as of :class:`Method`.
      fold: ``(kernel float32, *trained leaves, switch) -> kernel`` with the method in it.
      unused: names of further frozen leaves, gone after a merge.
      holders, first: as of :func:`init`.
    """
    trained, names, train = tuple(trained), (*trained, switch), partial(trains, config, trained, switch)
    return Method(
        init=partial(init, config, partial(leaves, config), train, switch, holders=holders, first=first),
        intercept=intercept, labels=partial(labels, trained=train),
        fold=partial(merge, leaves=names, fold=fold, unused=unused) if fold else None, config=config,
        padding=partial(padding, config=config, leaves=trained, switch=switch), stored=stored,
        leaves=(*names, *unused), along=along or {})


def tidy(*, default: targeting.Patterns = ("q_proj", "v_proj"), **config: Any) -> dict[str, Any]:
    """The arguments, checked: peft's ``None`` for target_modules made ``default``, words of ``SELECTION`` that the
    method does not have made ``None``.

    Raises ``PeftJaxError`` for values of the wrong type, a regex that is none, or layers beside a regex.
    """
    config = {**dict.fromkeys(SELECTION), **config}
    saved, wanted = config["modules_to_save"], config["target_modules"]
    config |= {"target_modules": default if wanted is None else wanted, "modules_to_save": validation.as_names(saved)}
    for name in SELECTION:
        if name != "layers_to_transform":
            validation.check_modules(name, config[name])
    layers = config["layers_to_transform"]
    for one in layers if isinstance(layers, list | tuple) else (layers,):
        if one is not None and (not isinstance(one, int) or isinstance(one, bool)):
            raise PeftJaxError(f"layers_to_transform={layers!r}: give whole numbers or None.")
    if isinstance(config["target_modules"], str) and config["layers_to_transform"] not in (None, (), []):
        raise PeftJaxError(f"layers_to_transform needs target_modules as a list of names, as in peft; it is the string "
                           f"{config['target_modules']!r}: name the modules, or put the layers into the regex.")
    words = config["layers_pattern"]
    validation.check_regexes(() if words is None or isinstance(words, str) else words)
    return config


def selection(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that say which modules are adapted."""
    return {name: config[name] for name in SELECTION}


def chosen(config: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """Whether each module is adapted, by its name: bool (len(names),)."""
    return np.array(list(map(targeting.chooser(**selection(config)), names)), bool)


def switch(config: Mapping[str, Any], target: targeting.Target) -> jax.Array:
    """The frozen leaf of a target: float32 (*stack), one where the layer is adapted, zero where it is not."""
    return jnp.asarray(chosen(config, target.names).astype(np.float32).reshape(target.axes.stack))


def init(config: Mapping[str, Any], leaves: Leaves, trains: Trains, switch: str, rng: Any,
         params: Mapping[str, Any], axes: Mapping[str, Any] | None = None, holders: Sequence[str] = ("kernel",),
         first: str = "") -> tree.Tree:
    """``params`` with ``leaves(key, target, kernel)`` beside every chosen kernel; what trains becomes float32.

    A bfloat16 leaf would lose most of an update. ``leaves`` may replace the kernel or the bias of its module.
    ``holders`` are the names of leaves that count as kernels. ``first`` names a method whose leaves depend on the
    kernel's values, so that no other may have changed what the kernel does before.

    Raises ``PeftJaxError`` where nothing is chosen, a module is both adapted and saved, or leaves are there already.
    """
    flat = tree.flatten(params)
    targets = targeting.find(params, axes, selection(config), holders)
    check_saved(config, params, targets)
    before = {path.rpartition("/")[2] for path in flat} - {*holders, "bias"}
    for target in targets:
        key = jax.random.fold_in(rng, zlib.crc32(target.path.encode()))  # by path: other targets change nothing here
        folder = f"{target.path}/".lstrip("/")
        new = leaves(key, target, flat[folder + target.leaf])
        if double := new.keys() & before:
            raise PeftJaxError(f"the parameters already hold {config['peft_type']} ('{min(double)}' leaves): start "
                               "from the base's, or merge first.")
        if first and target.leaf == "kernel":
            check_first(first, target.path, ("kernel", "bias"), flat)
        flat |= {folder + name: leaf for name, leaf in new.items()}
    _check_biases(config, flat, switch)
    return tree.unflatten({path: trainable(path, leaf) if trains(path, flat) else leaf
                           for path, leaf in flat.items()})


def trainable(path: str, leaf: Any) -> jax.Array:
    """``leaf`` in float32. Raises ``PeftJaxError`` where it is quantised."""
    if quant.is_leaf(leaf):
        raise quant.cannot_train(path, leaf)
    return leaf.astype(jnp.float32)


def check_first(kind: str, module: str, known: Collection[str], flat: Mapping[str, Any]) -> None:
    """Raise ``PeftJaxError`` where ``module`` holds other leaves than ``known``: those of a method in front of it."""
    names = [path.rpartition("/")[2] for path in flat if path.rpartition("/")[0] == module]
    if others := [name for name in names if name not in known]:
        raise PeftJaxError(f"{kind} must come first in the chain: '{module}' already holds '{others[0]}'.")


def _check_biases(config: Mapping[str, Any], flat: Mapping[str, Any], switch: str) -> None:
    """A stacked bias leaf trains as a whole; peft's "_only" on some layers of a stack would need a part of it."""
    for folder in folders(flat, switch) if config.get("bias", "none").endswith("_only") else ():
        names = targeting.module_names(folder.rstrip("/"), flat[folder + switch].shape)
        if f"{folder}bias" in flat and not chosen(config, names).all():
            raise PeftJaxError(f"bias='{config['bias']}' on some layers of a scanned stack ('{folder}bias') is not "
                               "supported: adapt all layers, or set bias to 'none' or 'all'.")


def check_saved(config: Mapping[str, Any], params: Mapping[str, Any], targets: Sequence[Any]) -> None:
    """Raise ``PeftJaxError`` where modules_to_save names nothing, or a module of ``targets``, which have a path."""
    names = [path.replace("/", ".") for path in tree.flatten(params)]
    both = [target.path for target in targets
            if targeting.saved(config["modules_to_save"], target.path.replace("/", "."))]
    if both:
        raise PeftJaxError(f"'{both[0]}' is both adapted and, by the ending of its name, in modules_to_save "
                           f"({', '.join(config['modules_to_save'])}): spell out the names of one or the other.")
    for module in config["modules_to_save"] or ():
        if not any(targeting.saved((module,), name.rpartition(".")[0]) for name in names):
            hint = (" The head is tied to the embedding: untie it first with peft_jax.untie(params)."
                    if module == "lm_head" else "")
            raise PeftJaxError(f"modules_to_save has '{module}', which is no module of this model: "
                               f"{nearest(module, {p for n in names for p in n.split('.')[:-1]})}.{hint}")


def trains(config: Mapping[str, Any], leaves: Sequence[str], switch: str, path: str, flat: Mapping[str, Any]) -> bool:
    """Whether the leaf at ``path`` is one of the method's trained ``leaves``, of a saved module, or a bias that peft's
    argument ``bias`` means: "none", "all", or with "_only" those of adapted modules, which hold ``switch``."""
    folder, _, name = path.rpartition("/")
    biases = config.get("bias", "none")
    if name == "bias" and (biases == "all" or (biases.endswith("_only") and f"{folder}/{switch}".lstrip("/") in flat)):
        return True
    return name in leaves or saved(config, path)


def saved(config: Mapping[str, Any], path: str) -> bool:
    """Whether the leaf at ``path`` is of a module that ``modules_to_save`` trains."""
    return targeting.saved(config["modules_to_save"], path.rpartition("/")[0].replace("/", "."))


def labels(params: Mapping[str, Any], trained: Trains) -> tree.Tree:
    """``"trainable"`` where ``trained(path, flat params)``, else ``"frozen"``."""
    flat = tree.flatten(params)
    return tree.map_paths(lambda path, _: TRAINABLE if trained(path, flat) else FROZEN, params)


def folders(flat: Mapping[str, Any], leaf: str) -> list[str]:
    """The folders, with a slash at the end, of all modules that hold ``leaf``."""
    return [path.removesuffix(leaf) for path in flat if path.rpartition("/")[2] == leaf]


def merge(params: Mapping[str, Any], leaves: Sequence[str], fold: Callable[..., jax.Array],
          unused: Sequence[str] = ()) -> tree.Tree:
    """Each adapted kernel, or embedding, replaced by ``fold(kernel float32, *leaves)``, back in its dtype: a quantised
    one becomes the plain array that it stands for, folded.

    The leaves are gone afterwards, and those of the names ``unused`` with them.
    """
    check_leaves(leaves, params)
    flat = {path: leaf for path, leaf in tree.flatten(params).items() if path.rpartition("/")[2] not in unused}
    for folder in folders(flat, leaves[0]):
        own = [flat.pop(folder + name) for name in leaves]
        if not (path := next((folder + name for name in HOLDERS if folder + name in flat), "")):
            raise PeftJaxError(f"'{folder}{leaves[0]}' is beside no kernel: take it out, or give the module's own "
                               "leaves, too.")
        flat[path] = fold(plain(flat[path], jnp.float32), *own).astype(flat[path].dtype)
    return tree.unflatten(flat)


def padding(params: Mapping[str, Any], config: Mapping[str, Any], leaves: Sequence[str], switch: str,
            chosen: Callable[[Mapping[str, Any], Sequence[str]], np.ndarray] = chosen) -> int:
    """Elements of ``leaves`` in layers of a stack that are not adapted; ``switch`` is the frozen leaf (*stack)."""
    flat, unused = tree.flatten(params), 0
    for folder in folders(flat, switch):
        off = ~chosen(config, targeting.module_names(folder.rstrip("/"), flat[folder + switch].shape))
        size = sum(flat[folder + name].size for name in leaves if folder + name in flat)
        unused += size // len(off) * int(off.sum())
    return unused


def read(module: nn.Module, context: Any, leaves: Sequence[str], what: str) -> list[jax.Array] | None:
    """A module's ``leaves``, the frozen one (*stack) last, inside its ``__call__`` as flax has it; ``None`` elsewhere
    and where there are none.

    Raises ``PeftJaxError`` for a module that is no Dense or DenseGeneral, and for a stack that the pass does not slice.
    """
    if context.method_name != "__call__" or not module.has_variable("params", leaves[0]):
        return None
    check_kind(module, what)
    if not context.of_flax:
        return None
    own = [module.get_variable("params", name) for name in leaves]
    if own[-1].ndim:  # else products below could fit by accident
        raise PeftJaxError(f"'{'/'.join(module.path)}' has one kernel, which was taken for a stack of {own[-1].size}: "
                           "give init axes=peft_jax.kernel_axes(model, params, *inputs).")
    return own


def check_kind(module: nn.Module, what: str) -> None:
    """Raise ``PeftJaxError``, about the method ``what``, for a module that is no Dense or DenseGeneral."""
    if not isinstance(module, nn.Dense | nn.DenseGeneral):
        raise PeftJaxError(f"'{'/'.join(module.path)}' is a {type(module).__name__}: {what} changes Dense and "
                           "DenseGeneral modules only.")


def dropout_key(module: nn.Module, context: Any, argument: str) -> jax.Array | None:
    """A key of the call's ``dropout`` stream, ``None`` where it has none; raises where a scan withholds the stream."""
    if "dropout" not in context.rngs:
        return None
    if not module.has_rng("dropout"):
        raise PeftJaxError(f"{argument} cannot draw in '{'/'.join(module.path)}': the nn.scan around "
                           "it withholds the stream; give it split_rngs={'params': True, 'dropout': True}.")
    return module.make_rng("dropout")


def dropped(module: nn.Module, context: Any, x: jax.Array, rate: float, argument: str) -> jax.Array:
    """``x`` with dropout where the call was given a ``dropout`` stream, see :func:`dropout_key`."""
    key = dropout_key(module, context, f"{argument}={rate}") if rate else None
    if key is None:
        return x
    thinned: Any = nn.Dropout(rate, deterministic=False, parent=None).apply({}, x, rngs={"dropout": key})
    return thinned
