"""Worker processes that are watched: one that takes too long, or too much memory, is ended and started again."""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.fuzz.worker import what_of

ROOT = Path(__file__).resolve().parents[2]
READY = 300.0  # seconds until a worker has its undamaged input
PATIENCE = 10  # times an input's seconds, while the process waits for a core
TRAINING = {"workdir": 15.0}  # more seconds, for what an undamaged input of the surface takes itself
AFRESH = 3 << 29  # bytes: a worker that has grown to this, over many inputs, is replaced by a new one
ENVIRONMENT = {  # of tiny models: little to compile, and that kept; nothing is fetched
    "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "critical",
}  # fmt: skip


def environment(place: Path) -> dict[str, str]:
    """For processes that are tried: a cache of their own, and this checkout first, or what PYTHONPATH names before."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    return {**os.environ, **ENVIRONMENT, "PEFT_JAX_CACHE": str(place / "cache"), "PYTHONPATH": path,
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(place / "programs")}


class Worker:
    """One process, started when it is needed. seconds, memory: what an input may take (bytes resident)."""

    def __init__(self, place: Path, number: int, seconds: float, memory: int):
        self.place, self.number, self.seconds, self.memory = place, number, seconds, memory
        self.process: subprocess.Popen | None = None
        self.folder = place / f"worker-{number}"

    def ask(self, surface: str, seed: int) -> dict[str, Any]:
        """What came of one input; one that takes too long is tried again by a fresh process, alone and warm, before
        that counts."""
        answer = self._once(surface, seed)
        return self._once(surface, seed) if answer["kind"] == "hang" else answer

    def _once(self, surface: str, seed: int) -> dict[str, Any]:
        if self.process is None:
            self._start()
        answer = self._answered(surface, None, READY, 64 * self.memory)  # at once, but for the first of a surface
        if answer:
            raise RuntimeError(f"{surface}: its undamaged input fails, see {self.folder}.log")
        answer = self._answered(surface, seed, self.seconds + TRAINING.get(surface, 0), self.memory)
        if "memory" in answer and answer["memory"] > self.memory:
            answer.update(kind="memory", said=f"{answer['memory'] / 1e9:.1f} GB")
        if answer.get("memory", self.memory) > AFRESH:
            self.end()
        return answer

    def _start(self) -> None:
        command = [sys.executable, "-m", "benchmarks.fuzz.worker", str(self.place), str(self.number)]
        with open(self.folder.with_suffix(".log"), "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                            env=environment(self.place), cwd=ROOT, text=True)

    def _answered(self, surface: str, seed: int | None, seconds: float, memory: int) -> dict[str, Any]:
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"surface": surface, "seed": seed}) + "\n")
        process.stdin.flush()
        until, waited = time.monotonic() + seconds, queued(process.pid)
        while not select.select([process.stdout], [], [], 0.02)[0]:
            if time.monotonic() > until + min(queued(process.pid) - waited, PATIENCE * seconds):
                return self._ended("hang", f"over {seconds:g} s")
            if resident(process.pid) > memory:
                return self._ended("memory", f"over {memory / 1e9:.1f} GB")
        line = process.stdout.readline()
        return json.loads(line) if line else self._ended("traceback", f"the process ended with {process.wait()}")

    def _ended(self, kind: str, said: str) -> dict[str, Any]:
        self.end()
        what = what_of(self.folder)
        return {"kind": kind, "said": said, "what": json.loads(what.read_text()) if what.exists() else "undamaged"}

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def keep(self, folder: Path) -> None:
        """Copy what the last input was made of; pipes and devices are not followed."""
        shutil.copytree(self.folder, folder, symlinks=True, dirs_exist_ok=True, ignore=_no_files)


def resident(process: int) -> int:
    """Bytes of a process in memory, 0 where it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError):
        return 0


def queued(process: int) -> float:
    """Seconds that a process has waited for a core: on a busy machine these are not its own."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _no_files(folder: str, names: list[str]) -> list[str]:
    """Names that cannot be copied: pipes, sockets, and files of which most is a hole."""
    paths = {name: Path(folder, name) for name in names}
    return [name for name, path in paths.items() if not path.is_symlink() and not path.is_dir() and (
        not path.is_file() or path.stat().st_size > 1 << 26)]
