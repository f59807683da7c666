"""Fine-tune a pretrained language model with few parameters, measure it, merge it, try it.

    python run.py --config=experiments/lora.py
    python run.py --config=experiments/lora.py:model=...,task=... --config.method.r=8 --workdir=runs/r8
    python run.py --config=experiments/lora.py --mode=generate --prompt="Review: A delight."

Modes: train (evaluates before and after; the same command again resumes), eval (the base and the adapter of a workdir),
measure (what its result is worth on data kept for tests, neighbouring tasks and general text, and in time), merge, or
export, which is the same (the workdir's adapter into the weights: a folder that transformers loads, workdir/merged or
--output; with --requantize what was quantised, as nf4 or fp4 in blocks, is so again, and what that costs is said),
generate (base and adapter side by side; or the adapters of --adapters=runs/a/adapter,owner/name, folders or Hub ids),
show (the first training examples as they will be learnt, without any weights; see docs/data.md),
plan (what memory the training step needs and which devices hold it, from shapes alone), recommend (which method to take
with the memory, tasks and latency of config.recommend, from the model's config alone), report (tables and plots of a
sweep), cells (its runs, with their numbers).

A sweep (experiments/compare.py, experiments/ablations/) is many runs, each in a process of its own; what is finished is
not run again. With --sweep_index=N one of them is run here and now, for the job array of a cluster.
"""

import os
import sys
from typing import NamedTuple

from peft_jax.cli import modes
from peft_jax.errors import DISK, PeftJaxError, disk_fault, lacking, nearest

try:
    from absl import flags
    from ml_collections.config_dict import ConfigDict
except ModuleNotFoundError as error:
    print(f"error: {lacking(error, 'to read a command line')}", file=sys.stderr)
    sys.exit(2)

from configs import base, parse
from configs.check import check, check_cells, check_folder, check_sweep, tidy
from configs.shape import check_shape
from configs.sweeps import Cell

GUARDS = ("allow", "log", "disallow")
MODES = (*modes.JOBS, "report", "cells")
OF_SWEEPS = ("train", "report", "cells")  # modes
ONE_MODE = {  # flags that only some modes read
    "output": ("merge", "export"),
    "requantize": ("merge", "export"),
    "profile": ("train",),
    "transfer_guard": ("train",),
    "adapters": ("generate",),
    "system": ("generate",),
}


class Command(NamedTuple):
    """What a command line asks for."""

    config: ConfigDict
    workdir: str
    mode: str
    prompts: list[str]
    system: str  # prompt, "" for none
    adapters: list[str]
    overwrite: bool
    output: str | None
    requantize: bool
    probe: ConfigDict | None  # the task behind eval.probe
    tasks: dict[str, ConfigDict]  # those behind measure.neighbours and measure.general
    cells: list  # of a sweep, see configs/sweeps.py
    sweep_index: int | None  # which of them this is
    distributed: bool
    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    debug_nans: bool
    transfer_guard: str
    profile: int


