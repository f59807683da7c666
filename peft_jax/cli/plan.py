"""``--mode=plan``: the memory of a training step, by the model's config alone: the real step, compiled for shapes."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from peft_jax.cli import workdir
from peft_jax.cli.build_method import build_method
from peft_jax.cli.build_optimizer import build_optimizer
from peft_jax.cli.load_model import dtypes, model_files, with_attention
from peft_jax.core import tree
from peft_jax.data.packing import round_up
from peft_jax.errors import PeftJaxError
from peft_jax.evaluation.objectives import objective_of
from peft_jax.hub import families, model_config
from peft_jax.hub.model_files import ModelFiles, quantised_as
from peft_jax.method import Method
from peft_jax.parallel.mesh import make_mesh, row_shards, several
from peft_jax.planner import Plan, Target, describe, h100
from peft_jax.planner.plan import LENGTH, plan
from peft_jax.planner.shapes import STEPS, check_attention


def job(command) -> int:
    """Print the plan of a configuration, and write it to ``plan.json`` in the workdir."""
    folder = Path(command.workdir)
    workdir.check_writable(folder)
    result = plan_config(command.config, h100() if jax.default_backend() == "cpu" else None)
    print(describe(result))
    workdir.write_report(folder, "plan.json", result.to_dict())
    return 0


def plan_config(config, target: Target | None = None) -> Plan:
    """The plan of a run's configuration, compiled for ``target``.

    What there is for the data to say, the shape of a batch above all, has a default here; see ``assumed``.
    """
    files, mesh, objective = model_files(config), _mesh(config.mesh), objective_of(config.task)
    sizes, kinds = with_attention(config, files.config, mesh), dtypes(config)
    check_attention(sizes, kinds["dtype"], target)
    model = families.of(sizes).model(sizes, **kinds, remat=config.model.remat)
    base, method = _base(files, model), build_method(config)
    params = base if method.prepare else jax.eval_shape(method.init, jax.random.key(0), base)
    optimizer = build_optimizer(config.optim, config.optim.steps or STEPS, method.labels(params),
                                method.vectors)
    batch, seq, words = batch_sizes(config.data, sizes, row_shards(mesh))
    return plan(method, model, optimizer, batch, seq, mesh, answers=None if objective.writes else 1,
                accumulate_steps=config.optim.accumulate_steps, loss_chunk=config.optim.loss_chunk,
                error=objective.error, base=base, target=None if several(mesh) else target,
                assumed=_assumed(files, method, words), packed=config.data.collate == "pack")


def _base(files: ModelFiles, model: Any) -> tree.Tree:
    """The shapes of the model's parameters, quantised where the checkpoint's are."""
    base = tree.unflatten({path: jax.ShapeDtypeStruct(shape, model.param_dtype)
                           for path, shape in model_config.param_shapes(model.config).items()})
    stored = quantised_as(files)
    return jax.eval_shape(stored.init, jax.random.key(0), base) if stored else base


def _assumed(files: ModelFiles, method: Method, rows: str) -> dict[str, str]:
    """What the plan says that it is of."""
    stored = ", quantised as its config.json says, in blocks of 64" if quantised_as(files) else ""
    return {"model": f"{files.source}{stored}",
            "method": " + ".join(part.config["peft_type"] for part in method.parts or (method,)),
            "rows are": rows, "optimiser": "AdamW"}


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
    unset = [f"--config.data.{name}" for name in ("rows", "row_length") if not data[name]]
    words = "as set" if not unset else f"assumed, for want of data; set {' and '.join(unset)}"
    return int(round_up(data.rows or 1, multiple)), data.row_length or longest, words
