"""The record of a run from the files that it left in its workdir; its shape: ``comparison/record.py``."""

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from peft_jax.core import run_files, settings
from peft_jax.errors import PeftJaxError
from peft_jax.train.metrics_log import read_metrics

PACKAGES = ("peft_jax", "jax", "jaxlib", "flax", "optax", "transformers", "datasets", "numpy")


class Outcome(NamedTuple):
    """When a cell was begun (ISO), the seconds that this start took, and its error, "" for none."""

    created_at: str
    seconds: float
    error: str


def compose(folder: Path, cell, full_cell, metric: str, outcome: Outcome) -> dict[str, Any]:
    """The record of ``cell``; ``full_cell`` is the cell with the settings that it chose, whose name its workdir has."""
    workdir, config = folder / "runs" / full_cell.name, full_cell.config
    read = partial(_read, bool(outcome.error))
    results, measurements = read(workdir / "results.json"), read(workdir / "measured.json")
    base = read(folder / "runs" / "base" / "measured.json")
    rows = read(workdir / "metrics.jsonl", _metrics)
    return {
        "run_info": {"created_at": outcome.created_at, "total_time": outcome.seconds, "peft_branch": "main",
                     "experiment_name": cell.experiment, "train_config": _train_config(config, results),
                     "peft_config": read(workdir / "adapter" / "adapter_config.json") or None,
                     "error_msg": outcome.error},
        "train_info": _train_info(config, results, measurements, base, rows, metric, outcome),
        "meta_info": _meta_info(config),
        "peft_jax": {
            "cell": {"sweep": folder.name, "name": cell.name, "label": cell.label, "settings": full_cell.settings,
                     "axes": cell.axes, "chosen": cell.measure or None},
            "asked": settings.plain(cell.config.to_dict()), "metric": metric,
            **({"before": with_minus(results["before"], metric)} if results.get("before") else {}),
            "validation": with_minus(results.get("after", {}), metric), **_on_tests(measurements, base, metric),
            "memory": _memory(results), "adapter_bytes": results.get("adapter_bytes"),
            "tokens_per_second": rows[-1]["tokens_per_second"] if rows else None,
            "loss": [[row["step"], row["loss"]] for row in rows],
        },
    }  # fmt: skip


def _run_file(path: Path) -> dict[str, Any]:
    return run_files.read(path)


def _metrics(path: Path) -> list[dict[str, float]]:
    return read_metrics(path, "loss", "tokens_per_second")


def _read(failed: bool, path: Path, reader: Callable[[Path], Any] = _run_file) -> Any:
    """What a file of the run holds; of a failed run, whose files may be the reason, {} where it cannot be read."""
    try:
        return reader(path) if path.exists() else {}
    except PeftJaxError:
        if failed:
            return {}
        raise


def _on_tests(measurements: Mapping, base: Mapping, metric: str) -> dict[str, Any]:
    """What ``measured.json`` of the run and of the base model say, side by side."""
    if not measurements:
        return {}

    def pairs(section: str, name: str) -> dict[str, Any]:
        before = {task: with_minus(metrics, name) for task, metrics in base.get(section, {}).items()}
        return {task: {"before": before.get(task, {}).get(name), "after": with_minus(metrics, name).get(name)}
                for task, metrics in measurements[section].items()}

    return {"test": with_minus(measurements["test"], metric), "base_test": with_minus(base.get("test", {}), metric),
            "latency": measurements["latency"],
            "general": pairs("general", "loss"), "neighbours": pairs("neighbours", metric)}


def with_minus(metrics: Mapping[str, float], metric: str) -> dict[str, float]:
    """``metrics`` and, where ``metric`` is one of them with a minus in front, that: then more is better.

    >>> with_minus({"loss": 0.5}, "-loss")
    {'loss': 0.5, '-loss': -0.5}
    """
    plain = metric.removeprefix("-")
    return {**metrics, **({metric: -metrics[plain]} if metric.startswith("-") and plain in metrics else {})}


def _memory(results: Mapping) -> dict[str, int]:
    used = results.get("training_memory", {})
    return {"observed": used.get("device", used.get("host")), "compiled": used.get("compiled")}