def define_flags() -> flags.FlagValues:
    """The flags of this program, of its own set so that it can be called more than once in a process."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    flags.DEFINE_string("config", None, "experiment file, with arguments after a colon", flag_values=values)
    flags.DEFINE_string("workdir", None, "where the run is kept; default runs/<experiment>", flag_values=values)
    flags.DEFINE_string("mode", "train", " | ".join(MODES), flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "text to continue in mode generate; repeatable", flag_values=values)
    flags.DEFINE_string("system", "", "system prompt before each --prompt, for a model with a chat template",
                        flag_values=values)
    flags.DEFINE_list("adapters", [], "adapters to compare in mode generate; default the workdir's", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "train again from the start, whatever the workdir holds", flag_values=values)
    flags.DEFINE_string("output", None, "folder that merge writes; default workdir/merged", flag_values=values)
    flags.DEFINE_bool("requantize", False, "merge into a quantised base (nf4 or fp4, in blocks) again, not into plain "
                      "weights", flag_values=values)
    flags.DEFINE_integer("sweep_index", None, "which cell of a sweep to run, from 0, here and now; default all, each "
                         "in a process of its own", flag_values=values)
    flags.DEFINE_bool("distributed", False, "one of several processes that train together", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of the first process; Slurm, GKE and TPU VMs tell it",
                        flag_values=values)
    flags.DEFINE_integer("num_processes", None, "how many processes there are; the same", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0; the same", flag_values=values)
    flags.DEFINE_bool("debug_nans", False, "stop where a NaN is made (jax_debug_nans); slow", flag_values=values)
    flags.DEFINE_string("transfer_guard", "allow", "what to do about copies between host and device in the training "
                        "loop that the program does not ask for: " + " | ".join(GUARDS), flag_values=values)
    flags.DEFINE_integer("profile", 0, "write a trace of so many training steps to workdir/profile", flag_values=values)
    flags.DEFINE_bool("help", False, "show this text and every key of the configuration", flag_values=values)
    return values


def parse_command(argv: list[str]) -> Command | None:
    """The command, or ``None`` after ``--help`` was answered. Raises ``PeftJaxError`` for what cannot be meant."""
    values, overrides = parse_flags(argv)
    if values.help:
        print_help(values)
        return None
    config, name = experiment_config(values, overrides)
    check_mode(values)
    check_shape(config)  # again: on the command line a tuple may hold anything
    check(tidy(config))
    check_runtime(values)
    cells = sweep_cells(values, config, parse.overridden_keys(overrides))
    return Command(
        config=config, workdir=values.workdir or f"runs/{name}", mode=values.mode, prompts=values.prompt,
        system=values.system, adapters=[source for source in values.adapters if source.strip()],
        overwrite=values.overwrite, output=values.output, requantize=values.requantize,
        probe=base.task_config(config.eval.probe) if config.eval.probe else None,
        tasks={task: base.task_config(task) for task in (*config.measure.neighbours, *config.measure.general)},
        cells=cells, sweep_index=values.sweep_index, distributed=values.distributed, coordinator=values.coordinator,
        num_processes=values.num_processes, process_id=values.process_id, debug_nans=values.debug_nans,
        transfer_guard=values.transfer_guard, profile=values.profile)


def parse_flags(argv: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """The flags, and the arguments that are none of them."""
    values = define_flags()
    parse.check_text(argv)
    try:
        return values, values([sys.argv[0], *argv], known_only=True)[1:]
    except flags.Error as error:
        raise PeftJaxError(" ".join(str(error).split())) from error


def experiment_config(values: flags.FlagValues, overrides: list[str]) -> tuple[ConfigDict, str]:
    """The configuration with ``overrides``, and the name of the experiment."""
    if not values.config:
        raise PeftJaxError("say which experiment: --config=experiments/lora.py (--help shows all flags)")
    config, name = parse.load_experiment(values.config)
    check_shape(config)
    unknown = parse.override(config.lock(), overrides)
    if unknown:
        raise PeftJaxError(f"unknown argument {unknown[0]}; {nearest(unknown[0].split('=')[0].lstrip('-'), values)}")
    return config, name


def check_mode(values: flags.FlagValues) -> None:
    """Raise ``PeftJaxError`` for an unknown mode, and for flags that this mode does not read."""
    if values.mode not in MODES:
        raise PeftJaxError(f"--mode={values.mode}: {nearest(values.mode, MODES)}")
    for flag, readers in ONE_MODE.items():
        value = values[flag].value
        if value and value != values[flag].default and values.mode not in readers:
            raise PeftJaxError(f"--{flag} is for --mode={' and '.join(readers)}; this is --mode={values.mode}")
    if values.system and not values.prompt:
        raise PeftJaxError("--system goes before the questions of --prompt: add one")


def sweep_cells(values: flags.FlagValues, config: ConfigDict, keys: list[str]) -> list:
    """The checked cells of a sweep, [] of any other experiment; ``keys`` are those of the command line. Raises
    ``PeftJaxError`` for flags that do not fit."""
    if "sweep" in config:
        check_sweep(config)
    cells = parse.load_cells(values.config, config)
    if not isinstance(cells, list) or not all(isinstance(cell, Cell) for cell in cells):
        raise PeftJaxError(f"--config={values.config}: get_cells returns no list of configs.sweeps.Cell")
    for cell in cells:
        check_shape(cell.config)
        cell.config.unlock()
        check(tidy(cell.config))
        cell.config.lock()
    check_cells(cells, config, keys)
    check_sweep_flags(values, cells)
    return cells


def check_sweep_flags(values: flags.FlagValues, cells: list) -> None:
    """Raise ``PeftJaxError`` for flags that do not fit an experiment of these cells, none of a single run."""
    only = values.mode in OF_SWEEPS and values.mode != "train"
    if not cells and (only or values.sweep_index is not None):
        flag = f"--mode={values.mode}" if only else "--sweep_index"
        raise PeftJaxError(f"{flag} is for sweeps, such as experiments/compare.py; {values.config} is a single run")
    if values.sweep_index is not None and values.mode != "train":
        raise PeftJaxError(f"--sweep_index is for --mode=train; this is --mode={values.mode}, which is of all cells")
    if cells and values.distributed:
        raise PeftJaxError("--distributed is for a single run: each cell of a sweep is run by one process")
    if values.sweep_index is not None and not 0 <= values.sweep_index < len(cells):
        raise PeftJaxError(f"--sweep_index={values.sweep_index}: this sweep has the cells 0 to {len(cells) - 1}")
    if cells and values.mode not in OF_SWEEPS:
        raise PeftJaxError(f"--mode={values.mode}: a sweep is run (--mode=train, the default), reported on "
                           "(--mode=report) or listed (--mode=cells)")


def check_runtime(values: flags.FlagValues) -> None:
    """Raise ``PeftJaxError`` for flags of the runtime that cannot be meant."""
    if values.transfer_guard not in GUARDS:
        raise PeftJaxError(f"--transfer_guard={values.transfer_guard}: {nearest(values.transfer_guard, GUARDS)}")
    for name in ("workdir", "output"):
        check_folder(name, values[name].value)
    if values.profile < 0:
        raise PeftJaxError(f"--profile={values.profile}: a number of training steps")
    place = ("coordinator", "num_processes", "process_id")
    named = [name for name in place if values[name].value is not None]
    if values.distributed and values.mode != "train":
        raise PeftJaxError(f"--distributed is for --mode=train; this is --mode={values.mode}, which one process does")
    if named and not values.distributed:
        raise PeftJaxError(f"--{named[0]} is for several processes: add --distributed")
    if named and len(named) < len(place):
        missing = " and ".join(f"--{name}" for name in place if name not in named)
        raise PeftJaxError(f"--{named[0]} goes with {missing}")
    if named:
        check_place(values)


def check_place(values: flags.FlagValues) -> None:
    """Raise ``PeftJaxError`` where a process among several cannot be the one that it is said to be."""
    port = values.coordinator.rpartition(":")[2] if ":" in values.coordinator else ""
    if values.coordinator.startswith(":") or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise PeftJaxError(f"--coordinator={values.coordinator}: HOST:PORT, such as localhost:29500, of the first "
                           "process")
    if values.num_processes < 1:
        raise PeftJaxError(f"--num_processes={values.num_processes}: at least 1")
    if not 0 <= values.process_id < values.num_processes:
        raise PeftJaxError(f"--process_id={values.process_id}: from 0 to {values.num_processes - 1}")


def print_help(values: flags.FlagValues) -> None:
    """The docstring, the flags, and every key with its default."""
    config = parse.load_experiment(values.config)[0] if values.config else base.get_config()
    print(__doc__)
    print("Flags:\n" + "\n".join(f"  --{name:<10} {values[name].help.splitlines()[0]}" for name in values))
    print("\nKeys, with their values in", values.config or "configs/base.py (which says what each means)")
    print("\n".join(f"  --config.{key}={value}" for key, value in parse.keys(config).items()))


def start(command: Command, argv: list[str]) -> int:
    """Do what the command asks; jax is imported here, so only once the command line is known to be right."""
    if command.cells and command.sweep_index is None:
        from peft_jax.cli import sweeps

        return sweeps.run(command, argv)
    from peft_jax.cli import runtime

    runtime.start(command)
    if command.cells:
        from peft_jax.cli import sweep_cell

        return sweep_cell.run(command)
    return modes.run(command)


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, 2 for an error that the user can mend, 130 when interrupted, 143
    when stopped by SIGTERM, as clusters send it before they take a machine away."""
    try:
        command = parse_command(sys.argv[1:] if argv is None else argv)
        if command is None:
            return 0
        return start(command, sys.argv[1:] if argv is None else argv)
    except PeftJaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "peft_jax").partition(".")[0] in ("peft_jax", "configs"):  # no package of somebody else's
            raise
        print(f"error: {lacking(error, 'for this command')}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {disk_fault(error)}{where}: once that is mended the same command goes on; what was finished is "
              "kept", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    code = main()
    if code == 2:  # the error is told; of a full disk, say, a dozen threads would print tracebacks while they end
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(code)
