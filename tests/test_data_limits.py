"""Data at its limits as commands: cut archives, huge and tiny documents, ids and labels a model has not, no network."""

from __future__ import annotations

import gzip
import io
import json
import random
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.process import Cli
from tests.sample_data import BASE, write_config
from tests.test_bad_data import (
    GOOD,
    LONG,
    READERS,
    both_ways,
    files_of,
    parquet,
    refused_unstarted,
    tar,
    tar_of_lines,
    write,
)
from tests.test_bad_input import digests, refused
from truthgpt.data.token_store import TokenStore

ROWS = b"".join(json.dumps({"text": f"{number * 7919 % 10007} {LONG}"}).encode() + b"\n" for number in range(4000))
LETTERS = [bytes([code]) for code in range(97, 123)]
CSV = b"text\n" + b"".join(b"".join(random.Random(n).choices(LETTERS, k=200)) + b"\n" for n in range(1500))


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


compress_zstd = zstandard.ZstdCompressor().compress
ARCHIVES: dict[str, tuple[str, str, bytes, str]] = {
    "gz": ("jsonl", "a.jsonl.gz", half(gzip.compress(ROWS)), "a.jsonl.gz: the archive ends early"),
    "zst": ("jsonl", "a.jsonl.zst", half(compress_zstd(ROWS)), "a.jsonl.zst: the archive ends early"),
    "tar": ("webdataset", "a.tar", tar_of_lines(GOOD * 20)[:4000], "a.tar: the archive ends early, at byte 4000"),
    "tar.gz": (
        "webdataset",
        "a.tar.gz",
        half(gzip.compress(tar_of_lines(ROWS))),
        "a.tar.gz: the gzip stream",
    ),
}
HF_ARCHIVES: dict[str, tuple[str, bytes]] = {
    "jsonl.gz": ("a.jsonl.gz", half(gzip.compress(GOOD * 2000))),
    "csv.gz": ("a.csv.gz", half(gzip.compress(CSV))),
    "csv.zst": ("a.csv.zst", half(compress_zstd(CSV))),
}


@both_ways
@pytest.mark.parametrize("archive", ARCHIVES)
def test_truncated_archive(cli: Cli, archive: str, streaming: bool) -> None:
    """Whatever `on_bad_row` says."""
    source, file, content, phrase = ARCHIVES[archive]
    write(cli, {file: content}, on_bad_row="skip")
    refused_unstarted(cli, streaming, (f"data.source={source}", f"data.path={file}"), phrase, "again")


@both_ways
@pytest.mark.parametrize("archive", HF_ARCHIVES)
@pytest.mark.parametrize("setting", ["path=rows", "dataset=rows"])
def test_truncated_archive_that_the_datasets_library_reads(
    cli: Cli, archive: str, setting: str, streaming: bool
) -> None:
    """A cut `.zst` file it takes for a shorter one."""
    file, content = HF_ARCHIVES[archive]
    write(cli, {f"rows/{file}": content}, validation_fraction=0, streaming=streaming, on_bad_row="skip")
    phrase = f"error: rows/{file}: the archive ends early"
    refused(cli("inspect", "base.yaml", "data.source=hf", f"data.{setting}"), 3, phrase, "again")