def _train_config(config, results: Mapping) -> dict[str, Any]:
    data, optim = config.data, config.optim
    return {"model_id": config.model.source, "dtype": config.model.dtype, "max_seq_length": data.max_length,
            "batch_size": data.batch_size, "batch_size_eval": config.eval.batch_size,
            "max_steps": results.get("steps", optim.steps), "eval_steps": config.eval.every, "compile": True,
            "query_template": config.task.get("prompt_template"), "seed": config.seed,
            "grad_norm_clip": optim.clip_norm, "optimizer_type": "AdamW",
            "optimizer_kwargs": {"lr": optim.learning_rate if config.measure.of == "trained" else None,
                                 "weight_decay": optim.weight_decay},
            "lr_scheduler": optim.schedule, "use_amp": False, "autocast_adapter_dtype": True,
            "generation_kwargs": {"max_new_tokens": config.eval.max_new_tokens},
            "attn_implementation": config.model.attn_implementation}


def _train_info(config, results: Mapping, measurements: Mapping, base: Mapping, rows: Sequence[Mapping], metric: str,
                outcome: Outcome) -> dict[str, Any]:
    memory = [row["memory"] for row in rows if "memory" in row]
    return {"accelerator_memory_reserved_avg": int(np.mean(memory)) if memory else None,
            "accelerator_memory_max": _memory(results)["observed"],
            "accelerator_memory_reserved_99th": int(np.percentile(memory, 99)) if memory else None,
            "train_time": results.get("seconds"), "file_size": results.get("adapter_bytes"),
            "num_trainable_params": results.get("trainable", 0), "num_total_params": results.get("all"),
            "status": "failed" if outcome.error else "success",
            "metrics": _metric_rows(config, results, measurements, base, rows, metric)}


def _metric_rows(config, results: Mapping, measurements: Mapping, base: Mapping, rows: Sequence[Mapping],
                 metric: str) -> list[dict[str, Any]]:
    """peft's rows: one for each evaluation on the way and the last one, one more of the test."""
    after = with_minus(results.get("after", {}), metric).get(metric)
    evaluations = [(row, _evaluation(row, metric)) for row in rows]
    table = [_metric_row(config, row, rows, after if value is None else value)
             for row, value in evaluations if value is not None or row is rows[-1]]
    if measurements and table:
        tested = with_minus(measurements["test"], metric).get(metric)
        table.append({key: table[-1][key] for key in ("step", "train loss", "train samples")} |
                     {"test accuracy": tested, "train total tokens": _tokens(rows),
                      "forgetting": _forgetting(measurements, base)})
    return table


def _evaluation(row: Mapping, metric: str) -> float | None:
    """The metric of an evaluation on the way, where there was one after that step."""
    metrics = {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")}
    return with_minus(metrics, metric).get(metric)


def _metric_row(config, row: Mapping, rows: Sequence[Mapping], value: float | None) -> dict[str, Any]:
    until = [other for other in rows if other["step"] <= row["step"]]
    memory = statistics.mean(other.get("memory", 0) for other in until)
    loss = statistics.mean(other["loss"] for other in until)
    samples = row["step"] * config.data.batch_size * config.optim.accumulate_steps
    return {"step": row["step"], "valid accuracy": value, "train loss": loss, "train samples": samples,
            "train time": row["seconds"], "eval time": None,
            "tokens / sec": row["tokens_per_second"], "mem allocated avg": memory, "mem reserved avg": memory,
            "elapsed time": row["seconds"]}


def _tokens(rows: Sequence[Mapping]) -> int:
    """About: the rate leaves the first step out."""
    return round(rows[-1]["tokens_per_second"] * (rows[-1]["seconds"] - rows[0]["seconds"]))


def _forgetting(measurements: Mapping, base: Mapping) -> float | None:
    """The mean over the sources of general text, nats per token, of the loss after minus before."""
    changes = [metrics["loss"] - base["general"][task]["loss"] for task, metrics in measurements["general"].items()
               if task in base.get("general", {})]
    return statistics.mean(changes) if changes else None


def _meta_info(config) -> dict[str, Any]:
    return {"model_info": {"sha": None, "created_at": None},
            "dataset_info": {config.task.name: {"sha": None, "created_at": None}},
            "package_info": {f"{name}-version": metadata.version(name) for name in PACKAGES},
            "system_info": {"system": platform.system(), "release": platform.release(),
                            "version": platform.version(), "machine": platform.machine(),
                            "processor": platform.processor(), "accelerator": jax.devices()[0].device_kind},
            "pytorch_info": ""}
