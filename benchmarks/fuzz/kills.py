"""Kills: a tiny run ended by SIGKILL at random moments and started again each time, until it ends; then what it leaves
is compared, bit for bit, with a run that nothing ended.

Runs are forked from a process that has imported everything and has not begun to compute, so that a start takes no
seconds of imports.
"""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz import material
from peft_jax.core.files import remove

KILLS = (1, 2, 3, 4, 6)  # of one run, at most


def main(place: str, kills: str, seed: str) -> None:
    """Print a line of JSON for each run: what it was, and what is wrong, "" if nothing."""
    folder, rng = Path(place), Random(int(seed))
    for name in ("model", "table"):  # not here, where nothing may compute
        wait(fork(lambda name=name: getattr(material, name)(folder)))
    import_all(folder)
    base, seconds = unkilled(folder)
    print(json.dumps({"seconds": seconds}), flush=True)
    done = 0
    while done < int(kills):
        run_seed = rng.randrange(10**9)
        told = killed(folder, base, seconds, run_seed, most=int(kills) - done)
        done += told["kills"]
        print(json.dumps({**told, "seed": run_seed}), flush=True)


def import_all(place: Path) -> None:
    """What a run imports, by the way of its tokenizer also what transformers imports late."""
    from peft_jax.cli import train  # noqa: F401
    from peft_jax.hub.tokenizer import load_tokenizer

    load_tokenizer(material.model(place))


def fork(work: Callable[[], Any], log: Path | None = None) -> int:
    """The number of a process that does this work, and nothing else."""
    if process := os.fork():
        return process
    try:
        os.dup2(os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        code = work()
        os._exit(code if isinstance(code, int) else 0)
    finally:
        os._exit(1)


def wait(process: int) -> int:
    """Its exit code; of one that a signal ended, that with a minus."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def start(folder: Path, place: Path) -> int:
    import run

    return fork(lambda: run.main([*material.arguments(place), f"--workdir={folder}"]), folder.with_suffix(".log"))


def unkilled(place: Path) -> tuple[dict[str, Any], float]:
    """What a run leaves that nothing ended, and the seconds that it takes; twice, so that programs are compiled."""
    for _ in range(2):
        folder = place / "unkilled"
        remove(folder)
        began = time.perf_counter()
        if wait(start(folder, place)):
            sys.exit(f"the run that nothing ends fails: {folder.with_suffix('.log').read_text()[-1000:]}")
    return left(folder), time.perf_counter() - began


def killed(place: Path, base: dict[str, Any], seconds: float, seed: int, most: int) -> dict[str, Any]:
    """{"kills": how many, "wrong": what is wrong}"""
    rng, folder, kills, moments = Random(seed), place / f"killed-{seed}", 0, []
    for _ in range(min(rng.choice(KILLS), most)):
        process, moment = start(folder, place), rng.uniform(0, 1.1 * seconds)
        if ended_within(process, moment):
            break
        os.kill(process, signal.SIGKILL)
        wait(process)
        kills, moments = kills + 1, [*moments, round(moment, 3)]
    code = wait(start(folder, place))
    log = folder.with_suffix(".log")
    wrong = f"exit code {code}: {log.read_text()[-300:]}" if code else difference(base, left(folder))
    if not wrong:
        remove(folder)
        remove(log)
    return {"kills": kills, "moments": moments, "wrong": wrong}


def ended_within(process: int, seconds: float) -> bool:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            wait(process)
            return True
        time.sleep(0.005)
    return False


def left(folder: Path) -> dict[str, Any]:
    """What a run leaves, without times: hashes of the adapter, losses, metrics, and every name."""
    results = json.loads((folder / "results.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = sorted((folder / "adapter").iterdir())
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {"adapter": hashes, "rows": [[row["step"], row["loss"], row["learning_rate"]] for row in rows],
            "results": {key: results[key] for key in ("before", "after", "steps", "trainable", "all")},
            "names": sorted(path.name for path in folder.iterdir()),
            "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir())}


def difference(base: dict[str, Any], now: dict[str, Any]) -> str:
    odd = [key for key in base if base[key] != now[key]]
    return f"{odd[0]} was {base[odd[0]]}, is {now[odd[0]]}" if odd else ""


if __name__ == "__main__":
    main(*sys.argv[1:])
