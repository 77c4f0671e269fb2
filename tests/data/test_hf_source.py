from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from huggingface_hub import constants
from PIL import Image

from tests.data.stream_contract import check_cursors, read_shards
from truthgpt.data import hf_source
from truthgpt.data.base import IdentifiedSource, ImageFields, StreamSource
from truthgpt.data.hf_source import HfImageSource, HfSource, open_rows
from truthgpt.data.jsonl_source import JsonlSource
from truthgpt.data.rows import BadRowPolicy, RowFields
from truthgpt.errors import ConfigError, DataError

NO_BAD_ROWS = BadRowPolicy("error", 0.0)
Rows = Sequence[Mapping[str, Any]]
ROWS = [{"id": index, "text": f"row {index} é", "blank": None} for index in range(25)]
CHATS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [{"name": "f"}]},
    {
        "messages": [
            {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
            {"role": "tool", "content": "c", "name": "f"},
        ],
        "tools": None,
    },
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def source(
    dataset: str | Path | None = None,
    path: Sequence[str | Path] | None = None,
    *,
    subset: str | None = None,
    split: str = "train",
    format: Literal["text", "prompt_completion", "chat"] = "text",
    text_field: str = "text",
    bad_rows: BadRowPolicy = NO_BAD_ROWS,
    streaming: bool = False,
) -> HfSource | JsonlSource:
    return open_rows(
        None if dataset is None else str(dataset),
        subset,
        split,
        None if path is None else [str(p) for p in path],
        RowFields(format, text_field, "prompt", "completion", "messages", "all"),
        bad_rows,
        streaming,
    )


def write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def write_json_lines(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_array(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows))


def write_arrow(path: Path, rows: Rows) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)


