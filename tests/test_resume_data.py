"""Resume is exact for every source and every way of making batches, past the first pass, with and without workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sample_data import BASE, CHAT_TEMPLATE, write_every_source
from tests.test_resume import equal
from truthgpt.build import build_components
from truthgpt.build_trainer import build_trainer
from truthgpt.errors import DataError
from truthgpt.trainers.checkpoint import load_checkpoint
from truthgpt.trainers.trainer import GenericTrainer
from truthgpt.validate_config import load_config

STEPS, AT = 12, 5
SOURCES: dict[str, dict[str, Any]] = {
    "text": {"source": "text", "path": "corpus.txt"},
    "texts": {"source": "text", "path": "texts"},
    "jsonl": {"source": "jsonl", "path": "rows/*.jsonl"},
    "jsonl gz": {"source": "jsonl", "path": "rows.jsonl.gz"},
    "prompts": {"source": "jsonl", "path": "pairs.jsonl", "format": "prompt_completion", "train_on": "completion"},
    "chats": {
        **{"source": "jsonl", "path": "chats.jsonl", "format": "chat", "train_on": "assistant"},
        **{"chat_template": CHAT_TEMPLATE, "max_seq_len": 64},
    },
    "hf": {"source": "hf", "path": "rows-*.parquet"},
    "webdataset": {"source": "webdataset", "path": "shards/rows-{0..2}.tar"},
}
MIXTURE = [
    {"source": "jsonl", "path": "rows.jsonl", "weight": 3},
    {"source": "text", "path": "corpus.txt", "weight": 1},
]
BATCHES: dict[str, dict[str, Any]] = {
    "padded": {"packing": False},
    "packed": {"packing": True},
    "bucketed": {"bucket_by_length": True, "bucket_bins": [8, 24]},
    "budget": {"packing": False, "max_tokens": 200},
}
CASES: dict[str, dict[str, Any]] = {
    **{f"{name}, packed": {**source, **BATCHES["packed"]} for name, source in SOURCES.items()},
    **{f"jsonl, {name}": {**SOURCES["jsonl"], **batches} for name, batches in BATCHES.items()},
    "text, joined": SOURCES["text"],
    "mixed by documents": {"sources": MIXTURE},
    "mixed by tokens, padded": {"sources": MIXTURE, "mix_by": "tokens", "packing": False},
    "mixed, bucketed": {
        "sources": [{key: value for key, value in part.items() if key != "weight"} for part in MIXTURE],
        **BATCHES["bucketed"],
    },
}
STREAM = {"streaming": True, "shuffle_window": 50}
STREAMED = [name for name in CASES if name != "mixed by tokens, padded"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("data")
    write_every_source(folder)
    return folder


def trainer_of(folder: Path, data: dict[str, Any], output: str, **more: Any) -> GenericTrainer:
    steps = {"max_steps": STEPS, "train_batch_size": 8, "eval_interval": 100, "callbacks": []}
    values = {
        **BASE,
        "output_dir": str(folder / output),
        "training": {**BASE["training"], **steps},
        "checkpoint": {"interval_steps": AT, "keep_last": 100},
        "data": {"max_seq_len": 32, "num_workers": 0, "validation_fraction": 0.1, **data},
        **more,
    }
    config = load_config(values)
    return build_trainer(config, build_components(config))


def final(trainer: GenericTrainer) -> dict[str, Any]:
    path = trainer.parts.checkpoints.folder / f"step_{STEPS:08d}.pt"
    payload: dict[str, Any] = torch.load(path, weights_only=True)
    del payload["state"]["wall_time_s"]
    return payload


def assert_resumes_exactly(folder: Path, data: dict[str, Any], workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    name = f"{abs(hash(json.dumps([data, workers])))}"
    straight = trainer_of(folder, {**data, "num_workers": 0}, f"straight{name}")
    straight.train()
    checkpoint = straight.parts.checkpoints.folder / f"step_{AT:08d}.pt"
    resume = {"enabled": True, "checkpoint_dir": str(checkpoint)}
    resumed = trainer_of(folder, {**data, "num_workers": workers}, f"resumed{name}", resume=resume)
    assert resumed.state.step == AT
    resumed.train()
    equal(final(straight), final(resumed))


@pytest.mark.parametrize("name", CASES)
def test_resume_is_exact(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_resumes_exactly(folder, CASES[name], 0, monkeypatch)


@pytest.mark.parametrize("name", STREAMED)
def test_resume_of_a_stream_is_exact(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"sources": MIXTURE} if "sources" in CASES[name] else {}
    assert_resumes_exactly(folder, {**CASES[name], **STREAM, **weights}, 0, monkeypatch)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["hf, packed", "webdataset, packed", "jsonl, bucketed", "mixed by documents"])
def test_loader_processes_change_nothing(
    folder: Path, name: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_resumes_exactly(folder, {**CASES[name], **(STREAM if streaming else {})}, 2, monkeypatch)


def test_runs_go_past_the_first_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the equalities above would say less."""
    monkeypatch.chdir(folder)
    for streaming in (False, True):
        data = {**CASES["jsonl, padded"], "streaming": streaming}
        trainer = trainer_of(folder, data, f"passes{streaming}")
        trainer.train()
        assert trainer.state.epoch >= 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["jsonl", "jsonl gz", "text", "hf", "webdataset"])
