"""The same YAML on a GPU of which another process holds a part: it starts, ends, and learns the same.

    python benchmarks/gpu/ballast.py --out benchmarks/results/ballast.jsonl

W2's model with 16 rows of 4,096 tokens a step and the default memory policy, beside tensors of 0, 20, 40, 60 and 80 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from processes import append_record, gpu_state, offline_environment
from workloads import WORKLOADS

GIGABYTES = (0, 20, 40, 60, 80)
STEPS = 12
STEP = ("training.train_batch_size=16", "training.grad_accum_steps=1")


def main(argv: Sequence[str] | None = None) -> None:
    """Train beside each ballast, print and append a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", nargs="+", type=int, default=list(GIGABYTES), help="sizes of the ballast")
    parser.add_argument("--out", type=Path, required=True, help="file to append the records to")
    options = parser.parse_args(argv)
    for size in options.gigabytes:
        ballast = torch.zeros(size * 10**9, dtype=torch.uint8, device="cuda")
        run, said = train()
        del ballast
        torch.cuda.empty_cache()
        append_record(options.out, {"kind": "ballast", "ballast_gb": size, "gpu": gpu_state(), "run": run})
        losses = ", ".join(f"{window['loss']:.4f}" for window in run["windows"])
        print(f"{size} GB: {run['memory']['peak_allocated_bytes'] / 2**30:.1f} GiB, {losses}\n  {said}", flush=True)


def train() -> tuple[dict[str, Any], str]:
    """What `truthgpt benchmark train --json` reports, and its line about the memory plan."""
    command = [sys.executable, "-m", "truthgpt", "benchmark", "train", str(WORKLOADS["w2"].yaml), *STEP]
    command += ["--steps", str(STEPS), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=offline_environment())
    if done.returncode:
        raise SystemExit(f"the run failed (exit {done.returncode}): {done.stderr[-2000:]}")
    return json.loads(done.stdout), next((line for line in done.stderr.splitlines() if "memory:" in line), "")


if __name__ == "__main__":
    main()
