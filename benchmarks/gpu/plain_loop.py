"""Contender: a plain PyTorch loop over the same transformers model, as nanoGPT writes one.

    python benchmarks/gpu/plain_loop.py --workload w1 --variant default

The whole model compiled with its loss, fused AdamW, bf16 autocast over float32 weights, clipping, pinned batches. The
variant is `default`, or `eager` without compiling, with `rows=N` if wanted: `eager+rows=64`.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from contender import parse_arguments, print_record, print_skipped

if TYPE_CHECKING:
    from peer import Peer, PeerCollator, StepClock


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the record."""
    arguments = parse_arguments(argv, __doc__)
    parts = set(arguments.variant.split("+")) - {"default"}
    rows = [int(part.removeprefix("rows=")) for part in parts if part.startswith("rows=")]
    unknown = [part for part in parts if part != "eager" and not part.startswith("rows=")]
    if unknown:
        raise SystemExit(f"unknown option {unknown[0]!r}; there are eager and rows=N")
    if arguments.workload.lora and importlib.util.find_spec("peft") is None:
        print_skipped("plain_loop", arguments, "peft is not installed")
        return

    from peer import PeerCollator, StepClock, build_peer, measure, record_facts

    peer = build_peer(arguments, rows[0] if rows else None, bf16_weights=False)
    collator = PeerCollator(int(peer.tokenizer.pad_token_id), masked=False)
    clock = StepClock(peer.steps, peer.device)
    built_s = time.perf_counter()
    train(peer, collator, clock, compiled="eager" not in parts)
    result = measure(peer, collator, clock, built_s, compiled="eager" not in parts)
    print_record("plain_loop", arguments, result, **record_facts(peer, same_order=True))


def train(peer: Peer, collator: PeerCollator, clock: StepClock, compiled: bool) -> None:
    """All steps. Rows are padded on the right, where a causal model never looks, so no mask is needed."""
    import torch

    training, on_gpu = peer.config.training, peer.device.type == "cuda"
    trained = [parameter for parameter in peer.model.parameters() if parameter.requires_grad]
    model = torch.compile(peer.model.train()) if compiled else peer.model.train()
    betas = tuple(peer.config.optimizer.options.get("betas", (0.9, 0.999)))
    rate, decay = training.learning_rate, training.weight_decay
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=betas, weight_decay=decay, fused=True)
    autocast = torch.autocast(peer.device.type, torch.bfloat16) if peer.precision == "bf16" else nullcontext()
    loss_sum, first_step = torch.zeros((), device=peer.device), 1
    micro_batches = iter(range(0, len(peer.samples), peer.rows))
    clock.start()
    for step in range(1, peer.steps + 1):
        optimizer.param_groups[0]["lr"] = rate * peer.schedule(step - 1)
        for _ in range(peer.accumulation):
            start = next(micro_batches)
            batch = collator(peer.samples[start : start + peer.rows])
            if on_gpu:
                batch = {name: each.pin_memory().to(peer.device, non_blocking=True) for name, each in batch.items()}
            with autocast:
                loss = model(**batch, use_cache=False).loss / peer.accumulation
            loss.backward()
            loss_sum += loss.detach()
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.step_ended(step)
        if clock.ends_window(step):
            clock.losses[step] = float(loss_sum) / (step - first_step + 1)
            loss_sum.zero_()
            first_step = step + 1


if __name__ == "__main__":
    main()
