"""Predicted against measured peak of a step: every point of a grid once, a process each.

    python benchmarks/gpu/memory.py --out benchmarks/results/memory.jsonl
    python benchmarks/gpu/memory.py --models w3 --out benchmarks/results/memory.jsonl

The grid: W1's, W2's and W3's model x rows of 1,024 and 4,096 tokens x no, half or every layer computed again x layers
compiled or not. One record a point; `table.py` makes the table.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from processes import append_record, compile_cache, gpu_state, run_contender
from workloads import WORKLOADS

STEPS = 8
"""The optimizer's state is there from the second step on."""
TIMEOUT_S = 180.0
TOKENS = {"w1": 32_768, "w2": 16_384, "w3": 8_192}
"""Tokens of a micro-batch, as the workload has them."""
LAYERS = {"w1": 12, "w2": 16, "w3": 32}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and append every point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(TOKENS), default=sorted(TOKENS))
    parser.add_argument("--out", type=Path, required=True, help="file to append the records to")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for workload, point in grid(options.models):
            arguments = ["--workload", workload, "--variant", "default", "--steps", str(STEPS)]
            arguments += overrides(workload, point)
            run = run_contender("ours", arguments, compile_cache(Path(folder) / "cache"), TIMEOUT_S)
            record = {"kind": "memory", "workload": workload, **point, "predicted_bytes": predict(workload, point)}
            append_record(options.out, {**record, "gpu": gpu_state(), "run": run})
            print(_line(record, run), flush=True)


def grid(models: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Workload and point, in the order they are measured."""
    for workload, compiled, length, share in itertools.product(models, (True, False), (1024, 4096), (0.0, 0.5, 1.0)):
        yield workload, {"length": length, "checkpointed": round(share * LAYERS[workload]), "compiled": compiled}


def overrides(workload: str, point: dict[str, Any]) -> list[str]:
    """What the point changes in the workload's YAML."""
    positions = ["model.config.n_positions=4096"] if workload == "w1" else []
    return [
        *positions,
        f"data.max_seq_len={point['length']}",
        f"training.train_batch_size={TOKENS[workload] // point['length']}",
        f"training.torch_compile={str(point['compiled']).lower()}",
        f"model.memory={{policy: static, checkpointed_layers: {point['checkpointed']}}}",
    ]


def predict(workload: str, point: dict[str, Any]) -> int:
    """The planned peak, in bytes; needs no GPU."""
    from truthgpt.build_memory import Machine, step_cost
    from truthgpt.memory.base import MemoryPlan
    from truthgpt.validate_config import load_config

    config = load_config(str(WORKLOADS[workload].yaml), overrides(workload, point))
    cost = step_cost(config, Machine("cuda", "bf16", None, None))
    return cost.memory(MemoryPlan(TOKENS[workload] // point["length"], 1, point["checkpointed"])).peak_bytes


def _line(record: dict[str, Any], run: dict[str, Any]) -> str:
    where = f"{record['workload']} T={record['length']} {record['checkpointed']} again, compiled {record['compiled']}"
    predicted = record["predicted_bytes"] / 2**30
    if run.get("memory") is None:
        return f"{where:42} predicted {predicted:.2f} GiB, {run.get('failed') or 'not measured'}"
    measured = run["memory"]["peak_allocated_bytes"] / 2**30
    return f"{where:42} predicted {predicted:.2f}, measured {measured:.2f} GiB, {predicted / measured - 1:+.1%}"


if __name__ == "__main__":
    main()
