"""What is measured: the workloads, our settings for each, and the peer's best that the sweep found.

A workload is a YAML file beside this one, which names model, data and batch and leaves everything else to the
product's defaults. Peers read the same file: model, hyperparameters and data are its.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TUNED = (
    *("ema.enabled=false", "training.torch_compile=true"),
    *("training.weights=bf16_master", "training.compile_mode=reduce-overhead"),
)
"""Our settings where the peer is tuned too; peers keep no average of the weights."""


@dataclass(frozen=True)
class Workload:
    """One workload.

    Attributes:
        steps: optimizer steps to measure, for tens of seconds on one H200.
        hf_best: fastest variant of `hf_trainer.py` with float32 weights that `sweep.py` found.
        sweep: variants that `sweep.py` tries.
        tuned: overrides of our variant `tuned`; `default` has none.
        peer_rows: rows a micro-batch of a peer; None: as the YAML says.
        needs_data: the documents are a file, given with `--data`.
        lora: peers train adapters, as ours does by its YAML.
    """

    name: str
    title: str
    steps: int
    hf_best: str
    sweep: tuple[str, ...]
    tuned: tuple[str, ...] = TUNED
    peer_rows: int | None = None
    needs_data: bool = False
    lora: bool = False

    @property
    def yaml(self) -> Path:
        """Its configuration."""
        return Path(__file__).parent / f"{self.name}.yaml"

    def ours(self, variant: str) -> tuple[str, ...]:
        """Overrides of our variant `default` or `tuned`."""
        return {"default": (), "tuned": self.tuned}[variant]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "w1",
            "GPT-2 124M, T=1024",
            steps=80,
            hf_best="compile",
            sweep=(
                *("default", "compile", "regional", "bf16w", "compile+bf16w", "regional+bf16w"),
                *("compile+rows=64", "regional+rows=64"),
            ),
        ),
        Workload(
            "w2",
            "Llama 1B shape, T=4096",
            steps=48,
            hf_best="liger+rows=8",
            sweep=(
                *("default", "regional", "liger", "bf16w", "regional+bf16w", "liger+bf16w", "liger+regional"),
                *("liger+rows=8", "liger+bf16w+rows=8", "regional+bf16w+rows=8"),
            ),
            tuned=(*TUNED, "training.train_batch_size=8"),
        ),
        Workload(
            "w3",
            "Llama 8B shape, LoRA r=16, T=4096",
            steps=32,
            hf_best="regional+nogc",
            sweep=("default", "nogc", "liger", "liger+nogc", "regional+nogc", "liger+nogc+rows=4"),
            lora=True,
        ),
        Workload(
            "w4",
            "GSM8K documents, Llama 1B shape",
            steps=64,
            hf_best="liger+grouped+rows=128",
            sweep=(
                *("default", "liger", "liger+grouped", "liger+rows=128", "liger+grouped+rows=128"),
                *("liger+grouped+bf16w+rows=128", "regional+grouped+rows=128"),
            ),
            tuned=(*TUNED, "data.max_seq_len=32768"),
            peer_rows=32,
            needs_data=True,
        ),
        Workload("cpu", "Default run, no GPU", steps=120, hf_best="default", sweep=("default", "compile", "regional")),
    )
}