def assert_bounded(cli: Cli, source: str, mib: int, fixed_mib: int) -> None:
    sentence = "the quick brown fox jumps over the lazy dog, "  # no line end: the hardest to cut
    text = (sentence * (mib * 2**20 // len(sentence) + 1))[: mib * 2**20]
    row = json.dumps({"text": text}).encode()
    file, content = {
        "text": ("one.txt", text.encode()),
        "jsonl": ("one.jsonl", row),
        "webdataset": ("one.tar", tar(("0.json", row))),
        "hf": ("one.json", row),
    }[source]
    write(cli, {file: content}, source=source, path=file, validation_fraction=0)
    finished = cli("inspect", "base.yaml", "--samples", "0", env={"TRUTHGPT_CACHE_DIR": "cache"})
    assert finished.exit_code == 0, finished.stderr
    (store,) = map(TokenStore, (cli.folder / "cache/tokens").iterdir())
    assert bytes(store.tokens[:-1].astype(np.uint8)) == text.encode() and len(store) == len(text) + 1
    grown = finished.grown_bytes
    assert 0 < grown < (4 * mib + fixed_mib) * 2**20, f"{grown / 2**20:.0f} MiB for a document of {mib}"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the peak memory that Linux tells")
@pytest.mark.parametrize("source", ["text", "jsonl", "webdataset", "hf"])
def test_one_large_document_takes_bounded_memory(cli: Cli, source: str) -> None:
    """Tokens of a whole document at once would take 150 bytes each; so short a text is tokenised in this process."""
    assert_bounded(cli, source, mib=3, fixed_mib=100)


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the peak memory that Linux tells")
@pytest.mark.parametrize("source", ["text", "jsonl", "webdataset", "hf"])
def test_one_huge_document_takes_less_than_four_times_its_size(cli: Cli, source: str) -> None:
    assert_bounded(cli, source, mib=64, fixed_mib=0)


def inspection_s(cli: Cli, name: str, rows: int) -> float:
    letters = [chr(ord("a") + number % 26) for number in range(rows)]
    lines = "".join(f'{{"text": "{letter}"}}\n' for letter in letters).encode()
    files = {"rows.parquet": parquet(text=letters)} if name == "parquet" else files_of(name, lines)[0]
    source = "hf" if name == "parquet" else READERS[name].source
    write(cli, files, validation_fraction=0)
    start = time.perf_counter()
    finished = cli("inspect", "base.yaml", f"data.source={source}", f"data.path={next(iter(files))}", "--json")
    elapsed_s = time.perf_counter() - start
    assert finished.exit_code == 0, finished.stderr
    assert (finished.json["documents"], finished.json["tokens"]) == (rows, 2 * rows)
    return elapsed_s


@pytest.mark.parametrize("name", ["jsonl", "parquet"])
def test_ten_times_the_rows_take_no_hundred_times_as_long(cli: Cli, name: str) -> None:
    """Reading, tokenising, packing and bucketing rows of one byte."""
    inspection_s(cli, name, 10)
    assert inspection_s(cli, name, 50_000) < 20 * inspection_s(cli, name, 5_000)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["jsonl", "parquet"])
def test_a_million_rows_of_one_byte(cli: Cli, name: str) -> None:
    assert inspection_s(cli, name, 1_000_000) < 20 * inspection_s(cli, name, 100_000)


def save_tokenizer(folder: Path, words: dict[str, int], **special: str) -> None:
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", **special).save_pretrained(folder)


WORDS = {"?": 0, "hello": 1, "there": 2, "end": 3}
FROM_FOLDER = ("model.tokenizer={type: path, path: words}",)


@both_ways
def test_token_id_the_model_has_not(cli: Cli, streaming: bool) -> None:
    """A vocabulary with a hole: five tokens, the last one with the id 999."""
    files, arguments = files_of("jsonl", GOOD + b'{"text": "hello far"}\n')
    write(cli, files, validation_fraction=0)
    save_tokenizer(cli.folder / "words", {**WORDS, "far": 999}, eos_token="end")
    stream = ("data.streaming=true",) if streaming else ()
    finished = cli("train", "base.yaml", *arguments, *FROM_FOLDER, *stream)
    refused(finished, 3, "rows.jsonl:2: the tokenizer gives token id 999 ('far'), the model has ids 0 to", "vocab_size")
    assert not (cli.folder / "runs/t/checkpoints").exists()


def test_tokenizer_larger_than_the_model(cli: Cli) -> None:
    """One that is made to be smaller; a pretrained one gets new rows."""
    files, arguments = files_of("jsonl", GOOD)
    write(cli, files)
    smaller = "model.config={model_type: gpt2, n_layer: 1, n_head: 1, n_embd: 8, n_positions: 64, vocab_size: 100}"
    phrase = "model.config.vocab_size: the model has 100 token embeddings, the tokenizer 257 tokens"
    refused_unstarted(cli, False, (*arguments, smaller), phrase, code=2)


def test_special_tokens_that_are_missing(cli: Cli) -> None:
    """Without padding the end-of-text token pads; without end of text there is no training."""
    files, arguments = files_of("jsonl", GOOD)
    write(cli, files)
    save_tokenizer(cli.folder / "words", WORDS, pad_token="?")
    phrase = "the tokenizer of 'words' has no end-of-text token (eos_token)"
    refused_unstarted(cli, False, (*arguments, *FROM_FOLDER), phrase, code=2)
    save_tokenizer(cli.folder / "words", WORDS, eos_token="end")
    finished = cli("train", "base.yaml", *arguments, *FROM_FOLDER, "training.max_steps=1", "data.packing=false")
    assert finished.exit_code == 0, finished.stderr


@both_ways
def test_another_tokenizer_on_resume(cli: Cli, streaming: bool) -> None:
    """Two words of the same folder exchanged: every text has as many tokens as before."""
    files, arguments = files_of("jsonl", GOOD * 3 + b'{"text": "there there"}\n')
    write(cli, files, validation_fraction=0, streaming=streaming)
    save_tokenizer(cli.folder / "words", WORDS, eos_token="end")
    run = ("train", "base.yaml", *arguments, *FROM_FOLDER, "--resume", "auto")
    finished = cli(*run, "training.max_steps=5")
    assert finished.exit_code == 0, finished.stderr
    save_tokenizer(cli.folder / "words", {**WORDS, "hello": 2, "there": 1}, eos_token="end")
    before = digests(cli.folder / "runs/t")
    finished = cli(*run, "training.max_steps=10")
    refused(finished, 3, "the data is not what this run was trained on", "the tokenizer")
    assert digests(cli.folder / "runs/t") == before


def png(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (12, 12), (shade, 0, 0)).save(content, "png")
    return content.getvalue()


def folder_of(**more: bytes) -> dict[str, bytes]:
    """Ten images of two classes, and `more`; a double underscore is a slash."""
    images = {f"images/{label}/{number}.png": png(number) for label in "ab" for number in range(5)}
    return {**images, **{f"images/{name.replace('__', '/')}.png": content for name, content in more.items()}}


def image_table(labels: list[int | None]) -> bytes:
    return parquet(image=[{"bytes": png(number), "path": None} for number in range(len(labels))], label=labels)


def labelled_table(labels: list[int]) -> bytes:
    """Whose two classes have names, whatever the labels; as the `datasets` library writes it."""
    images = [{"bytes": png(number), "path": None} for number in range(len(labels))]
    features = {"image": {"decode": False, "_type": "Image"}, "label": {"names": ["x", "y"], "_type": "ClassLabel"}}
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    content = io.BytesIO()
    pq.write_table(pa.table({"image": images, "label": labels}).replace_schema_metadata(described), content)
    return content.getvalue()


def image_shard(labels: list[bytes]) -> bytes:
    samples = [((f"{n}.png", png(n)), (f"{n}.cls", label)) for n, label in enumerate(labels)]
    return tar(*(member for sample in samples for member in sample))


IMAGES = {"images": "image_folder", "images.parquet": "hf", "images.tar": "webdataset"}
IMAGE_MISTAKES: dict[str, tuple[dict[str, bytes], str]] = {
    "empty file": (folder_of(a__9=b""), "images/a/9.png: the file is empty; delete it or write the image again"),
    "cut file": (
        folder_of(a__9=png(1)[:50]),
        "images/a/9.png: the image cannot be decoded: image file is truncated",
    ),
    "no image": (
        folder_of(a__9=b"hello"),
        "images/a/9.png: the image cannot be decoded: not a JPEG, PNG",
    ),
    "no folders": (
        {"images/a.png": png(1)},
        "images: no class folders; images lie in it directly; put the",
    ),
    "one class": ({"images/a/1.png": png(1)}, "images: a single class, 'a'; at least two class folders are needed"),
    "other class": (
        folder_of() | {"held/c/1.png": png(1)},
        "held: c: no class of the training images, which",
    ),
    "hf, no class": ({"images.parquet": image_table([0, 1, None] * 4)}, "its class is None; correct the row"),
    "hf, label 5 of 2 classes": ({"images.parquet": labelled_table([0, 1, 5] * 4)}, "its class is 5; correct the row"),
    "hf, other class": (
        {"images.parquet": image_table([0, 1] * 5), "held.parquet": image_table([0, 7])},
        "held.parquet[train] field label: class '7' is none of the 2 classes of the training images",
    ),
    "shard, label -1": (
        {"images.tar": image_shard([b"0", b"-1"] * 5)},
        "images.tar:1.cls: a class is an",
    ),
    "shard, no number": (
        {"images.tar": image_shard([b"0", b"x"] * 5)},
        "images.tar:1.cls: a class is an",
    ),
    "shard, no sample": ({"images.tar": tar()}, "0 samples in images.tar; set data.path to shards with images"),
    "shard, other class": (
        {"images.tar": image_shard([b"0", b"1"] * 5), "held.tar": image_shard([b"4"])},
        "held.tar: '4' is no class of the training data, which has 0, 1",
    ),
}
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8}


