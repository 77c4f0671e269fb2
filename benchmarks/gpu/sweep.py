"""HF Trainer's best: every variant of a workload's sweep once, a process each. Freeze the winner in workloads.py.

    python benchmarks/gpu/sweep.py w1 --out benchmarks/results/sweep.jsonl
    python benchmarks/gpu/sweep.py w2 --variants liger liger+rows=8 --minutes 9 --out benchmarks/results/sweep.jsonl

One record a variant. The call ends within `--minutes`; variants that were not reached are named, to be given with
`--variants` to the next call. A variant that fails (out of memory, a crash) has its record too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contender import say
from processes import append_record, compile_cache, gpu_state, run_contender
from workloads import WORKLOADS

STEPS = 32
"""Optimizer steps of a variant: fewer than a comparison takes."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the variants, print and append what each reached."""
    options = _parse(argv)
    workload = WORKLOADS[options.workload]
    variants = options.variants or list(workload.sweep)
    forwarded = ["--workload", options.workload, "--steps", str(options.steps), *options.overrides]
    if options.data is not None:
        forwarded += ["--data", options.data]
    ends_s = time.perf_counter() + 60 * options.minutes
    longest_s = 0.0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for number, variant in enumerate(variants):
            left_s = ends_s - time.perf_counter()
            if longest_s >= left_s:
                say(f"{left_s:.0f} s are left; not run: --variants {' '.join(variants[number:])}")
                break
            cache = compile_cache(Path(folder) / str(number))
            run = run_contender("hf_trainer", ["--variant", variant, *forwarded], cache, left_s)
            longest_s = max(longest_s, run["wall_s"])
            record = {"kind": "sweep", "workload": workload.name, "title": workload.title, "peer": "hf_trainer"}
            record["overrides"] = options.overrides
            append_record(options.out, {**record, "variant": variant, "gpu": gpu_state(), "run": run})
            print(f"{variant:32} {_outcome(run)}", flush=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("--variants", nargs="+", help="instead of the workload's list")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, default=9.0, help="the call ends within this time")
    parser.add_argument("--data", help="the documents, for a workload that reads a file")
    parser.add_argument("--out", type=Path, required=True, help="file to append the records to")
    parser.add_argument("--set", nargs="+", dest="overrides", default=[], metavar="key=value", help="for the YAML")
    return parser.parse_args(argv)


def _outcome(run: dict[str, Any]) -> str:
    """Speed and memory of a variant, or why it has none."""
    if "tokens_per_s" not in run:
        return str(run.get("failed") or run["skipped"])
    memory = run["memory"]
    peak = "" if memory is None else f", {memory['peak_allocated_bytes'] / 2**30:.1f} GiB"
    return f"{run['tokens_per_s']['median']:>10,.0f} tokens/s{peak}"


if __name__ == "__main__":
    main()
