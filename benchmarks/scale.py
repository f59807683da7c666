"""What 8 and 70 billion parameters need of 1, 8 and 64 devices: the real step, compiled for shapes alone.

    python benchmarks/scale.py                      # all cases, several minutes on 2 cores; the table of docs/scale.md
    python benchmarks/scale.py --cases=qlora-8b-1   # some of them

Each case is an experiment's configuration in bfloat16 with remat, one row of 2048 tokens for each part that rows are
cut into (data x fsdp). Bytes of a device are what XLA says of the program that a CPU would run on so many virtual
devices: arguments are exact, temporaries an estimate. Bytes received are those of the program's collectives in rings.
FLOPs are those of all products of matrices, what remat computes again included. Times are computed, not measured: of
arithmetic, of reading the weights from memory three times (forward, again, backward), and of the collectives, each
alone at the public peak rate, and "bound" is the longest of the three. Sources of the rates: NVIDIA's H100 datasheet
(SXM, dense bfloat16; NVLink, one direction), cloud.google.com/tpu/docs/v5e and /v5p (interchip bandwidth, all links).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


class Case(NamedTuple):
    """An experiment, a model of configs/models.py, and the mesh: data, fsdp, tensor."""

    experiment: str
    model: str
    mesh: tuple[int, int, int]


CASES = {
    "qlora-8b-1": Case("qlora", "llama3_8b", (1, 1, 1)),
    "qlora-8b-8": Case("qlora", "llama3_8b", (1, 8, 1)),
    "lora-8b-8": Case("lora", "llama3_8b", (1, 8, 1)),
    "lora-8b-8-data": Case("lora", "llama3_8b", (8, 1, 1)),
    "full-8b-8": Case("full", "llama3_8b", (1, 8, 1)),
    "qlora-70b-1": Case("qlora", "llama3_70b", (1, 1, 1)),
    "qlora-70b-8": Case("qlora", "llama3_70b", (1, 8, 1)),
    "lora-70b-8": Case("lora", "llama3_70b", (1, 8, 1)),
    "lora-70b-8-tensor": Case("lora", "llama3_70b", (1, 1, 8)),
    "qlora-70b-64": Case("qlora", "llama3_70b", (1, 64, 1)),
    "lora-70b-64": Case("lora", "llama3_70b", (1, 64, 1)),
    "lora-70b-64-mixed": Case("lora", "llama3_70b", (1, 8, 8)),
    "full-70b-64": Case("full", "llama3_70b", (1, 64, 1)),
}


class Chip(NamedTuple):
    """Peak rates: FLOP/s in bfloat16, bytes/s of memory, bytes/s from other devices."""

    name: str
    flops: float
    memory: float
    link: float


CHIPS = (Chip("H100", 989.4e12, 3.35e12, 450e9), Chip("v5e", 197e12, 819e9, 200e9), Chip("v5p", 459e12, 2765e9, 600e9))


def measure(case: Case) -> dict:
    """The plan of one case, in this process, which must have as many devices."""
    from configs import base, parse
    from peft_jax.cli.plan import plan_config
    from peft_jax.parallel.mesh import make_mesh, row_shards
    from peft_jax.planner.collectives import moved

    config, _ = parse.load_experiment(f"{ROOT}/experiments/{case.experiment}.py:model={case.model}")
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), case.mesh, strict=True)))
    config.model.update(dtype="bfloat16", param_dtype="bfloat16", remat=True)
    config.data.update(base.get_config().data)
    config.data.update(rows=row_shards(make_mesh(*case.mesh)), row_length=2048)
    config.optim.accumulate_steps = 1
    began = time.perf_counter()
    found = plan_config(config)
    program = found.program
    return {"arguments": program.memory.arguments, "total": program.memory.total, "flops": program.flops,
            "received": moved(program.traffic, program.devices), "devices": program.devices,
            "seconds": time.perf_counter() - began}


def apart(name: str) -> dict:
    """``measure`` in a process of its own, with the devices that the case wants."""
    data, fsdp, tensor = CASES[name].mesh
    environment = {**os.environ, "JAX_PLATFORMS": "cpu",
                   "XLA_FLAGS": f"--xla_force_host_platform_device_count={data * fsdp * tensor}"}
    done = subprocess.run([sys.executable, __file__, f"--alone={name}"], env=environment, cwd=ROOT, text=True,
                          capture_output=True)
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def times(found: dict, chip: Chip) -> list[float]:
    """Seconds of arithmetic, memory and links, each alone."""
    return [found["flops"] / found["devices"] / chip.flops, 3 * found["arguments"] / chip.memory,
            found["received"] / chip.link]


def row(name: str, found: dict) -> str:
    case = CASES[name]
    mesh = " x ".join(map(str, case.mesh))
    bounds = []
    for chip in CHIPS:
        each = times(found, chip)
        which = ("arithmetic", "memory", "links")[each.index(max(each))]
        bounds.append(f"{max(each):.2f} s, {which}")
    sizes = f"{found['arguments'] / 1e9:.2f} | {found['total'] / 1e9:.1f} | {found['received'] / 1e9:.2f}"
    return (f"| {case.experiment} | {case.model} | {mesh} | {sizes} | {found['flops'] / 1e12:.0f} | "
            f"{' | '.join(bounds)} | {found['seconds']:.0f} s |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--alone", help="one case, as JSON, with the devices that this process has")
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(CASES[args.alone])))
        return
    print("| experiment | model | data x fsdp x tensor | weights and state, GB a device | with temporaries | "
          "received in a step, GB a device | TFLOP a step, all | " +
          " | ".join(f"{chip.name} bound" for chip in CHIPS) + " | tracing and compiling |\n" + "|---" * 11 + "|")
    for name in args.cases.split(","):
        print(row(name, apart(name)), flush=True)


if __name__ == "__main__":
    main()
