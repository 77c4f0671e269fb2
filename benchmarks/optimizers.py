"""Every registered optimizer on one small task: what it learns, what it keeps, and what its step costs.

    python benchmarks/optimizers.py [CONFIG] [key=value ...] [--steps 300] [--seeds 2] [--only NAME ...] [--json]

The task is the default run, shortened and with a fiftieth held out, on whatever device it takes. Each optimizer trains
once at every learning rate of its small sweep, with one seed, and at the best of them with further seeds. Loss: of the
validation split after the last step, of the weights that a run would export (EMA's, or the optimizer's own average).
State: bytes of the optimizer's tensors a trained parameter, EMA not counted. Times: medians over the steps at the best
rate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from truthgpt import CALLBACKS, OPTIMIZERS, build_components, build_trainer, load_config
from truthgpt.cli.output import split_arguments

WARM_UP_STEPS = 10
"""Left out of the times: the first ones compile, allocate and fill caches."""


@dataclass(frozen=True)
class Contender:
    """Learning rates to try, and what else the optimizer needs of a configuration."""

    rates: tuple[float, ...]
    overrides: tuple[str, ...] = ()


CONTENDERS = {
    "adamw": Contender((1e-3, 2e-3, 4e-3), ("optimizer={type: adamw, betas: [0.9, 0.95]}",)),
    "adamw8bit": Contender((1e-3, 2e-3, 4e-3), ("optimizer={type: adamw8bit, betas: [0.9, 0.95]}",)),
    "muon": Contender((8e-3, 1.6e-2, 3.2e-2), ("optimizer={type: muon, betas: [0.9, 0.95]}",)),
    "lion": Contender((1.6e-3, 3.2e-3, 6.4e-3), ("optimizer={type: lion}", "training.weight_decay=1.0")),
    "adafactor": Contender((4e-2, 8e-2, 1.6e-1), ("optimizer={type: adafactor}",)),
    "schedule_free": Contender(
        (2e-3, 4e-3, 8e-3),
        (
            "optimizer={type: schedule_free, betas: [0.9, 0.95]}",
            "training.scheduler={type: constant}",
            "ema.enabled=false",
        ),
    ),
}


@dataclass(frozen=True)
class Run:
    """What one training gave."""

    val_loss: float
    state_bytes: float
    optimizer_ms: float
    step_ms: float


class Clock:
    """A callback that notes when each step was done, and how long the optimizer took for it."""

    def __init__(self) -> None:
        self.steps_s: list[float] = []
        self.optimizer_s: list[float] = []
        self.val_loss = float("nan")

    def on_step(self, state: Any, info: Mapping[str, Any]) -> None:
        """Called after every optimizer step."""
        self.steps_s.append(time.perf_counter())

    def on_eval(self, state: Any, info: Mapping[str, Any]) -> None:
        """Called after an evaluation."""
        self.val_loss = info["val_loss"]

    def timed(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """`step`, its time noted; on a GPU with what it left to do there."""

        def timed_step() -> Any:
            synchronize()
            start_s = time.perf_counter()
            result = step()
            synchronize()
            self.optimizer_s.append(time.perf_counter() - start_s)
            return result

        return timed_step


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tensor_bytes(values: Any) -> int:
    """Of all tensors in a nested state."""
    if isinstance(values, torch.Tensor):
        return values.numel() * values.element_size()
    return sum(map(tensor_bytes, values.values())) if isinstance(values, dict) else 0


def train(source: str | None, contender: Contender, rate: float, seed: int, steps: int, overrides: list[str]) -> Run:
    """One training with nothing written that outlives it."""
    clock = Clock()
    CALLBACKS.register("step_clock")(lambda: clock)
    shape = [
        f"training.learning_rate={rate}",
        f"seed={seed}",
        f"training.max_steps={steps}",
        f"training.eval_interval={steps}",
        f"checkpoint.interval_steps={steps}",
        "data.validation_fraction=0.02",
        "training.callbacks=[step_clock]",
        "generate.prompts=[]",
        "strict=true",
    ]
    try:
        with tempfile.TemporaryDirectory() as folder:
            own = [*shape, *contender.overrides, f"output_dir={json.dumps(folder + '/run')}"]
            config = load_config(source, [*own, *overrides])
            trainer = build_trainer(config, build_components(config))
            optimizer = trainer.parts.engine.optimizer
            optimizer.step = clock.timed(optimizer.step)  # type: ignore[method-assign]
            trainer.train()
    finally:
        CALLBACKS.unregister("step_clock")
    trained = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    gaps = [after - before for before, after in itertools.pairwise(clock.steps_s)]
    return Run(
        clock.val_loss,
        tensor_bytes(optimizer.state_dict()["state"]) / trained,
        1e3 * statistics.median(clock.optimizer_s[WARM_UP_STEPS:]),
        1e3 * statistics.median(gaps[WARM_UP_STEPS:]),
    )


def measure(name: str, source: str | None, options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """The sweep of one optimizer, then its best rate with the other seeds."""
    contender, seed = CONTENDERS[name], 42
    sweep = {rate: train(source, contender, rate, seed, options.steps, overrides) for rate in contender.rates}
    best = min(sweep, key=lambda rate: sweep[rate].val_loss)
    others = [
        train(source, contender, best, seed + index, options.steps, overrides) for index in range(1, options.seeds)
    ]
    losses = [run.val_loss for run in (sweep[best], *others)]
    return {
        "optimizer": name,
        "learning_rate": best,
        "val_loss": statistics.fmean(losses),
        "val_losses": losses,
        "sweep": {str(rate): run.val_loss for rate, run in sweep.items()},
        "state_bytes_per_parameter": round(sweep[best].state_bytes, 2),
        "optimizer_ms": round(sweep[best].optimizer_ms, 2),
        "step_ms": round(sweep[best].step_ms, 1),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="[CONFIG] [key=value ...]")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args(arguments)
    source, overrides = split_arguments(options.arguments)
    rows = []
    for name in options.only:
        availability = OPTIMIZERS.entry(name).probe()
        if not availability.available:
            print(f"{name}: left out: {availability.reason}", file=sys.stderr)
            continue
        rows.append(measure(name, source, options, overrides))
        row = rows[-1]
        print(f"{name}: {row['val_loss']:.4f} at {row['learning_rate']:g}; {row['sweep']}", file=sys.stderr)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    if options.as_json:
        print(json.dumps({"steps": options.steps, "versions": versions, "rows": rows}, indent=2))
        return
    print("| optimizer | learning rate | validation loss (lowest, highest) | state, bytes a parameter | its step, ms |")
    print("|---|---|---|---|---|")
    for row in rows:
        losses = row["val_losses"]
        spread = f"{row['val_loss']:.3f} ({min(losses):.3f}, {max(losses):.3f})"
        times = f"{row['optimizer_ms']:.1f} of {row['step_ms']:.0f}"
        print(
            f"| `{row['optimizer']}` | {row['learning_rate']:g} | {spread} | "
            f"{row['state_bytes_per_parameter']} | {times} |"
        )


if __name__ == "__main__":
    main()
