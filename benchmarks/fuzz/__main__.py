"""A fuzz: malformed inputs over every surface, and kills of a training run.

    python benchmarks/fuzz --inputs=5000 --kills=200 --seed=0            # --workers=2 on two cores
    python benchmarks/fuzz --surface=gguf --only=12                      # one input again, with its traceback
    python benchmarks/fuzz --inputs=300 --kills=0 --surface=data

Each input is made of a whole one (benchmarks/fuzz/surfaces/) and of a seed. It may be refused in one line, or accepted
where it says what the whole one says, or where an independent reader (transformers, safetensors, gguf, jinja2, json)
finds in it what ours does. All else fails: a traceback, a hang (over 5 s, twice, the second time in a fresh process),
memory over 2 GB, a silent change, a refusal of what changes nothing. What fails is kept in FOLDER/failures. FOLDER
keeps the results, too: the same command goes on from there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.fuzz.cases import FAILURES, OUTCOMES  # noqa: E402
from benchmarks.fuzz.pool import Worker, environment  # noqa: E402

SHARES = {"gguf": 16, "model_config": 18, "tokenizer": 9, "weights": 9, "adapter": 16, "template": 6, "data": 14,
          "command_line": 10, "workdir": 2}  # of the inputs, in percent


def inputs(count: int, seed: int, surface: str | None) -> list[tuple[str, int]]:
    """(surface, seed) of each input, all surfaces in turn, so that a fuzz cut short is balanced."""
    shares = {surface: 100} if surface else SHARES
    each = {name: [(place, name, seed * 10**6 + place) for place in range(-(-count * share // 100))]
            for name, share in shares.items()}
    mixed = sorted((place / len(rows), name, one) for rows in each.values() for place, name, one in rows)
    return [(name, one) for _, name, one in mixed][:count]


def fuzz(asked: list[tuple[str, int]], place: Path, workers: int, seconds: float, memory: int) -> None:
    """Try the inputs that are not in ``results.jsonl`` yet, and write what comes of them there."""
    done = {(row["surface"], row["seed"]) for row in rows_of(place / "results.jsonl")}
    queue: SimpleQueue = SimpleQueue()
    for one in asked:
        if one not in done:
            queue.put(one)
    lock, total = threading.Lock(), len(asked)

    def work(number: int) -> None:
        worker = Worker(place, number, seconds, memory)
        for surface, seed in drained(queue):
            answer = worker.ask(surface, seed)
            if answer["kind"] in FAILURES:
                worker.keep(place / "failures" / f"{surface}-{seed}")
            with lock:
                append(place / "results.jsonl", {"surface": surface, "seed": seed, **answer})
                tell(surface, seed, answer, total - queue.qsize(), total)
        worker.end()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def drained(queue: SimpleQueue) -> Iterator[Any]:
    while True:
        try:
            yield queue.get_nowait()
        except Empty:
            return


def tell(surface: str, seed: int, answer: dict[str, Any], done: int, total: int) -> None:
    if answer["kind"] in FAILURES:
        print(f"{answer['kind']}: {answer['what'][:200]}\n    {answer['said'][:300]}\n    python benchmarks/fuzz "
              f"--surface={surface} --only={seed}", flush=True)
    elif done % 500 == 0:
        print(f"{done} of {total}", file=sys.stderr, flush=True)


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, [] where there is none; a last one that was cut short is taken off it."""
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
    if whole:
        path.write_text(f"{whole}\n", encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def kill(count: int, seed: int, place: Path) -> None:
    """Kills until there are ``count`` of them in ``kills.jsonl``."""
    rows = rows_of(place / "kills.jsonl")
    missing = count - sum(row["kills"] for row in rows)
    if missing <= 0:
        return
    command = [sys.executable, "-m", "benchmarks.fuzz.kills", str(place), str(missing), str(seed + len(rows))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(place), cwd=ROOT, text=True)
    for row in map(json.loads, process.stdout or ()):
        if "seconds" in row:
            print(f"a run takes {row['seconds']:.1f} s", file=sys.stderr, flush=True)
            continue
        append(place / "kills.jsonl", row)
        if row["wrong"]:
            print(f"after kills at {row['moments']} s: {row['wrong'][:300]} (kept: killed-{row['seed']})", flush=True)
    if process.wait():
        sys.exit("the kills ended early")


def table(asked: list[tuple[str, int]], place: Path) -> str:
    """A row for each surface, and one for all."""
    wanted, counts = set(asked), {name: Counter() for name in [*SHARES, "all"]}
    for row in rows_of(place / "results.jsonl"):
        if (row["surface"], row["seed"]) in wanted:
            for name in (row["surface"], "all"):
                counts[name][row["kind"]] += 1
    lines = ["| surface | inputs | " + " | ".join(OUTCOMES) + " |", "|---" * (len(OUTCOMES) + 2) + "|"]
    return "\n".join([*lines, *(f"| {name} | {sum(one.values())} | " + " | ".join(str(one[kind]) for kind in OUTCOMES) +
                                " |" for name, one in counts.items() if one)])


def of_kills(place: Path) -> str:
    rows = rows_of(place / "kills.jsonl")
    wrong = sum(bool(row["wrong"]) for row in rows)
    return (f"{sum(row['kills'] for row in rows)} kills of {len(rows)} runs: {len(rows) - wrong} ended as the one that "
            f"nothing ended, bit for bit, {wrong} did not")


def replay(surface: str, seed: int, place: Path) -> None:
    """One input in this process, its files left in the folder, with the whole traceback."""
    os.environ.update(environment(place))
    from benchmarks.fuzz import worker

    base, folder = worker.prepared(surface, place), place / "replay"
    print(*worker.tried(surface, seed, base, folder), sep="\n")
    trial = import_module(f"benchmarks.fuzz.surfaces.{surface}").trial
    worker.remove(folder)
    folder.mkdir()
    try:
        print("result:", str(trial(base, worker.Random(seed), folder).read())[:2000])
    except BaseException:
        traceback.print_exc()
    print(f"its files: {folder}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks/fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--surface", choices=SHARES)
    parser.add_argument("--only", type=int, help="the seed of one input")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=float, default=5.0, help="seconds of an input")
    parser.add_argument("--memory", type=float, default=2.0, help="GB of an input")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "peft_jax_fuzz")
    asked = parser.parse_args(argv)
    asked.folder.mkdir(parents=True, exist_ok=True)
    if asked.only is not None and not asked.surface:
        parser.error("--only is the seed of an input of one surface: give --surface, too")
    if asked.only is not None:
        replay(asked.surface, asked.only, asked.folder.absolute())
        return 0
    cases = inputs(asked.inputs, asked.seed, asked.surface)
    fuzz(cases, asked.folder.absolute(), asked.workers, asked.limit, int(asked.memory * 1e9))
    kill(asked.kills, asked.seed, asked.folder.absolute())
    print(table(cases, asked.folder))
    print(of_kills(asked.folder))
    failed = [row for row in rows_of(asked.folder / "results.jsonl") if row["kind"] in FAILURES]
    return bool(failed) or any(row["wrong"] for row in rows_of(asked.folder / "kills.jsonl"))


if __name__ == "__main__":
    sys.exit(main())