def write_parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".parquet": write_parquet,
    ".csv": write_csv,
    ".tsv": write_csv,
    ".json": write_array,
    ".jsonl": write_json_lines,
    ".arrow": write_arrow,
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_of_file(tmp_path: Path, suffix: str, streaming: bool) -> None:
    for name, rows in (("a[1]", ROWS[:13]), ("b", ROWS[13:])):
        WRITERS[suffix](tmp_path / f"{name}{suffix}", rows)
    rows = source(path=[tmp_path], streaming=streaming)
    assert isinstance(rows, StreamSource)
    assert isinstance(rows, IdentifiedSource)
    documents = list(rows.documents())
    assert [document.text for document in documents] == [row["text"] for row in ROWS]
    place = f"{tmp_path}[train] {'shard 1 row 0' if streaming else 'row 13'}"
    files = suffix == ".jsonl"  # read line by line, with the library's ones left to the library
    assert documents[13].where == (f"{tmp_path}/b.jsonl:1" if files else place)
    assert len(rows.shards()) == (2 if streaming or files else 1)
    check_cursors(rows, documents)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_cell_of_csv_is_the_text_that_stands_in_it(tmp_path: Path, suffix: str, streaming: bool) -> None:
    """Not nothing or a number, as in the library: a label may be None or NA, and an answer 007."""
    cells = ["None", "NA", "null", "nan", "n/a", "007", "1.50", "True", "1e3"]
    numbers = ["1"] * 10_000 + ["many"]  # of which the library takes 10,000 rows at a time
    for name, texts in (("a", cells), ("b", numbers)):
        write_csv(tmp_path / f"{name}{suffix}", [{"text": text, "n": 1} for text in texts])
        found = source(path=[tmp_path / f"{name}{suffix}"], streaming=streaming)
        assert [document.text for document in found.documents()] == texts
    with pytest.raises(DataError, match="no field 'body'"):
        list(source(path=[tmp_path / f"a{suffix}"], streaming=streaming, text_field="body").documents())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_columns_of_csv_that_are_not_read_may_hold_anything(tmp_path: Path, suffix: str, streaming: bool) -> None:
    numbers = ["1"] * 10_000 + ["NA", "0.5", "many"]  # of which the library takes 10,000 rows at a time
    write_csv(tmp_path / "a.csv", [{"text": "a", "n": number} for number in numbers])
    if suffix == ".csv.gz":
        (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    texts = [document.text for document in source(path=[tmp_path / f"a{suffix}"], streaming=streaming).documents()]
    assert texts == ["a"] * len(numbers)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_field_that_is_missing_is_told_all_columns(tmp_path: Path, streaming: bool) -> None:
    """Those too that are not read: the one that is meant is among them."""
    write_parquet(tmp_path / "a.parquet", [{"prompt": "a", "answer": "b"}])
    with pytest.raises(DataError, match="no field 'completion', the rows have prompt, answer "):
        list(source(path=[tmp_path], streaming=streaming, format="prompt_completion").documents())


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_need_agree_in_what_is_read_only(tmp_path: Path, streaming: bool) -> None:
    """Large data sets have shards without rows, and columns that are of one type here and another there."""
    tables = [
        {"text": pa.array([], pa.string()), "score": pa.array([], pa.int64())},
        {"text": ["a", "b"], "score": [1, 2]},
        {"text": pa.array([], pa.string()), "score": pa.array([], pa.int64())},
        {"text": ["c"], "score": [0.5]},
        {"text": ["d"], "score": pa.nulls(1)},
        {"text": ["e"], "more": ["e"]},
    ]
    for number, columns in enumerate(tables):
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    rows = source(path=[tmp_path], streaming=streaming)
    documents = list(rows.documents())
    assert [document.text for document in documents] == list("abcde")
    check_cursors(rows, documents)
    with pytest.raises(DataError, match="no field 'body', the rows have text, score"):
        list(source(path=[tmp_path / "1.parquet"], streaming=streaming, text_field="body").documents())


@pytest.mark.parametrize("streaming", [False, True])
def test_tools_in_some_parquet_files_only(tmp_path: Path, streaming: bool) -> None:
    chat = [{"role": "user", "content": "hi"}]
    tables = [{"messages": [chat], "tools": [[{"name": "add"}]]}, {"messages": [chat]}]
    for number, columns in enumerate(tables):
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    documents = source(path=[tmp_path], streaming=streaming, format="chat").documents()
    assert [document.conversation and len(document.conversation.tools) for document in documents] == [1, 0]


def test_keys_are_those_of_the_same_rows_elsewhere(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", ROWS)
    write_parquet(tmp_path / "a.parquet", ROWS)
    keys = [document.key for document in source(path=[tmp_path / "a.jsonl"]).documents()]
    assert keys == [document.key for document in source(path=[tmp_path / "a.parquet"], streaming=True).documents()]


@pytest.mark.parametrize("streaming", [False, True])
def test_more_rows_than_a_batch_and_a_shard(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_source, "BATCH_ROWS", 4)
    monkeypatch.setattr(hf_source, "STORED_SHARD_ROWS", 10)
    rows = [{"text": f"{index}" if index % 3 else ""} for index in range(47)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    reader = source(path=[tmp_path / "a.parquet"], streaming=streaming)
    documents = list(reader.documents())
    assert [document.text for document in documents] == [row["text"] for row in rows if row["text"]]
    assert [document.where.split()[-1] for document in documents] == [str(i) for i in range(47) if i % 3]
    assert len(reader.shards()) == (1 if streaming else 5)
    check_cursors(reader, documents)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_row_groups_are_joined_to_few_parts(tmp_path: Path, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_source, "FILE_PARTS", parts)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=3)
    rows = source(path=[tmp_path / "a.parquet"], streaming=True)
    documents = list(rows.documents())
    assert [document.text for document in documents] == [row["text"] for row in ROWS]
    assert {cursor[0] for _, cursor in rows.read(0)} == set(range(parts))
    check_cursors(rows, documents)


def test_a_parquet_file_is_entered_at_its_row_group(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ROWS)
    (shard,) = read_shards(source(path=[tmp_path / "a.parquet"], streaming=True))
    assert [shard[place][1] for place in (0, 9, 10, 24)] == [(0, 1, 1), (0, 10, 10), (1, 1, 11), (2, 5, 25)]
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    start = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).column(1).data_page_offset
    data[start : start + 40] = bytes(40)
    (tmp_path / "a.parquet").write_bytes(data)
    rest = list(source(path=[tmp_path / "a.parquet"], streaming=True).read(0, (1, 1, 11)))
    assert rest == shard[11:]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
def test_chats(tmp_path: Path, streaming: bool, suffix: str) -> None:
    WRITERS[suffix](tmp_path / f"a{suffix}", CHATS)
    first, second = source(path=[tmp_path], format="chat", streaming=streaming).documents()
    assert first.conversation is not None
    assert second.conversation is not None
    assert list(first.conversation.messages) == CHATS[0]["messages"]
    assert list(second.conversation.messages) == CHATS[1]["messages"]
    assert (first.conversation.tools, second.conversation.tools) == (({"name": "f"},), ())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".parquet", ".json"])
