"""What the framework costs: the default run against the same model in a plain PyTorch loop, in tokens per second.

    python benchmarks/cpu_overhead.py [--pairs 5] [--steps 150] [--json]

Every measurement is a process of its own; the two alternate (ours first in even pairs, second in odd ones), and each
pair gives one ratio, so a machine that slows down slows both. Ours: the default configuration with logging and
checkpoints on and EMA off. Plain: the same transformers model, tokens, batch, fused AdamW, clipping and cosine
schedule, and nothing else. Timed by the wall clock from step 20 to the last one, everything included.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 20


class StepClock:
    """A callback that notes when the warm-up and the last step were done."""

    def __init__(self, last_step: int) -> None:
        self._last_step = last_step
        self.start_s = self.end_s = 0.0

    def on_step(self, state: Any, info: Mapping[str, Any]) -> None:
        """Called after every optimizer step."""
        if state.step == WARM_UP_STEPS:
            self.start_s = time.perf_counter()
        if state.step == self._last_step:
            self.end_s = time.perf_counter()


def overrides(steps: int, folder: Path) -> list[str]:
    """The default run, shortened, without EMA and without a validation split."""
    return [
        f"output_dir={folder}",
        f"training.max_steps={steps}",
        "ema.enabled=false",
        "training.log_interval=10",
        "checkpoint.interval_steps=50",
        "hardware.device=cpu",
    ]


def run_ours(steps: int) -> float:
    """Tokens per second of the trainer."""
    from truthgpt import CALLBACKS, build_components, build_trainer, load_config

    clock = StepClock(steps)
    CALLBACKS.register("clock")(lambda: clock)
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = load_config(None, [*overrides(steps, Path(folder) / "run"), "training.callbacks=[print, clock]"])
            build_trainer(config, build_components(config)).train()
    finally:
        CALLBACKS.unregister("clock")
    tokens = config.training.train_batch_size * config.training.grad_accum_steps * config.data.max_seq_len
    return tokens * (steps - WARM_UP_STEPS) / (clock.end_s - clock.start_s)


def run_plain(steps: int) -> float:
    """Tokens per second of a plain loop."""
    import math

    import numpy as np
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    from truthgpt import load_config
    from truthgpt.build_data import build_tokenizer, tokenize_text
    from truthgpt.build_sources import build_text_data
    from truthgpt.models.architecture import load_architecture

    config = load_config(None, overrides(steps, Path("unused")))
    training, length = config.training, config.data.max_seq_len
    data = build_text_data(config)
    tokenizer = build_tokenizer(config, data)
    tokens = tokenize_text(data, tokenizer).stores[0].tokens
    architecture = load_architecture(None, {**config.model.config, "vocab_size": len(tokenizer)}, False)
    model = AutoModelForCausalLM.from_config(architecture, attn_implementation="sdpa", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=training.weight_decay, fused=True
    )
    rows = training.train_batch_size * training.grad_accum_steps
    rng = np.random.default_rng(0)
    start_s = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        starts = rng.integers(0, len(tokens) - length - 1, size=rows)
        batch = torch.from_numpy(np.stack([tokens[s : s + length + 1].astype(np.int64) for s in starts]))
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step + 1 == WARM_UP_STEPS:
            start_s = time.perf_counter()
    return rows * length * (steps - WARM_UP_STEPS) / (time.perf_counter() - start_s)


def measure(kind: str, steps: int) -> float:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", kind, "--steps", str(steps)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Measure the pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--json", action="store_true", dest="as_json")
    parser.add_argument("--child", choices=("ours", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print({"ours": run_ours, "plain": run_plain}[options.child](options.steps))
        return
    pairs = []
    for pair in range(options.pairs):
        order = ("ours", "plain") if pair % 2 == 0 else ("plain", "ours")
        speeds = {kind: measure(kind, options.steps) for kind in order}
        pairs.append({**speeds, "ratio": speeds["ours"] / speeds["plain"]})
        row = pairs[-1]
        print(
            f"pair {pair + 1}: ours {row['ours']:,.0f} plain {row['plain']:,.0f} tok/s, ratio {row['ratio']:.3f}",
            file=sys.stderr,
        )
    median = statistics.median(pair["ratio"] for pair in pairs)
    if options.as_json:
        import torch
        import transformers

        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        print(
            json.dumps({"median_ratio": median, "pairs": pairs, "steps": options.steps, "versions": versions}, indent=2)
        )
    else:
        print(f"ours / plain, median of {len(pairs)} pairs: {median:.3f}")


if __name__ == "__main__":
    main()
