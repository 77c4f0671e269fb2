"""What each level of tuning gains, alone: every level once, a process each, its settings on top of those before.

    python benchmarks/gpu/levels.py w1 --out benchmarks/results/levels.jsonl
    python benchmarks/gpu/levels.py w4 --data gsm8k_train.jsonl --out benchmarks/results/levels.jsonl

One record a level. The levels of w1 and w4 are those of docs/performance.md; w2 and w3 are what float8 gains, on W2 and
on eight layers of W3's model with all weights trained.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from processes import append_record, compile_cache, gpu_state, run_contender

STEPS = 24
TIMEOUT_S = 300.0
"""max-autotune takes minutes."""

NOTHING = (
    *("training.mixed_precision=none", "training.allow_tf32=false", "optimizer.fused=false"),
    *("training.torch_compile=false", "ema.enabled=false"),
)
BF16 = (
    *("ema.enabled=false", "training.torch_compile=true", "training.weights=bf16_master"),
    "training.compile_mode=reduce-overhead",
)
FLOAT8 = (
    ("float8, by tensor", ("training.float8=tensorwise",)),
    ("float8, by row", ("training.float8=rowwise",)),
)
EIGHT_LAYERS = ("model.lora.enabled=false", "model.lora.dropout=0.05", "model.config.num_hidden_layers=8")
PADDED = ("data.packing=false", "training.train_batch_size=32", "data.max_seq_len=1024")
LEVELS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "w1": (
        ("float32", NOTHING),
        ("basic: TF32", ("training.allow_tf32=true",)),
        ("basic: bf16", ("training.mixed_precision=bf16",)),
        ("basic: fused optimizer", ("optimizer.fused=true",)),
        ("intermediate: compiled layers", ("training.torch_compile=true",)),
        ("advanced: bf16 weights", ("training.weights=bf16_master",)),
        ("advanced: CUDA graph", ("training.compile_mode=reduce-overhead",)),
        ("advanced: max-autotune instead", ("training.compile_mode=max-autotune",)),
    ),
    "w2": (("bf16", BF16), *FLOAT8),
    "w3": (("bf16, 8 layers, all weights", (*BF16, *EIGHT_LAYERS)), *FLOAT8),
    "w4": (
        ("basic: bf16, padded rows", (*NOTHING, *PADDED, "training.mixed_precision=bf16", "optimizer.fused=true")),
        ("intermediate: bucketed rows", ("data.bucket_by_length=true",)),
        (
            "intermediate: packed rows",
            (
                "data.bucket_by_length=false",
                "data.packing=true",
                "training.train_batch_size=1",
                "data.max_seq_len=16384",
            ),
        ),
        ("intermediate: compiled layers", ("training.torch_compile=true",)),
        ("advanced: bf16 weights", ("training.weights=bf16_master",)),
        ("advanced: CUDA graph", ("training.compile_mode=reduce-overhead",)),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the levels, print and append what each reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=sorted(LEVELS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--data", help="the documents, for w4")
    parser.add_argument("--out", type=Path, required=True, help="file to append the records to")
    options = parser.parse_args(argv)
    overrides: list[str] = []
    before = None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for level, settings in LEVELS[options.workload]:
            overrides.extend(settings)
            arguments = ["--workload", options.workload, "--variant", "default", "--steps", str(options.steps)]
            arguments += [*(["--data", options.data] if options.data else []), *overrides]
            run = run_contender("ours", arguments, compile_cache(Path(folder) / "cache"), TIMEOUT_S)
            record = {"kind": "level", "workload": options.workload, "level": level, "settings": settings}
            append_record(options.out, {**record, "gpu": gpu_state(), "run": run})
            speed = run["tokens_per_s"]["median"] if "tokens_per_s" in run else None
            gain = f"{speed / before:.2f} x" if speed and before else ""
            print(f"{level:32} {f'{speed:,.0f} tokens/s' if speed else run.get('failed')} {gain}", flush=True)
            before = speed or before


if __name__ == "__main__":
    main()
