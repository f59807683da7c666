"""What a training step needs of memory, from the model's config alone: the real step, compiled for shapes."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from peft_jax.cli import session, workdir
from peft_jax.core import tree
from peft_jax.data.collate import round_up
from peft_jax.errors import PeftJaxError
from peft_jax.evaluation.objectives import objective_of
from peft_jax.hub import families, model_config
from peft_jax.hub.load import load_config, quantised_as, with_head
from peft_jax.models.attention import on_heads
from peft_jax.parallel.mesh import make_mesh, row_shards, several
from peft_jax.planner import Plan, Target, describe, h100
from peft_jax.planner.plan import LENGTH, plan
from peft_jax.planner.shapes import STEPS, check_attention
from peft_jax.train.optimizer import make_optimizer


def job(command) -> int:
    """Print the plan of a configuration, and write it to ``plan.json`` in the workdir."""
    config, folder = command.config, Path(command.workdir)
    workdir.check_writable(folder)
    found = plan_config(config, h100() if jax.default_backend() == "cpu" else None)
    print(describe(found))
    workdir.write_report(folder, "plan.json", found.to_dict())
    return 0


def plan_config(config, target: Target | None = None) -> Plan:
    """The plan of a run's configuration, compiled for ``target``.

    What there is for the data to say, the shape of a batch above all, has a default here; see ``assumed``.
    """
    sizes = load_config(config.model.source)
    session.check_answers(config.task, sizes)
    objective = objective_of(config.task)
    mesh = _mesh(config.mesh)
    sizes = with_head(sizes, objective.head(config.task))
    chosen = on_heads(config.model.attn_implementation, sizes, mesh.shape["tensor"])
    sizes = replace(sizes, attn_implementation=chosen)
    kinds = {name: jnp.dtype(config.model[name]) for name in ("dtype", "param_dtype")}
    check_attention(sizes, kinds["dtype"], target)
    model = families.of(sizes).model(sizes, **kinds, remat=config.model.remat)
    base = tree.unflatten({path: jax.ShapeDtypeStruct(shape, kinds["param_dtype"])
                           for path, shape in model_config.param_shapes(sizes).items()})
    held = quantised_as(config.model.source)
    base = jax.eval_shape(held.init, jax.random.key(0), base) if held else base
    method = session.build_method(config)
    batch, seq, words = batch_sizes(config.data, sizes, row_shards(mesh))
    params = base if method.prepare else jax.eval_shape(method.init, jax.random.key(0), base)
    optimizer = make_optimizer(config.optim, config.optim.steps or STEPS, method.labels(params))
    source = f"{config.model.source}{', quantised as its config.json says, in blocks of 64' if held else ''}"
    kind = " + ".join(part.config["peft_type"] for part in method.parts or (method,))
    assumed = {"model": source, "method": kind, "rows are": words, "optimiser": "AdamW"}
    return plan(method, model, optimizer, batch, seq, mesh, answers=None if objective.writes else 1,
                accumulate_steps=config.optim.accumulate_steps, loss_chunk=config.optim.loss_chunk,
                error=objective.error, base=base, target=None if several(mesh) else target, assumed=assumed,
                packed=config.data.collate == "pack")


def _mesh(sizes) -> Mesh:
    try:
        return make_mesh(**sizes)
    except PeftJaxError as error:
        raise PeftJaxError(f"{error} A plan's devices need not be there: XLA_FLAGS=--xla_force_host_platform_device_"
                           "count=8 in the environment makes 8 of a CPU.") from error


def batch_sizes(data, sizes, multiple: int) -> tuple[int, int, str]:
    """(rows, tokens of a row, where they come from) of a micro-batch; without data nobody knows how examples pack."""
    most = sizes.max_position_embeddings
    longest = min(data.max_length or LENGTH, most)  # of an example
    if data.collate != "pack":
        words = "data.batch_size x the longest that an example may be (data.max_length)"
        return int(round_up(data.batch_size, multiple)), longest, words
    named = {"data.rows": data.rows, "data.row_length": data.row_length}
    unset = [f"--config.{name}" for name, value in named.items() if not value]
    words = "as set" if not unset else f"assumed, for want of data; set {' and '.join(unset)}"
    return int(round_up(data.rows or 1, multiple)), data.row_length or longest, words