def test_nulls_that_arrow_fills_in_are_dropped(tmp_path: Path, suffix: str, streaming: bool) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"arguments": {"x": 1, "y": None}}]}
    other = {"role": "assistant", "content": "a", "tool_calls": [{"arguments": {"x": None, "y": 2}}]}
    WRITERS[suffix](tmp_path / f"a{suffix}", [{"messages": [call, other]}])
    (document,) = source(path=[tmp_path], format="chat", streaming=streaming).documents()
    assert document.conversation is not None
    assert [message["tool_calls"] for message in document.conversation.messages] == [
        [{"arguments": {"x": 1}}],
        [{"arguments": {"y": 2}}],
    ]
    WRITERS[suffix](tmp_path / f"a{suffix}", [{"messages": [{"role": "user", "content": None}]}])
    with pytest.raises(DataError, match=r"messages\[0\].content must be a string .null only with tool_calls., found"):
        list(source(path=[tmp_path], format="chat", streaming=streaming).documents())


def test_prompt_and_completion(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", [{"completion": "b", "prompt": "a", "id": 3}])
    (document,) = source(path=[tmp_path / "*.jsonl"], format="prompt_completion").documents()
    assert [segment.text for segment in document.segments] == ["a", "b"]


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_of_files_with_splits(tmp_path: Path, streaming: bool) -> None:
    write_json_lines(tmp_path / "train.jsonl", ROWS[:5])
    write_json_lines(tmp_path / "test.jsonl", ROWS[5:])
    assert len(list(source(tmp_path, streaming=streaming).documents())) == 5
    assert len(list(source(tmp_path, split="test", streaming=streaming).documents())) == 20
    with pytest.raises(ConfigError, match=r"data\.split: .* has no split 'dev' \(there is train, test\)"):
        list(source(tmp_path, split="dev", streaming=streaming).documents())
    with pytest.raises(ConfigError, match=r"data\.subset: .*BuilderConfig 'main' not found\. Available: \['default'\]"):
        list(source(tmp_path, subset="main", streaming=streaming).documents())


def test_part_of_a_split(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", ROWS)
    assert len(list(source(path=[tmp_path], split="train[:20%]").documents())) == 5
    with pytest.raises(ConfigError, match=r"has no split 'test' \(there is train\)"):
        list(source(path=[tmp_path], split="test").documents())


LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS[:5])


@pytest.mark.parametrize("streaming", [False, True])
def test_json_lines_are_read_as_the_source_jsonl_reads_them(tmp_path: Path, streaming: bool) -> None:
    """Also `.json` of a folder, which that source leaves out there."""
    files = {"a.jsonl": LINES, "b.json": b"\n \n" + LINES, "c.json.gz": gzip.compress(LINES), "d.json": b""}
    files["e.jsonl.zst"] = zstandard.ZstdCompressor().compress(b"\xef\xbb\xbf" + LINES)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    rows = source(path=[tmp_path], streaming=streaming)
    paths = [str(tmp_path / name) for name in sorted(files)]
    same = JsonlSource(paths, RowFields("text", "text", "prompt", "completion", "messages", "all"), NO_BAD_ROWS)
    documents = list(rows.documents())
    assert documents == list(same.documents()) and len(documents) == 20
    assert (rows.shards(), rows.identity(), rows.fingerprint()) == (paths, same.identity(), same.fingerprint())
    check_cursors(rows, documents)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "content",
    [b'[{"text": "a"},\n{"text": "b"}]', b'\n [{"text": "a"}, {"text": "b"}]', b'["a", "b"]'],
    ids=["lines", "blanks", "strings"],
)
def test_an_array_is_left_to_the_library(tmp_path: Path, content: bytes, streaming: bool) -> None:
    """And with it the files beside it, in their order; so are objects over several lines."""
    (tmp_path / "b.json").write_bytes(content)
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n')
    (tmp_path / "c.json").write_text('{\n  "text": "c"\n}\n{\n  "text": "d"\n}\n')
    rows = source(path=[tmp_path], streaming=streaming)
    assert isinstance(rows, HfSource)
    assert [document.text for document in rows.documents()] == ["first", "a", "b", "c", "d"]
    assert isinstance(source(path=[tmp_path / "c.json"], streaming=streaming), HfSource)
    assert isinstance(source(path=[tmp_path / "a.jsonl"], streaming=streaming), JsonlSource)


