#!/usr/bin/env bash
# Everything that only an accelerator can show, in one call of at most eight minutes.
#
#     benchmarks/device.sh OUT [WHEELS]            # on the machine with the card
#     benchmarks/device.sh OUT --small             # only that it runs, on any machine: tiny sizes
#
# OUT gets one file for each step and figures.json with all of them; what was measured is printed last, as tables. WHEELS
# is a folder of wheels that the machine lacks and cannot fetch (benchmarks/device_wheels.sh makes it). Steps run in
# order of worth, each with its own limit in seconds, so that a run that is cut still tells the most.
# `python benchmarks/device_tables.py OUT` turns figures.json into docs/device.md.
set -uo pipefail
cd "$(dirname "$0")/.."

out="$1" wheels="${2:-}"
python="${PYTHON:-python3}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
rm -f "$out"/*.txt "$out/figures.json"
export PEFT_JAX_CACHE="${PEFT_JAX_CACHE:-$out/cache}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # torch has the same card, in turn

small=""
if [ "$wheels" = --small ]; then
  small=1
elif [ -n "$wheels" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --target "$out/site" "$wheels"/*.whl
  export PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}"
fi

step() { # name, limit in seconds, command
  local name="$1" limit="$2" began="$SECONDS"
  shift 2
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.txt" 2>"$out/$name.err.txt"
  echo "$?" >"$out/$name.rc.txt"
  echo "$((SECONDS - began))" >"$out/$name.seconds.txt"
  echo "$name: exit code $(cat "$out/$name.rc.txt") after $(cat "$out/$name.seconds.txt") s"
}

if [ -n "$small" ]; then
  step tests 300 "$python" benchmarks/device_checks.py
  step throughput_1b 200 "$python" benchmarks/throughput.py --size=tiny --length=64 --steps=2 --alone
  step attention 100 "$python" benchmarks/attention.py --small
  step product 100 "$python" benchmarks/quant_kernel.py --interpret --small --rounds=1
  step decoding 200 "$python" benchmarks/decoding.py --size=tiny --new=4 --rounds=1 --batches=1,2 --alone
else
  step tests 60 "$python" benchmarks/device_checks.py
  step throughput_8b 130 "$python" benchmarks/throughput.py --size=8b --rows=1 --length=4096 --steps=5
  step throughput_1b 70 "$python" benchmarks/throughput.py --size=1b --rows=4 --length=2048 --steps=8
  step attention 40 "$python" benchmarks/attention.py
  step product 70 "$python" benchmarks/quant_kernel.py --double_quant --rounds=10
  step decoding 80 "$python" benchmarks/decoding.py
fi

"$python" benchmarks/device_tables.py "$out" --collect
