"""The measurements of `data.py`, each a process of its own: files to read, what is timed, and how it is run.

    python benchmarks/data_measurements.py NAME SIZES

prints one JSON document. SIZES is a `Work` as JSON. Imports stand inside the functions: a process that measures
memory has only its own.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

PROCESSES = 2
MB = 10**6
ROW_CHARACTERS = 3000
TOKENIZER_MB = 10
BLOCK_TOKENS, BATCH_SAMPLES, WARM_UP_BATCHES = 512, 8, 20
LOADER_REPEATS = 3
"""Loaders are timed for seconds only, so their pairs are this many times as many."""
GSM8K_ROWS, GSM8K_TOKENS, GSM8K_SIGMA = 7473, 170, 0.4
"""Rows, mean tokens and width of the log-normal distribution that stands for GSM8K's."""
STREAM_TOKENS = 16
LONG_AGO_S = 3600
"""Files are dated back by so much: an index of files changed in the last seconds is not kept."""
SAMPLING_S = 0.005


@dataclass(frozen=True)
class Work:
    """Sizes, and the folder with the files the measurements read."""

    folder: Path
    pairs: int
    mb: float
    vocab_size: int
    batches: int
    rows: str | None
    prompt_field: str
    completion_field: str
    text_mb: float
    stream_steps: int

    @property
    def tokenizer(self) -> str:
        """Folder of the trained tokenizer."""
        return str(self.folder / "tokenizer")


def corpus(megabytes: float) -> Iterator[str]:
    """Pieces of whole lines, about 3,000 characters each."""
    from truthgpt.data.python_stdlib import PythonStdlib

    left = megabytes * MB
    for repetition in count():
        for document in PythonStdlib().documents():
            text, start = document.text, 0
            while start < len(text) and left > 0:
                end = text.find("\n", start + ROW_CHARACTERS + 97 * repetition) + 1 or len(text)
                yield text[start:end]
                left -= len(text[start:end].encode())
                start = end
            if left <= 0:
                return