@pytest.mark.parametrize("streaming", [False, True])
def test_lines_turned_into_an_array_are_other_data(tmp_path: Path, streaming: bool) -> None:
    write_json_lines(tmp_path / "a.json", ROWS)
    lines = source(path=[tmp_path / "a.json"], streaming=streaming)
    found = [document.key for document in lines.documents()], lines.identity(), lines.fingerprint()
    write_array(tmp_path / "a.json", ROWS)
    array = source(path=[tmp_path / "a.json"], streaming=streaming)
    assert found[0] == [document.key for document in array.documents()]
    assert found[1] != array.identity() and found[2] != array.fingerprint()
    settings: list[dict[str, Any]] = [{}, {"text_field": "id"}, {"format": "chat"}]
    write_json_lines(tmp_path / "a.json", ROWS)
    assert len({source(path=[tmp_path / "a.json"], **each).fingerprint() for each in settings}) == len(settings)
    settings.append({"bad_rows": BadRowPolicy("skip", 0.1)})
    assert len({source(path=[tmp_path / "a.json"], **each).identity() for each in settings}) == len(settings)


@pytest.mark.parametrize("streaming", [False, True])
def test_malformed_json_lines_are_skipped(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "a.json").write_bytes(LINES + b'{"text": no}\n')
    with pytest.raises(DataError, match=r"a\.json:6:10: not valid JSON: .*'\{\"text\": no\}'; correct the row, or set"):
        list(source(path=[tmp_path / "a.json"], streaming=streaming).documents())
    rows = source(path=[tmp_path / "a.json"], bad_rows=BadRowPolicy("skip", 0.2), streaming=streaming)
    assert len(list(rows.documents())) == 5


