"""Contender: transformers' Trainer, as it comes or with what the variant switches on.

    python benchmarks/gpu/hf_trainer.py --workload w1 --variant compile+rows=64

A variant is `default` or options joined by `+`:

    compile    torch_compile=True
    regional   torch_compile=True, layer by layer (ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=1)
    liger      use_liger_kernel=True
    bf16w      weights in bf16, not float32 under autocast
    fused      optim="adamw_torch_fused" (the default since transformers 5)
    gc, nogc   gradient checkpointing on or off; it is off by default, and on for adapters, as their recipes have it
    grouped    train_sampling_strategy="group_by_length"
    rows=N     rows a micro-batch

Ours are the model, its initial weights, the samples and their order, and the learning rate of every step. The rest is
the Trainer's: float32 weights under bf16 autocast, attention `sdpa`, its own AdamW, no loader processes.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from contender import Arguments, parse_arguments, print_record, print_skipped

if TYPE_CHECKING:
    from peer import Peer, PeerCollator, StepClock

SWITCHES = ("compile", "regional", "liger", "bf16w", "fused", "gc", "nogc", "grouped")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the record."""
    run("hf_trainer", parse_arguments(argv, __doc__), ("accelerate",), _make_trainer)


def run(
    contender: str,
    arguments: Arguments,
    needs: Sequence[str],
    make_trainer: Callable[[Peer, Mapping[str, Any], PeerCollator], Any],
) -> None:
    """Build a Trainer, let it train, print the record.

    Args:
        needs: packages without which there is nothing to measure.
        make_trainer: peer, arguments of the Trainer and collator to the Trainer.
    """
    options = parse_variant(arguments.variant)
    packages = [
        *needs,
        *(["liger_kernel"] if "liger" in options else []),
        *(["peft"] if arguments.workload.lora else []),
    ]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print_skipped(contender, arguments, f"{', '.join(missing)} is not installed")
        return
    if "regional" in options:  # accelerate reads it when it is imported
        os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = "1"

    from peer import PeerCollator, StepClock, build_peer, measure, record_facts

    rows = int(options["rows"]) if "rows" in options else None
    peer = build_peer(arguments, rows, bf16_weights="bf16w" in options)
    collator = PeerCollator(int(peer.tokenizer.pad_token_id), masked=peer.documents.are_rows)
    clock = StepClock(peer.steps, peer.device)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        trainer = make_trainer(peer, trainer_arguments(peer, options, folder), collator)
        _attach(trainer, clock)
        built_s = time.perf_counter()
        trainer.train()
    compiled = bool({"compile", "regional"} & set(options))
    result = measure(peer, collator, clock, built_s, compiled)
    print_record(contender, arguments, result, **record_facts(peer, same_order="grouped" not in options))


def parse_variant(variant: str) -> dict[str, str]:
    """Options by name, with their value where they have one; exits when one is unknown."""
    parts = [] if variant == "default" else variant.split("+")
    options = {name: value for name, _, value in (part.partition("=") for part in parts)}
    unknown = [part for part in parts if part not in SWITCHES and not part.startswith("rows=")]
    if unknown:
        raise SystemExit(f"unknown option {unknown[0]!r}; there are {', '.join(SWITCHES)} and rows=N")
    return options


def trainer_arguments(peer: Peer, options: Mapping[str, str], folder: str) -> dict[str, Any]:
    """Arguments of TrainingArguments: what the workload and the options say, nothing evaluated or saved."""
    from peer import window_steps

    training = peer.config.training
    beta1, beta2 = peer.config.optimizer.options.get("betas", (0.9, 0.999))
    checkpointing = {}
    if peer.lora or {"gc", "nogc"} & set(options):
        checkpointing = {"gradient_checkpointing": "nogc" not in options}
    grouping = "group_by_length" if "grouped" in options else "sequential"
    return {
        "output_dir": folder,
        "max_steps": training.max_steps,  # the schedule's; the clock stops the training
        "per_device_train_batch_size": peer.rows,
        "gradient_accumulation_steps": peer.accumulation,
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm or 0.0,
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "seed": peer.config.seed,
        "bf16": peer.precision == "bf16",
        "use_cpu": peer.device.type == "cpu",
        "train_sampling_strategy": grouping,
        "torch_compile": bool({"compile", "regional"} & set(options)),
        "use_liger_kernel": "liger" in options,
        "logging_first_step": True,
        "logging_steps": window_steps(peer.steps),
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        **({"optim": "adamw_torch_fused"} if "fused" in options else {}),
        **checkpointing,
    }


def _make_trainer(peer: Peer, arguments: Mapping[str, Any], collator: PeerCollator) -> Any:
    from transformers import Trainer, TrainingArguments

    return scheduled(Trainer, peer)(
        model=peer.model, args=TrainingArguments(**arguments), train_dataset=peer.samples, data_collator=collator
    )


def scheduled(trainer_class: type[Any], peer: Peer) -> type[Any]:
    """The class with our learning rate at every step; theirs starts from 0, which would make other losses."""
    from torch.optim.lr_scheduler import LambdaLR

    class Scheduled(trainer_class):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, peer.schedule)
            return self.lr_scheduler

    return Scheduled


def _attach(trainer: Any, clock: StepClock) -> None:
    """Let `clock` see the steps, and nobody print on stdout."""
    from transformers import PrinterCallback, TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            clock.step_ended(state.global_step)
            if state.global_step == clock.steps:
                control.should_log = control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **more: Any) -> None:
            if "loss" in logs:
                clock.losses[state.global_step] = logs["loss"]

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Clock())


if __name__ == "__main__":
    main()
