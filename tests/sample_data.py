"""Small data files and the configuration that the end-to-end tests start from."""

from __future__ import annotations

import gzip
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


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A chat template without generation marks."""


def write_every_source(folder: Path) -> None:
    """Beside those of `write_sources`: chats, compressed and several JSON Lines files, parquet, tar shards, images."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import webdataset
    from PIL import Image

    write_sources(folder)
    rng = random.Random(1)
    chats = [
        {
            "messages": [
                {"role": role, "content": sentence(rng, rng.randint(1, 3))} for role in ("user", "assistant") * 2
            ]
        }
        for _ in range(120)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    with gzip.open(folder / "rows.jsonl.gz", "wt") as compressed:
        compressed.writelines(json.dumps(row) + "\n" for row in rows)
    for name in ("rows", "shards", "texts", "images"):
        (folder / name).mkdir(exist_ok=True)
    for number in range(3):
        part = rows[number::3]
        (folder / f"rows/{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        (folder / f"texts/{number}.txt").write_text("\n".join(row["text"] for row in part))
        pq.write_table(pa.table({"text": [row["text"] for row in part]}), folder / f"rows-{number}.parquet")
        with webdataset.TarWriter(str(folder / f"shards/rows-{number}.tar")) as shard:
            for index, row in enumerate(part):
                shard.write({"__key__": f"{index:04}", "json": row})
    for index in range(40):
        label = "dark" if index % 2 else "light"
        (folder / "images" / label).mkdir(exist_ok=True)
        shade = rng.randint(0, 90) + (0 if index % 2 else 140)
        Image.new("RGB", (12 + index % 5, 12), (shade, shade, rng.randint(0, 255))).save(
            folder / f"images/{label}/{index}.png"
        )


def write_hub_datasets(folder: Path, lines: list[str]) -> None:
    """`hub` and `hub2`, datasets as the hub stores them, with splits and configurations; `images.parquet`."""
    import datasets

    for name, rows in (("hub", lines), ("hub2", lines[10:])):
        (folder / name).mkdir()
        for part, chosen in (("a", rows[:80]), ("b", rows[80:])):
            (folder / name / f"{part}.jsonl").write_text("\n".join(chosen))
        files = "data_files: [{split: train, path: %s.jsonl}, {split: test, path: %s.jsonl}]"
        configurations = [("default", "a", "b"), ("small", "b", "a")]
        listed = "".join(f"- config_name: {c}\n  {files % parts}\n" for c, *p in configurations for parts in [tuple(p)])
        (folder / name / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    pictures = sorted((folder / "images").rglob("*.png"))
    contents = [picture.read_bytes() for picture in pictures]
    columns = {
        "image": [{"bytes": data, "path": None} for data in contents],
        "other": [{"bytes": data, "path": None} for data in reversed(contents)],
        "label": [picture.parent.name for picture in pictures],
        "shade": [f"shade {picture.parent.name}" for picture in pictures],
    }
    table = datasets.Dataset.from_dict(columns)
    for field in ("image", "other"):
        table = table.cast_column(field, datasets.Image(decode=False))
    table.to_parquet(folder / "images.parquet")


def write_config(path: Path, values: dict[str, Any]) -> None:
    """A YAML file."""
    path.write_text(yaml.safe_dump(values))