def write_lines(path: Path, lines: Iterator[str]) -> None:
    """A file that looks an hour old."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    then_s = time.time() - LONG_AGO_S
    os.utime(path, (then_s, then_s))


def write_corpus(work: Work) -> None:
    """`corpus.jsonl` and the tokenizer."""
    from truthgpt.models.tokenizer import train_bpe_tokenizer

    write_lines(work.folder / "corpus.jsonl", (json.dumps({"text": text}) + "\n" for text in corpus(work.mb)))
    train_bpe_tokenizer(corpus(min(work.mb, TOKENIZER_MB)), work.vocab_size).save_pretrained(work.tokenizer)


def write_pairs(path: Path) -> None:
    """Prompts and completions whose lengths are distributed like GSM8K's, a byte a token."""
    rng = random.Random(0)
    rows = []
    for _ in range(GSM8K_ROWS):
        length = max(4, round(GSM8K_TOKENS * rng.lognormvariate(-(GSM8K_SIGMA**2) / 2, GSM8K_SIGMA)))
        text = "".join(rng.choices("abcdefgh ", k=length))
        rows.append(json.dumps({"prompt": text[: length // 3], "completion": text[length // 3 :]}) + "\n")
    write_lines(path, iter(rows))


def build(overrides: Sequence[str]) -> Any:
    """Data, tokenizer and loader of a configuration in the training process."""
    import torch

    from truthgpt import load_config
    from truthgpt.build_data import build_eval_loader, build_tokenizer, build_train_loader, tokenize_text
    from truthgpt.build_sources import build_text_data
    from truthgpt.memory.base import MemoryPlan
    from truthgpt.runtime.fallbacks import Fallbacks

    config = load_config(None, ["data.num_workers=0", *overrides])
    data = build_text_data(config)
    tokenizer = build_tokenizer(config, data)
    training, device, fallbacks = config.training, torch.device("cpu"), Fallbacks(False)
    plan = MemoryPlan(training.train_batch_size, training.grad_accum_steps, False)
    packed = config.data.packing is True
    text = tokenize_text(data, tokenizer)
    loader = build_train_loader(config, text, plan, packed, device, fallbacks)
    build_eval_loader(config, data, tokenizer, packed, device, fallbacks)
    return loader


def tokenise_ours(work: Work) -> dict[str, float]:
    """Seconds for the index and for the tokens."""
    from truthgpt import load_config
    from truthgpt.build_sources import build_text_data
    from truthgpt.data.split import DocumentSet
    from truthgpt.data.token_store import default_cache_dir, tokenize_documents
    from truthgpt.data.tokenization import DocumentEncoder
    from truthgpt.models.tokenizer import load_tokenizer

    config = load_config(
        None, ["data.source=jsonl", f"data.path={work.folder / 'corpus.jsonl'}", "data.validation_fraction=0"]
    )
    tokenizer = load_tokenizer(work.tokenizer, trust_remote_code=False)
    started_s = time.perf_counter()
    documents = build_text_data(config).parts[0].train
    indexed_s = time.perf_counter()
    assert isinstance(documents, DocumentSet)
    encoder = DocumentEncoder(tokenizer, len(tokenizer))
    store = tokenize_documents(documents, encoder, default_cache_dir(), processes=PROCESSES)
    end_s = time.perf_counter()
    return {"before_s": indexed_s - started_s, "tokenise_s": end_s - indexed_s, "tokens": len(store) - len(documents)}


def tokenise_map(work: Work) -> dict[str, float]:
    """Seconds for the Arrow table and for the tokens."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(work.tokenizer)

    def tokenise(rows: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": tokenizer(rows["text"], return_attention_mask=False)["input_ids"]}

    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=work.folder) as cache:
        files = str(work.folder / "corpus.jsonl")
        table = datasets.load_dataset("json", data_files=files, split="train", cache_dir=cache)
        loaded_s = time.perf_counter()
        tokens = table.map(tokenise, batched=True, num_proc=PROCESSES, remove_columns=["text"])
        end_s = time.perf_counter()
        number = sum(len(ids) for batch in tokens.with_format("arrow").iter(1000) for ids in batch["input_ids"])
    return {"before_s": loaded_s - started_s, "tokenise_s": end_s - loaded_s, "tokens": number}


def load_samples(work: Work) -> dict[str, list[dict[str, float]]]:
    """Samples per second of both loaders in every pair, with 0 and 2 workers."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, Dataset

    from truthgpt import load_config
    from truthgpt.build_data import build_tokenizer, tokenize_text
    from truthgpt.build_sources import build_text_data
    from truthgpt.data.batch_order import ShuffledOrder
    from truthgpt.data.collate import LMCollator
    from truthgpt.data.loader import GlobalBatchLoader, WorkerSettings
    from truthgpt.data.samples import BlockDataset

    text = work.folder / "blocks.txt"
    write_lines(text, corpus(min(work.mb, TOKENIZER_MB)))
    config = load_config(
        None, ["data.source=text", f"data.path={text}", "data.validation_fraction=0", "model.tokenizer.type=byte"]
    )
    data = build_text_data(config)
    store = tokenize_text(data, build_tokenizer(config, data)).stores[0]
    blocks = BlockDataset(store, BLOCK_TOKENS)

    class PlainBlocks(Dataset[tuple[torch.Tensor, torch.Tensor]]):
        def __init__(self) -> None:
            self.tokens = np.memmap(store.folder / "tokens.bin", dtype=store.meta.dtype, mode="r")

        def __len__(self) -> int:
            return (len(self.tokens) - 1) // BLOCK_TOKENS

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            block = self.tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS + 1].astype(np.int64)
            return torch.from_numpy(block[:-1]), torch.from_numpy(block[1:])

    def ours(workers: int) -> Generator[Any, None, None]:
        order = ShuffledOrder(len(blocks), BATCH_SAMPLES, 1, seed=0)
        return GlobalBatchLoader(blocks, LMCollator(0), order, WorkerSettings(workers)).batches()

    def plain(workers: int) -> Generator[Any, None, None]:
        loader = DataLoader(PlainBlocks(), batch_size=BATCH_SAMPLES, shuffle=True, num_workers=workers)
        while True:
            yield from loader

    def samples_per_s(generator: Generator[Any, None, None]) -> float:
        with closing(generator) as batches:
            for _ in islice(batches, WARM_UP_BATCHES):
                pass
            started_s = time.perf_counter()
            for _ in islice(batches, work.batches):
                pass
            return work.batches * BATCH_SAMPLES / (time.perf_counter() - started_s)

    found = {}
    for workers in (0, PROCESSES):
        kinds = {"ours": partial(ours, workers), "other": partial(plain, workers)}
        pairs = []
        for pair in range(work.pairs * LOADER_REPEATS):
            order = ("ours", "other") if pair % 2 == 0 else ("other", "ours")
            pairs.append({kind: samples_per_s(kinds[kind]()) for kind in order})
        found[f"{workers} workers"] = pairs
    return found


def fill_batches(work: Work) -> dict[str, dict[str, float]]:
    """Useful share and number of shapes of every way of batching, by context length."""
    from truthgpt import load_config
    from truthgpt.inspect_data import inspect_text

    path = Path(work.rows) if work.rows else work.folder / "pairs.jsonl"
    if not work.rows:
        write_pairs(path)
    tokenizer = ["type=bpe", f"vocab_size={work.vocab_size}"] if work.rows else ["type=byte"]
    found = {}
    for length in (512, 1024):
        overrides = [
            *(f"model.tokenizer.{setting}" for setting in tokenizer),
            *("data.source=jsonl", f"data.path={path}", "data.format=prompt_completion"),
            *(f"data.prompt_field={work.prompt_field}", f"data.completion_field={work.completion_field}"),
            *("data.validation_fraction=0", f"data.max_seq_len={length}", f"model.config.n_positions={length}"),
            *("training.train_batch_size=8", "training.grad_accum_steps=1", f"output_dir={work.folder / 'run'}"),
        ]
        shares = inspect_text(load_config(None, overrides), first_samples=0)
        for way, filled in shares.ways.items():
            settings = {"bucketing": "data.bucket_by_length=true", "packing": "data.packing=true"}
            loader = build([*overrides, settings.get(way, "data.packing=false")])
            shapes = set()
            with closing(loader.batches()) as batches:
                for step in islice(batches, loader.steps_per_epoch):
                    for batch in step.micro_batches:
                        shapes.add(tuple((key, *tensor.shape) for key, tensor in batch.items()))
            found[f"{way}, T={length}"] = {
                "share": filled.useful_token_share,
                "shapes": len(shapes),
                "steps": filled.steps_per_epoch,
                "mean_tokens": shares.lengths.mean,
            }
    return found


@contextmanager
def watched_memory() -> Iterator[dict[str, float]]:
    """Time and memory of the body: peak above what there was, of all pages and of those that are not files."""
    found: dict[str, float] = {}
    before, own_peak, done = _status_mb(), [0.0], threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLING_S):
            own_peak[0] = max(own_peak[0], _status_mb()["RssAnon"])

    sampler = threading.Thread(target=sample)
    sampler.start()
    started_s = time.perf_counter()
    try:
        yield found
    finally:
        found["seconds"] = time.perf_counter() - started_s
        done.set()
        sampler.join()
        after = _status_mb()
    found["total_mb"] = after["VmHWM"] - before["VmRSS"]
    found["own_mb"] = max(own_peak[0], after["RssAnon"]) - before["RssAnon"]


def _status_mb() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {key: int(value.split()[0]) * 1024 / MB for key, value in (x.split(":") for x in lines) if " kB" in value}


def first_batch(work: Work, overrides: Sequence[str], state: Path | None = None) -> dict[str, Any]:
    """Time, memory and token ids of the first batch, of a new run or of one that goes on from `state`."""
    import transformers  # noqa: F401

    import truthgpt.build  # noqa: F401

    with watched_memory() as found:
        loader = build(overrides)
        step = 0
        if state is not None:
            saved = json.loads(state.read_text())
            step = saved["step"]
            loader.load_state_dict(saved)
        with closing(loader.batches(step)) as batches:
            batch = next(batches)
    return {**found, "ids": batch.micro_batches[0]["input_ids"][0, :STREAM_TOKENS].tolist()}


def start_up(work: Work) -> dict[str, Any]:
    """First batch of the large text."""
    text = f"data.path={work.folder / 'large.txt'}"
    return first_batch(work, ["data.source=text", text, f"model.tokenizer={{type: path, path: {work.tokenizer}}}"])


def stream_overrides(work: Work) -> list[str]:
    """Rows read while training, one a step."""
    return [
        *("data.source=jsonl", f"data.path={work.folder / 'stream.jsonl'}", "data.streaming=true"),
        *(f"data.max_seq_len={STREAM_TOKENS}", "data.packing=false", "model.tokenizer.type=byte"),
        *("training.train_batch_size=1", "training.grad_accum_steps=1", "training.max_steps=1000000"),
    ]


def reach_step(work: Work) -> dict[str, Any]:
    """Train on all the steps, save the position, and tell what comes next."""
    loader = build(stream_overrides(work))
    started_s = time.perf_counter()
    with closing(loader.batches()) as batches:
        for _ in islice(batches, work.stream_steps):
            pass
        (work.folder / "state.json").write_text(json.dumps(loader.state_dict(work.stream_steps)))
        seconds = time.perf_counter() - started_s
        return {"seconds": seconds, "ids": next(batches).micro_batches[0]["input_ids"][0].tolist()}


def stream_fresh(work: Work) -> dict[str, Any]:
    """First batch of a new stream."""
    return first_batch(work, stream_overrides(work))


def stream_resumed(work: Work) -> dict[str, Any]:
    """First batch of a stream that goes on."""
    return first_batch(work, stream_overrides(work), work.folder / "state.json")


MEASUREMENTS = {
    function.__name__: function
    for function in (
        *(tokenise_ours, tokenise_map, load_samples, fill_batches),
        *(start_up, reach_step, stream_fresh, stream_resumed),
    )
}


def measure(name: str, work: Work, cache: str) -> Any:
    """Run one of the MEASUREMENTS in a process of its own, with the cache `cache`."""
    sizes = json.dumps(asdict(work), default=str)
    environment = {**os.environ, "TRUTHGPT_CACHE_DIR": str(work.folder / cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, name, sizes]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    if finished.returncode:
        sys.exit(f"{name} failed:\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1])


if __name__ == "__main__":
    sizes = json.loads(sys.argv[2])
    print(json.dumps(MEASUREMENTS[sys.argv[1]](Work(**{**sizes, "folder": Path(sizes["folder"])}))))