def test_json_that_cannot_be_looked_into(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(LINES)[:5])
    rows = source(path=[tmp_path])
    assert isinstance(rows, JsonlSource)
    with pytest.raises(DataError, match=r"a\.json\.gz: the archive ends early"):
        list(rows.documents())


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_written_by_save_to_disk(tmp_path: Path, streaming: bool) -> None:
    whole = datasets.Dataset.from_list([dict(row) for row in ROWS])
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select(range(4))}).save_to_disk(tmp_path / "two")
    one, test = source(tmp_path / "one", streaming=streaming), source(tmp_path / "two", split="test")
    assert [document.text for document in one.documents()] == [row["text"] for row in ROWS]
    check_cursors(one, list(one.documents()))
    assert len(list(test.documents())) == 4
    for folder, there in (("one", "train"), ("two", "train, test")):
        with pytest.raises(ConfigError, match=rf"has no split 'dev' \(there is {there}\)"):
            list(source(tmp_path / folder, split="dev", streaming=streaming).documents())
    with pytest.raises(ConfigError, match=r"data\.subset: .* was saved without subsets"):
        list(source(tmp_path / "one", subset="main").documents())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (['{"body": "a"}'], r"no field 'text', the rows have body \(set data.text_field\)"),
        (['{"text": "a"}', '{"text": null}'], "row 1: field 'text' must be a string, found null: '{\"text\": null}'"),
        (['{"text": "a"}', '{"text": 3}'], "row 1: field 'text' must be a string, found a number"),
        (['{"text": ["a"]}'], "row 0: field 'text' must be a string, found a list"),
        (['{"text": " "}'], r"0 usable documents in .*: 1 rows, 1 without text"),
        ([], "0 usable documents in .*: there are no rows"),
    ],
)
def test_bad_rows(tmp_path: Path, rows: list[str], reason: str, streaming: bool) -> None:
    (tmp_path / "train.jsonl").write_text("".join(row + "\n" for row in rows))
    with pytest.raises(DataError, match=reason) as error:
        list(source(tmp_path, streaming=streaming).documents())
    assert f"{tmp_path}[train]" in str(error.value)


