"""The figures of ``benchmarks/device.sh``: collected into one file, and written into the documentation.

    python benchmarks/device_tables.py OUT --collect      # OUT/figures.json of what the steps printed; prints tables
    python benchmarks/device_tables.py OUT                # docs/device.md of OUT/figures.json
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TITLES = {
    "tests": "Programs that only an accelerator runs, against the plain ones",
    "throughput_8b": "A training step of Llama 3.1 8B's shapes",
    "throughput_1b": "A training step of Llama 3.2 1B's shapes",
    "attention": "Attention of one layer",
    "product": "Products with an NF4 weight",
    "decoding": "Greedy decoding",
}


def collect(folder: Path) -> dict:
    """{step: {"seconds", "exit_code", "output", "errors"}} in the order of ``TITLES``; steps that never began are not
    there."""
    figures = {}
    for name in TITLES:
        output = folder / f"{name}.txt"
        if output.exists():
            code, seconds = folder / f"{name}.rc.txt", folder / f"{name}.seconds.txt"
            figures[name] = {
                "seconds": int(seconds.read_text()) if seconds.exists() else None,
                "exit_code": int(code.read_text()) if code.exists() else None,  # none: cut while it ran
                "output": output.read_text(), "errors": (folder / f"{name}.err.txt").read_text()[-2000:]}
    return figures


def section(name: str, figure: dict) -> str:
    """A step's part of the page: what it printed, and how it ended where that was not well."""
    code = figure["exit_code"]
    words = {0: "", 124: "Cut at its time limit.\n", None: "Cut while it ran.\n"}
    ended = words.get(code, f"Failed: exit code {code}.\n")
    return f"## {TITLES[name]}\n\n{figure['output'].strip()}\n\n{ended}"


def page(figures: dict) -> str:
    parts = [section(name, figures[name]) for name in TITLES if name in figures]
    return ("# On an accelerator\n\nMeasured by `benchmarks/device.sh` in one call; this page is written by "
            "`python benchmarks/device_tables.py`.\n\n" + "\n".join(parts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--collect", action="store_true")
    args = parser.parse_args()
    path = args.folder / "figures.json"
    if args.collect:
        figures = collect(args.folder)
        path.write_text(json.dumps(figures, indent=1))
        print("\n" + page(figures))
        return int(any(one["exit_code"] for one in figures.values()))
    if not path.exists():
        print(f"{path} is not there: benchmarks/device.sh {args.folder} makes it", file=sys.stderr)
        return 2
    target = ROOT / "docs" / "device.md"
    target.write_text(page(json.loads(path.read_text())))
    print(f"wrote {target.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
