"""``--mode=recommend``: which method to take, from a configuration's model, batch and section ``recommend``."""

import math
from pathlib import Path
from typing import Any

from peft_jax.cli import workdir
from peft_jax.cli.load_model import dtypes, model_files
from peft_jax.cli.plan import batch_sizes
from peft_jax.errors import PeftJaxError
from peft_jax.hub.model_files import quantised_as
from peft_jax.planner.recommend import Recommendation, describe_recommendation, recommend


def job(command) -> int:
    """Print the recommendation of a configuration, and write it to ``recommend.json`` in the workdir."""
    folder = Path(command.workdir)
    workdir.check_writable(folder)
    result = recommend_config(command.config)
    print(describe_recommendation(result))
    workdir.write_report(folder, "recommend.json", result.to_dict())
    return 0


def recommend_config(config) -> Recommendation:
    """The recommendation of a run's configuration; its method is not looked at, its model alone is, without weights.

    Raises ``PeftJaxError`` as :func:`peft_jax.planner.recommend.recommend` does, where the figures are not to be had,
    and for a checkpoint that is quantised already.
    """
    files, asked = model_files(config), config.recommend
    if quantised_as(files):
        raise PeftJaxError(f"{files.source} holds quantised weights, and methods are compared on plain ones: name the "
                           "plain model, or see --mode=plan for this one.")
    (batch, seq, _), kinds = batch_sizes(config.data, files.config, 1), dtypes(config)
    return recommend(files.config, _memory(asked), devices=asked.devices, batch=batch, seq=seq, tasks=asked.tasks,
                     complexity=asked.complexity, latency=asked.latency, figures=_figures(asked.figures),
                     remat=config.model.remat, packed=config.data.collate == "pack", dtype=kinds["dtype"],
                     param_dtype=kinds["param_dtype"])


def _memory(asked) -> int:
    """Bytes of one device."""
    memory = asked.memory_gb * 1e9
    if not 1 <= memory < math.inf:
        raise PeftJaxError(f"--config.recommend.memory_gb={asked.memory_gb}: the memory of one device in GB of 1e9 "
                           "bytes, such as 24")
    return round(memory)


def _figures(path: str) -> dict[str, Any] | None:
    mend = "give --config.recommend.figures the table.json that a comparison wrote, or leave it out"
    return workdir.read_json(Path(path), "rows", mend=mend) if path else None