def test_changed_data_is_refused_on_resume(
    tmp_path: Path, name: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One letter of one document."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    write_every_source(tmp_path)
    data = {**SOURCES[name], "streaming": streaming}
    straight = trainer_of(tmp_path, data, "straight")
    straight.train()
    checkpoint = straight.parts.checkpoints.folder / f"step_{AT:08d}.pt"
    _change_one_letter(tmp_path, name)
    with pytest.raises(DataError, match=r"is not what this run was trained on|data\.path"):
        trainer_of(tmp_path, data, "resumed", resume={"enabled": True, "checkpoint_dir": str(checkpoint)})


@pytest.mark.parametrize("streaming", [False, True])
def test_changed_validation_data_is_refused_on_resume(
    tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One letter again: values on other data would be compared with the best so far. Where it lies does not matter."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    write_every_source(tmp_path)
    held, training = tmp_path / "held.jsonl", {"source": "jsonl", "path": "rows/*.jsonl", "streaming": streaming}
    held.write_bytes((tmp_path / "rows.jsonl").read_bytes())
    straight = trainer_of(tmp_path, {**training, "validation_path": "held.jsonl"}, "straight")
    straight.train()
    step = str(straight.parts.checkpoints.folder / f"step_{AT:08d}.pt")
    resume = {"enabled": True, "checkpoint_dir": step}
    moved = trainer_of(tmp_path, {**training, "validation_path": "rows.jsonl"}, "moved", resume=resume)
    assert moved.state.step == AT
    held.write_text(held.read_text().replace("q", "Q", 1))
    with pytest.raises(DataError, match="the validation data is not what this run was evaluated on"):
        trainer_of(tmp_path, {**training, "validation_path": "held.jsonl"}, "resumed", resume=resume)


def test_validation_data_is_remembered_by_a_resume_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which keeps the best so far, by the metric of then."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    write_every_source(tmp_path)
    held, training = tmp_path / "held.jsonl", {"source": "jsonl", "path": "rows/*.jsonl", "validation_fraction": 0}
    held.write_bytes((tmp_path / "rows.jsonl").read_bytes())
    straight = trainer_of(tmp_path, {**training, "validation_path": "held.jsonl"}, "straight")
    straight.train()
    step = str(straight.parts.checkpoints.folder / "last.pt")
    without = trainer_of(tmp_path, training, "without", resume={"enabled": True, "checkpoint_dir": step})
    without.train()
    last = str(without.parts.checkpoints.folder / "last.pt")
    state = load_checkpoint(Path(last))["state"]
    assert state["best_by"] == "ppl" and state["best_metric"] is not None
    held.write_text(held.read_text().replace("q", "Q", 1))
    with pytest.raises(DataError, match="the validation data is not what this run was evaluated on"):
        data = {**training, "validation_path": "held.jsonl"}
        trainer_of(tmp_path, data, "again", resume={"enabled": True, "checkpoint_dir": last})


def _change_one_letter(folder: Path, name: str) -> None:
    if name in ("jsonl", "text"):
        path = folder / ("rows/1.jsonl" if name == "jsonl" else "corpus.txt")
        path.write_text(path.read_text().replace("q", "Q", 1))
        return
    rows = folder / "rows.jsonl"
    rows.write_text(rows.read_text().replace("q", "Q", 1))
    source = folder / "copy"
    source.mkdir()
    _rewrite(folder, rows)


def _rewrite(folder: Path, rows: Path) -> None:
    """The compressed, parquet and tar files again, from changed rows."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq
    import webdataset

    values = [json.loads(line) for line in rows.read_text().splitlines()]
    with gzip.open(folder / "rows.jsonl.gz", "wt") as compressed:
        compressed.writelines(json.dumps(row) + "\n" for row in values)
    for number in range(3):
        part = values[number::3]
        pq.write_table(pa.table({"text": [row["text"] for row in part]}), folder / f"rows-{number}.parquet")
        with webdataset.TarWriter(str(folder / f"shards/rows-{number}.tar")) as shard:
            for index, row in enumerate(part):
                shard.write({"__key__": f"{index:04}", "json": row})


def test_images_resume_exactly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random crops and flips are keyed by epoch and image."""
    vit = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {
        "model": {
            "task": "image_classification",
            "init": "scratch",
            "config": {**vit, "intermediate_size": 32, "image_size": 8, "patch_size": 4},
        },
        "eval": {"metrics": ["accuracy"], "select_best_by": "accuracy"},
    }
    monkeypatch.chdir(folder)
    collate = {"type": "cv", "random_resized_crop": True, "horizontal_flip": True}
    data = {"source": "image_folder", "path": "images", "collate": collate}
    straight = trainer_of(folder, data, "image_straight", **more)
    straight.train()
    checkpoint = straight.parts.checkpoints.folder / f"step_{AT:08d}.pt"
    resume = {"enabled": True, "checkpoint_dir": str(checkpoint)}
    resumed = trainer_of(folder, {**data, "num_workers": 2}, "image_resumed", resume=resume, **more)
    resumed.train()
    assert straight.state.epoch >= 1
    equal(final(straight), final(resumed))
