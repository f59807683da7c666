"""The job of --mode=recommend: which method to take, from a configuration's model, batch and section ``recommend``."""

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from peft_jax.cli import session, workdir
from peft_jax.cli.plan import batch_sizes
from peft_jax.errors import PeftJaxError
from peft_jax.evaluation.objectives import objective_of
from peft_jax.hub.load import load_config, quantised_as, with_head
from peft_jax.planner.recommend import Recommendation, describe_recommendation, recommend


def job(command) -> int:
    """Print the recommendation of a configuration, and write it to ``recommend.json`` in the workdir."""
    folder = Path(command.workdir)
    workdir.check_writable(folder)
    found = recommend_config(command.config)
    print(describe_recommendation(found))
    workdir.write_report(folder, "recommend.json", found.to_dict())
    return 0


def recommend_config(config) -> Recommendation:
    """The recommendation of a run's configuration; its method is not looked at, its model alone is, without weights.

    Raises ``PeftJaxError`` as :func:`peft_jax.planner.recommend.recommend` does, where the figures are not to be had,
    and for a checkpoint that is quantised already.
    """
    asked = config.recommend
    sizes = load_config(config.model.source)
    session.check_answers(config.task, sizes)
    if quantised_as(config.model.source):
        raise PeftJaxError(f"{config.model.source} holds quantised weights, and methods are compared on plain ones: "
                           "name the plain model, or see --mode=plan for this one.")
    sizes = with_head(sizes, objective_of(config.task).head(config.task))
    batch, seq, _ = batch_sizes(config.data, sizes, 1)
    memory = asked.memory_gb * 1e9
    if not 1 <= memory < math.inf:
        raise PeftJaxError(f"--config.recommend.memory_gb={asked.memory_gb}: the memory of one device in GB of 1e9 "
                           "bytes, such as 24")
    kinds = {name: jnp.dtype(config.model[name]) for name in ("dtype", "param_dtype")}
    return recommend(sizes, round(memory), devices=asked.devices, batch=batch, seq=seq,
                     tasks=asked.tasks, complexity=asked.complexity, latency=asked.latency,
                     figures=_figures(asked.figures), remat=config.model.remat,
                     packed=config.data.collate == "pack", **kinds)


def _figures(path: str) -> dict[str, Any] | None:
    mend = "give --config.recommend.figures the table.json that a comparison wrote, or leave it out"
    return workdir.read_json(Path(path), "rows", mend=mend) if path else None
