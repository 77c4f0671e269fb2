"""Small data files and the configuration that the end-to-end tests start from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

BASE: dict[str, Any] = {
    "seed": 7,
    "output_dir": "runs/t",
    "model": {
        "init": "scratch",
        "tokenizer": {"type": "byte"},
        "config": {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64},
    },
    "training": {
        "max_steps": 40,
        "train_batch_size": 4,
        "grad_accum_steps": 2,
        "learning_rate": 1.0e-3,
        "mixed_precision": "none",
        "log_interval": 1,
        "eval_interval": 20,
        "early_stopping_patience": None,
        "callbacks": ["print"],
    },
    "data": {"source": "text", "path": "corpus.txt", "max_seq_len": 32, "num_workers": 0},
    "checkpoint": {"interval_steps": 5, "keep_last": 3},
    "ema": {"enabled": True, "decay": 0.99},
    "hardware": {"device": "cpu"},
}

WORDS = ("the", "a", "cat", "dog", "king", "queen", "ran", "saw", "and", "or", "under", "happy", "slowly", "of", "to")


def sentence(rng: random.Random, words: int) -> str:
    """Words in random order, a full stop at the end."""
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "."


def write_sources(folder: Path) -> None:
    """`corpus.txt`, `rows.jsonl`, `pairs.jsonl` and `base.yaml`, the same at every call."""
    rng = random.Random(0)
    (folder / "corpus.txt").write_text("\n".join(sentence(rng, rng.randint(3, 12)) for _ in range(400)) + "\n")
    rows = [{"text": sentence(rng, rng.randint(1, 12))} for _ in range(120)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [
        {"prompt": f"{sentence(rng, 2)} ->", "completion": f" {sentence(rng, rng.randint(1, 6))}"} for _ in range(120)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    write_config(folder / "base.yaml", BASE)


def write_config(path: Path, values: dict[str, Any]) -> None:
    """A YAML file."""
    path.write_text(yaml.safe_dump(values))
