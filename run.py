"""Fine-tune a pretrained language model with few parameters, measure it, merge it, try it.

    python run.py --config=experiments/lora.py
    python run.py --config=experiments/lora.py:model=...,task=... --config.method.r=8 --workdir=runs/r8
    python run.py --config=experiments/lora.py --mode=generate --prompt="Review: A delight."

Modes: train (evaluates before and after; the same command again resumes), eval (the base and the adapter of a workdir),
merge, or export, which is the same (the workdir's adapter into the weights: a folder that transformers loads,
workdir/merged or --output; with --requantize what was quantised, as nf4 or fp4 in blocks, is so again, and what that
costs is said), generate (base and adapter side by side; or the adapters of --adapters=runs/a/adapter,owner/name,
folders or Hub ids), plan (what memory the training step needs and which devices hold it, from shapes alone), recommend
(which method to take with the memory, tasks and latency of config.recommend, from the model's config alone).
"""

import sys
from typing import NamedTuple

from absl import flags
from ml_collections.config_dict import ConfigDict

from configs import base, parse
from configs.check import check, tidy
from peft_jax.errors import PeftJaxError, nearest

GUARDS = ("allow", "log", "disallow")
MODES = ("train", "eval", "merge", "export", "generate", "plan", "recommend")


class Command(NamedTuple):
    """What a command line asks for."""

    config: ConfigDict
    workdir: str
    mode: str
    prompts: list[str]
    adapters: list[str]
    overwrite: bool
    output: str | None
    requantize: bool
    probe: ConfigDict | None  # the task behind eval.probe
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
    flags.DEFINE_list("adapters", [], "adapters to compare in mode generate; default the workdir's", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "train again from the start, whatever the workdir holds", flag_values=values)
    flags.DEFINE_string("output", None, "folder that merge writes; default workdir/merged", flag_values=values)
    flags.DEFINE_bool("requantize", False, "merge into a quantised base (nf4 or fp4, in blocks) again, not into plain "
                      "weights", flag_values=values)
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
    values = define_flags()
    try:
        rest = values([sys.argv[0], *argv], known_only=True)[1:]
    except flags.Error as error:
        raise PeftJaxError(" ".join(str(error).split())) from error
    if values.help:
        print_help(values)
        return None
    if not values.config:
        raise PeftJaxError("say which experiment: --config=experiments/lora.py (--help shows all flags)")
    config, name = parse.load_experiment(values.config)
    unknown = parse.override(config.lock(), rest)
    if unknown:
        raise PeftJaxError(f"unknown argument {unknown[0]}; {nearest(unknown[0].split('=')[0].lstrip('-'), values)}")
    if values.mode not in MODES:
        raise PeftJaxError(f"--mode={values.mode}: {nearest(values.mode, MODES)}")
    for flag in ("output", "requantize"):
        if values[flag].value and values.mode not in ("merge", "export"):
            raise PeftJaxError(f"--{flag} is for --mode=merge and export; this is --mode={values.mode}")
    check(tidy(config))
    check_runtime(values)
    probe = base.task_config(config.eval.probe) if config.eval.probe else None
    if values.adapters and values.mode != "generate":
        raise PeftJaxError(f"--adapters is for --mode=generate; this is --mode={values.mode}")
    adapters = [source for source in values.adapters if source.strip()]
    return Command(config, values.workdir or f"runs/{name}", values.mode, values.prompt, adapters, values.overwrite,
                   values.output, values.requantize, probe, values.distributed, values.coordinator,
                   values.num_processes, values.process_id, values.debug_nans, values.transfer_guard, values.profile)


def check_runtime(values: flags.FlagValues) -> None:
    """Raise ``PeftJaxError`` for flags of the runtime that cannot be meant."""
    if values.transfer_guard not in GUARDS:
        raise PeftJaxError(f"--transfer_guard={values.transfer_guard}: {nearest(values.transfer_guard, GUARDS)}")
    if values.profile < 0:
        raise PeftJaxError(f"--profile={values.profile}: a number of training steps")
    given = {name: values[name].value for name in ("coordinator", "num_processes", "process_id")}
    named = [name for name, value in given.items() if value is not None]
    if values.distributed and values.mode != "train":
        raise PeftJaxError(f"--distributed is for --mode=train; this is --mode={values.mode}, which one process does")
    if named and not values.distributed:
        raise PeftJaxError(f"--{named[0]} is for several processes: add --distributed")
    if named and len(named) < len(given):
        missing = " and ".join(f"--{name}" for name in given if name not in named)
        raise PeftJaxError(f"--{named[0]} goes with {missing}")
    if named and not 0 <= values.process_id < values.num_processes:
        raise PeftJaxError(f"--process_id={values.process_id}: from 0 to {values.num_processes - 1}")


def print_help(values: flags.FlagValues) -> None:
    """The docstring, the flags, and every key with its default."""
    config = parse.load_experiment(values.config)[0] if values.config else base.get_config()
    print(__doc__)
    print("Flags:\n" + "\n".join(f"  --{name:<10} {values[name].help.splitlines()[0]}" for name in values))
    print("\nKeys, with their values in", values.config or "configs/base.py (which says what each means)")
    print("\n".join(f"  --config.{key}={value}" for key, value in parse.keys(config).items()))


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, 2 for an error that the user can mend, 130 when interrupted, 143
    when stopped by SIGTERM, as clusters send it before they take a machine away."""
    try:
        command = parse_command(sys.argv[1:] if argv is None else argv)
        if command is None:
            return 0
        from peft_jax.train import hosts, jobs  # jax comes with it, so only once the command line is known to be right

        hosts.start(command)
        return jobs.JOBS[command.mode](command)
    except PeftJaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