@pytest.mark.parametrize("mistake", IMAGE_MISTAKES)
def test_bad_images_and_labels(cli: Cli, mistake: str) -> None:
    files, phrase = IMAGE_MISTAKES[mistake]
    path = next(iter(files)).split("/")[0]
    held_out = next((name.split("/")[0] for name in files if name.startswith("held")), None)
    data = {"source": IMAGES[path], "path": path, "validation_path": held_out, "validation_fraction": 0.2}
    write(cli, files)
    model = {"task": "image_classification", "init": "scratch", "config": {"model_type": "vit", "patch_size": 4, **VIT}}
    judged = {"eval": {"metrics": ["accuracy"], "select_best_by": "accuracy"}}
    values = {**BASE, "model": model, "data": {**data, "num_workers": 0, "collate": {"type": "cv"}}, **judged}
    write_config(cli.folder / "base.yaml", values)
    refused(cli("train", "base.yaml"), 3, f"error: {'' if mistake.startswith('hf, ') else phrase}", phrase)
    assert not (cli.folder / "runs/t/checkpoints").exists()


@both_ways
def test_hub_without_network(cli: Cli, streaming: bool) -> None:
    """Said within seconds, and the user's token is written nowhere."""
    write(cli, {}, streaming=streaming)
    canary = "hf_" + "Canary" * 6
    start = time.perf_counter()
    finished = cli("train", "base.yaml", "data.source=hf", "data.dataset=nobody/nothing", env={"HF_TOKEN": canary})
    assert time.perf_counter() - start < 20
    phrases = ("nobody/nothing[train]: cannot be read: ", "the cache holds no copy; connect, or give local files")
    refused(finished, 3, *phrases)
    assert canary not in finished.stdout + finished.stderr
    written = [path for path in cli.folder.rglob("*") if path.is_file()]
    assert written and not any(canary.encode() in path.read_bytes() for path in written)