def test_mixed_types_in_a_streamed_array(tmp_path: Path) -> None:
    """The library keeps them as JSON, text in quotation marks, and knows nothing of it before the first row."""
    write_array(tmp_path / "a.json", [{"text": "a", "other": 1}, {"text": "b", "other": "c"}])
    assert [row.text for row in source(path=[tmp_path], text_field="text", streaming=True).documents()] == ["a", "b"]
    write_array(tmp_path / "a.json", [{"text": "a"}, {"text": 3}])
    rows = source(path=[tmp_path], bad_rows=BadRowPolicy("skip", 0.5), streaming=True)
    assert [row.text for row in rows.documents()] == ["a"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_files(tmp_path: Path, suffix: str, streaming: bool) -> None:
    WRITERS[suffix](tmp_path / f"a{suffix}", ROWS)
    data = (tmp_path / f"a{suffix}").read_bytes()
    (tmp_path / f"a{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=rf"a{suffix}\[train\]: cannot be read: "):
        list(source(path=[tmp_path / f"a{suffix}"], streaming=streaming).documents())


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_are_skipped_counted_and_capped(
    tmp_path: Path, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    write_array(tmp_path / "a.json", [*ROWS[:9], {"text": None}])
    rows = source(path=[tmp_path], bad_rows=BadRowPolicy("skip", 0.1), streaming=streaming)
    with caplog.at_level(logging.WARNING, logger="truthgpt"):
        assert [len(list(rows.documents())) for _ in range(2)] == [9, 9]
    assert "[train]: skipped 1 malformed of 10 rows; the first:" in caplog.messages[0]
    assert "row 9: field 'text' must be a string, found null: '{\"text\": null}'" in caplog.messages[0]
    assert len(caplog.messages) == 1
    with pytest.raises(DataError, match=r"1 of 10 rows are malformed, more than data.max_bad_fraction 0.05"):
        list(source(path=[tmp_path], bad_rows=BadRowPolicy("skip", 0.05), streaming=streaming).documents())


def test_what_to_read_must_be_said_once(tmp_path: Path) -> None:
    for dataset, path in ((None, None), ("owner/name", [tmp_path])):
        with pytest.raises(ConfigError, match=r"source: hf reads either data.dataset or data.path"):
            source(dataset, path)
    with pytest.raises(ConfigError, match=r"data\.subset: files of data\.path have no subsets"):
        source(path=[tmp_path], subset="main")


def test_names_that_are_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.dataset '.*/none': no such folder"):
        source(tmp_path / "none")
    for name in ("https://example.com/rows.parquet", str(tmp_path / "a.csv")):
        with pytest.raises(ConfigError, match=r"is neither a local folder nor a name of the hub.*given as data\.path"):
            source(name)
    with pytest.raises(DataError, match=r"data path .*: no .parquet or .* file found"):
        list(source(path=[tmp_path]).documents())
    with pytest.raises(DataError, match=r"cannot be read: The directory at .* doesn't contain any data files"):
        (tmp_path / "empty").mkdir()
        list(source(tmp_path / "empty").documents())


@pytest.mark.parametrize("name", ["pandas", "csv", "json", "text", "webdataset"])
def test_file_formats_are_no_datasets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"'{name}' is a file format \(give the files as data\.path\)"):
        source(name)


def test_files_of_one_kind(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ROWS)
    write_csv(tmp_path / "a.tsv", ROWS)
    write_json_lines(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.pkl").write_bytes(b"")
    for pattern in ("a.[cj]*", "a.[ct]sv"):
        with pytest.raises(ConfigError, match=r"files of one kind are needed, found \.csv, \.(jsonl|tsv)"):
            list(source(path=[tmp_path / pattern]).documents())
    with pytest.raises(ConfigError, match=r"a\.pkl: hf reads files ending in \.parquet, \.csv"):
        list(source(path=[tmp_path / "a.pkl"]).documents())


def test_a_hub_dataset_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    rows = source("owner/none-such")
    for read in (rows.documents, rows.identity, rows.fingerprint, source("none-such", streaming=True).shards):
        with pytest.raises(DataError, match=r"none-such\[train\]: cannot be read: Couldn't reach .*the cache holds no"):
            list(read())


def test_a_hub_that_does_not_answer_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    asked: list[object] = []

    def no_connection(address: object, timeout: float) -> socket.socket:
        asked.append(address)
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", no_connection)
    with pytest.raises(DataError, match=r"Couldn't reach 'owner/none-such' on the Hub"):
        list(source("owner/none-such").documents())
    assert asked == [("huggingface.co", 443)]
    assert "cannot be reached (timed out); using the copy in the cache" in caplog.text
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"hf needs the package datasets \(pip install 'truthgpt\[hf\]'\)"):
        source("owner/name")
    with pytest.raises(ConfigError, match=r"hf needs the package datasets"):
        HfImageSource("owner/name", None, "train", None, ImageFields("image", "label"))


def test_no_progress_bars(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_array(tmp_path / "a.json", ROWS)
    datasets.enable_progress_bars()
    list(source(path=[tmp_path]).documents())
    assert capfd.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_changed_file_is_read_anew(tmp_path: Path, suffix: str, streaming: bool) -> None:
    file = tmp_path / f"a{suffix}"
    WRITERS[suffix](file, [{"text": "one"}])
    rows = source(path=[file], streaming=streaming)
    before = rows.identity(), rows.fingerprint()
    assert before == (rows.identity(), rows.fingerprint())
    assert [document.text for document in rows.documents()] == ["one"]
    WRITERS[suffix](file, [{"text": "two"}])
    changed = source(path=[file], streaming=streaming)
    assert [document.text for document in changed.documents()] == ["two"]
    assert changed.identity() != before[0]
    assert changed.fingerprint() != before[1]


def test_identity_has_the_settings(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "train.jsonl", ROWS)
    settings: list[dict[str, Any]] = [{}, {"split": "test"}, {"text_field": "id"}, {"streaming": True}]
    assert len({source(tmp_path, **setting).identity() for setting in settings}) == len(settings)
    assert source(tmp_path).fingerprint() != source(tmp_path, split="test").fingerprint()


def png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, labels: list[Any], label_feature: Any) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": label_feature})
    rows = {"image": [{"bytes": png(index), "path": None} for index in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "images.parquet")


def images(
    path: Path, image_field: str = "image", label_field: str = "label", classes: Sequence[str] | None = None
) -> HfImageSource:
    return HfImageSource(None, None, "train", [str(path)], ImageFields(image_field, label_field), classes)


@pytest.mark.parametrize(
    ("labels", "feature", "classes", "expected"),
    [
        ([1, 0, 1], datasets.ClassLabel(names=["cat", "dog"]), ["cat", "dog"], [1, 0, 1]),
        (["dog", "ant", "cat"], datasets.Value("string"), ["ant", "cat", "dog"], [2, 0, 1]),
        ([10, 9, 10], datasets.Value("int64"), ["9", "10"], [1, 0, 1]),
    ],
)
def test_images(tmp_path: Path, labels: list[Any], feature: Any, classes: list[str], expected: list[int]) -> None:
    write_images(tmp_path, labels, feature)
    source = images(tmp_path)
    assert source.classes == classes
    assert source.keys() == ["0", "1", "2"]
    examples = [source.read(index) for index in range(3)]
    assert [example.label for example in examples] == expected
    assert [example.data for example in examples] == [png(index) for index in range(3)]
    assert examples[2].where == f"{tmp_path}[train] row 2"
    before = source.fingerprint()
    write_images(tmp_path, [*labels[1:], labels[0]], feature)
    assert images(tmp_path).fingerprint() != before


def test_classes_of_the_training_images_number_the_validation_images(tmp_path: Path) -> None:
    write_images(tmp_path, ["dog", "ant"], datasets.Value("string"))
    source = images(tmp_path, classes=["ant", "bee", "dog"])
    assert source.classes == ["ant", "bee", "dog"]
    assert [source.read(index).label for index in range(2)] == [2, 0]
    with pytest.raises(DataError, match="class 'dog' is none of the 2 classes of the training images"):
        images(tmp_path, classes=["ant", "bee"])


def test_images_of_a_folder_for_each_class(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(png(len(name)))
    source = HfImageSource(str(tmp_path), None, "train", None, ImageFields("image", "label"))
    assert source.classes == ["ant", "bee"]
    assert [(source.read(index).label, source.read(index).data) for index in range(2)] == [(0, png(3)), (1, png(3))]
    (tmp_path / "bee/1.png").unlink()
    with pytest.raises(DataError, match=r"row 1: cannot be read: .*No such file"):
        source.read(1)


def test_bad_images(tmp_path: Path) -> None:
    write_images(tmp_path, [0, None], datasets.ClassLabel(names=["cat", "dog"]))
    with pytest.raises(DataError, match=r"no field 'picture', the rows have image, label \(set data.image_field\)"):
        images(tmp_path, image_field="picture")
    with pytest.raises(DataError, match=r"no field 'class', the rows have image, label \(set data.label_field\)"):
        images(tmp_path, label_field="class")
    with pytest.raises(DataError, match=r"row 1: its class is None; correct the row"):
        images(tmp_path).read(1)
    with pytest.raises(DataError, match="field label: a class is a string or a whole number, the same in every row"):
        write_images(tmp_path, [1.5], datasets.Value("float64"))
        images(tmp_path)
    write_parquet(tmp_path / "images.parquet", [{"image": None, "label": 1}, {"image": png(1), "label": 2}])
    with pytest.raises(DataError, match=r"row 0: field 'image' holds no image"):
        images(tmp_path).read(0)
    assert images(tmp_path).read(1).data == png(1)
    write_parquet(tmp_path / "images.parquet", [{"image": 3, "label": 1}])
    with pytest.raises(DataError, match=r"\[train\]: cannot be read: .*cast"):
        images(tmp_path)
