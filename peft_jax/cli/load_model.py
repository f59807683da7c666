"""From a configuration to the pretrained model: first its config.json alone, then its weights."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from peft_jax import quant
from peft_jax.cli.checks import check_answers
from peft_jax.core import tree
from peft_jax.evaluation.objectives import objective_of
from peft_jax.hub.load import load_pretrained
from peft_jax.hub.model_files import ModelFiles, open_model
from peft_jax.method import BASE, Method
from peft_jax.models.attention import check_device, on_heads
from peft_jax.parallel.mesh import several


def model_files(config) -> ModelFiles:
    """Where the model is, and its config with the head that the task needs; no weights are read.

    Raises ``PeftJaxError`` where it is not to be had, or cannot answer as the task asks.
    """
    files = open_model(config.model.source, head=objective_of(config.task).head(config.task), weights=False)
    check_answers(config.task, files.config)
    return files


def dtypes(config) -> dict[str, jnp.dtype]:
    """``{"dtype": of computation, "param_dtype": of the parameters in memory}``."""
    return {name: jnp.dtype(config.model[name]) for name in ("dtype", "param_dtype")}


def load_model(config, method: Method = BASE, mesh: Mesh | None = None,
               files: ModelFiles | None = None) -> tuple[Any, tree.Tree]:
    """The model computing in ``model.dtype`` and its parameters, kept in ``model.param_dtype``.

    Where the task needs a head, the model has it, and where the checkpoint does not, it starts at random by the seed.
    Where the ``method`` begins with a change of types (a quantised base), that happens while the weights are read. They
    lie on the ``mesh`` where that is of several devices. ``files`` are those of :func:`model_files`, if they are there.
    Prints a line where weights are to have a fused product and cannot.
    """
    kinds = dtypes(config)
    model, params = load_pretrained(files or model_files(config), dtype=kinds["param_dtype"], remat=config.model.remat,
                                    rng=jax.random.key(config.seed), method=method, mesh=several(mesh))
    sizes = with_attention(config, model.config, mesh)
    check_device(sizes, kinds["dtype"])
    if note := plain_products(params, kinds["dtype"]):
        print(note, flush=True)
    return model.clone(config=sizes, dtype=kinds["dtype"]), params


def with_attention(config, sizes: Any, mesh: Mesh | None) -> Any:
    """A model's config with the attention that the run asks for, as it can be on the mesh."""
    attention = on_heads(config.model.attn_implementation, sizes, mesh.shape["tensor"] if mesh else 1)
    return replace(sizes, attn_implementation=attention)


def plain_products(params: tree.Tree, dtype: Any) -> str | None:
    """What to tell a person of weights that are to have a fused product and have the plain one, computing in a dtype.

    ``None`` where there are none.
    """
    fused = [leaf for leaf in tree.flatten(params).values() if quant.is_leaf(leaf) and leaf.product == "fused"]
    if not fused:
        return None
    from peft_jax.quant.pallas import why_plain  # here, as importing Pallas takes half a second

    reasons = [why for leaf in fused if (why := why_plain(_unstacked(leaf), dtype))]
    if not reasons:
        return None
    where = "here" if len(set(reasons)) == 1 else "here, for one"
    return f"product='fused': plain for {len(reasons)} of {len(fused)} weights {where}: {reasons[0]}"


def _unstacked(leaf: quant.QuantizedArray) -> quant.QuantizedArray:
    """One entry of a leaf's stack, as shapes."""
    front = (0,) * len(leaf.stack)
    return jax.eval_shape(lambda leaf: jax.tree.map(lambda array: array[front], leaf), leaf)
