"""What a run has trained, found again in its workdir."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from peft_jax.binding.linen import bind
from peft_jax.cli import workdir
from peft_jax.core import tree
from peft_jax.errors import PeftJaxError
from peft_jax.hub.adapters.load import adapter_classes, load_adapter
from peft_jax.hub.load import load_pretrained
from peft_jax.method import BASE
from peft_jax.parallel import partitioning
from peft_jax.parallel.mesh import several


class Candidate(NamedTuple):
    """``"adapter"`` or a whole ``"model"``: how to apply it, how to get plain weights, and what the classes of its head
    are called, () where they have numbers alone."""

    name: str
    apply: Callable
    params: tree.Tree
    merge: Callable[[tree.Tree], tree.Tree] | None
    classes: tuple[str, ...] = ()

    def merged(self) -> tree.Tree:
        """Plain weights. Raises ``PeftJaxError`` without ``merge``."""
        if self.merge is None:
            raise PeftJaxError(f"the {self.name} is of a method that cannot be folded into weights: use it as it is")
        return self.merge(self.params)


def folder_of(command) -> Path:
    """The workdir, if it holds an adapter, or a whole model, trained from the model of the configuration."""
    folder = Path(command.workdir)
    if not any((folder / name).is_dir() for name in ("adapter", "model")):
        raise PeftJaxError(f"{folder} holds no adapter: train one first (the same command with --mode=train)")
    workdir.check_config(folder, command.config.to_dict(), workdir.ADAPTER_MATTERS)
    return folder


def load(folder: Path, config, model, base: tree.Tree, mesh: Mesh) -> Candidate:
    """What the run in ``folder`` trained, on the mesh."""
    if (folder / "adapter").is_dir():
        return adapter(folder / "adapter", model, base, mesh)
    stored, params = load_pretrained(folder / "model", dtype=config.model.param_dtype, mesh=several(mesh))
    head = getattr(stored.config, "head", None)
    return Candidate("model", bind(BASE, model, mesh), params, lambda params: params, head.labels if head else ())


def adapter(source: str | Path, model, base: tree.Tree, mesh: Mesh) -> Candidate:
    """An adapter, of a folder or the Hub, on ``base``."""
    method, params = load_adapter(source, base)
    if several(mesh):
        params = partitioning.place(method, model, params, mesh)
    return Candidate("adapter", bind(method, model, mesh), params, method.merge if method.mergeable else None,
                     adapter_classes(source))
