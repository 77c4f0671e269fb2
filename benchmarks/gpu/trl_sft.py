"""Contender: TRL's SFTTrainer, as it comes or with the options of `hf_trainer.py`.

    python benchmarks/gpu/trl_sft.py --workload w4 --variant default --data gsm8k_train.jsonl

Its default has gradient checkpointing on and packing off. It is skipped where trl is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from contender import parse_arguments
from hf_trainer import run, scheduled

if TYPE_CHECKING:
    from peer import Peer, PeerCollator


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the record."""
    run("trl_sft", parse_arguments(argv, __doc__), ("accelerate", "datasets", "trl"), _make_trainer)


def _make_trainer(peer: Peer, arguments: Mapping[str, Any], collator: PeerCollator) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    collator.masked = True  # it counts tokens by the mask
    return scheduled(SFTTrainer, peer)(
        model=peer.model,
        args=SFTConfig(**arguments, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_list([dict(sample) for sample in peer.samples]).with_format("numpy"),
        data_collator=collator,
        processing_class=peer.tokenizer,
    )


if __name__ == "__main__":
    main()
