"""Bad data as commands, for every source that can meet it: exit code, one line with the place, nothing lost."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.process import Cli
from tests.sample_data import BASE, CHAT_TEMPLATE, write_config
from tests.test_bad_input import refused
from truthgpt.runtime.run_directory import is_run_directory

LONG, SHOWN = "0123456789" * 8, 60


def tar(*members: tuple[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def tar_of_lines(lines: bytes) -> bytes:
    return tar(*((f"{number}.json", line) for number, line in enumerate(lines.splitlines()) if line.strip()))


def array_of_lines(lines: bytes) -> bytes:
    """Every line on the same line of the array."""
    return b"[" + b",\n".join(lines.splitlines()) + b"]\n"


def parquet(**columns: Any) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.table(columns), content)
    return content.getvalue()


@dataclass(frozen=True)
class Reader:
    """A source, a file it reads, and how lines of JSON get into the file; the places as its messages write them."""

    source: str
    file: str
    pack: Callable[[bytes], bytes]
    line_place: str
    field_place: str

    def arguments(self, *more: str) -> tuple[str, ...]:
        return (f"data.source={self.source}", f"data.path={self.file}", *more)


def _lines(source: str, suffix: str, pack: Callable[[bytes], bytes]) -> Reader:
    place = f"rows.jsonl{suffix}:{{line}}:{{column}}: "
    return Reader(source, f"rows.jsonl{suffix}", pack, place, place)


TAR_PLACE = "rows.tar:{row}.json:1:{column}: "
READERS = {
    "jsonl": _lines("jsonl", "", bytes),
    "gz": _lines("jsonl", ".gz", gzip.compress),
    "zst": _lines("jsonl", ".zst", zstandard.ZstdCompressor().compress),
    "webdataset": Reader("webdataset", "rows.tar", tar_of_lines, TAR_PLACE, TAR_PLACE),
    "hf": _lines("hf", "", bytes),
    "array": Reader("hf", "rows.json", array_of_lines, "rows.json:{line}:{column}: ", "rows.json[train] row {row}: "),
}
OURS = [name for name in READERS if name != "array"]
each_reader = pytest.mark.parametrize("name", READERS)
WAYS = [
    *((name, streaming) for name in ("jsonl", "webdataset", "hf", "array") for streaming in (False, True)),
    *(("gz", False), ("zst", True)),  # one reader: the archive is behind it
]
each_way = pytest.mark.parametrize(("name", "streaming"), WAYS)
both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])


def write(cli: Cli, files: dict[str, bytes], **data: Any) -> None:
    """`base.yaml` without a data source, changed by `data`, and `files`."""
    kept = {key: value for key, value in BASE["data"].items() if key not in ("source", "path")}
    write_config(cli.folder / "base.yaml", {**BASE, "data": {**kept, **data}})
    for name, content in files.items():
        (cli.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (cli.folder / name).write_bytes(content)


def refused_unstarted(cli: Cli, streaming: bool, arguments: Sequence[str], *phrases: str, code: int = 3) -> None:
    """`train` refuses with one line, and leaves no run behind."""
    stream = ["data.streaming=true"] if streaming else []
    refused(cli("train", "base.yaml", *arguments, *stream), code, *phrases)
    assert not is_run_directory(cli.folder / "runs/t")


GOOD = b'{"text": "hello there"}\n'
MALFORMED: dict[str, tuple[str | bytes, int, str]] = {
    "value": (f'{{"text": "good", "n": nope, "more": "{LONG}"}}', 23, "not valid JSON: Expecting value"),
    "trailing": (f'{{"text": "a"}} {LONG}', 15, "not valid JSON: Extra data"),
    "cut": (f'{{"text": "to be or not {LONG}', 10, "not valid JSON: Unterminated string"),
    "double key": (f'{{"text": "a", "text": "{LONG}"}}', 15, "the key 'text' stands twice in one object"),
    "no object": (f'["a", "{LONG}"]', 1, "a row must be a JSON object, found a list"),
    "not UTF-8": (b'{"text": "caf\xe9 au lait"}', 14, "not UTF-8 at byte {byte} of the file"),
}
"""Row 2, the column at fault and the reason."""


@pytest.mark.parametrize(("name", "streaming"), [way for way in WAYS if way[0] in OURS])
@pytest.mark.parametrize("mistake", MALFORMED)
def test_malformed_line(cli: Cli, mistake: str, name: str, streaming: bool) -> None:
    reader, (row, column, reason) = READERS[name], MALFORMED[mistake]
    line = row if isinstance(row, bytes) else row.encode()
    byte = column - 1 if name == "webdataset" else len(GOOD) + column - 1
    write(cli, {reader.file: reader.pack(GOOD + line)})
    place = reader.line_place.format(line=2, row=1, column=column)
    excerpt = repr(line.decode(errors="replace")[:SHOWN])
    fix = f": {excerpt}; correct the row, or set data.on_bad_row: skip"
    refused_unstarted(cli, streaming, reader.arguments(), f"error: {place}{reason.format(byte=byte)}", fix)


IN_ARRAY = {
    **{mistake: MALFORMED[mistake] for mistake in ("value", "no object", "not UTF-8")},
    "trailing": (*MALFORMED["trailing"][:2], "not valid JSON: Expecting ',' delimiter"),
    "cut": ('{"text": "to be', 17, "not valid JSON: Invalid control character at"),
}


@both_ways
@pytest.mark.parametrize("mistake", IN_ARRAY)
def test_malformed_line_of_an_array(cli: Cli, mistake: str, streaming: bool) -> None:
    """The `datasets` library reads it, whatever `on_bad_row` says; the place is ours."""
    reader, (row, column, reason) = READERS["array"], IN_ARRAY[mistake]
    line = row if isinstance(row, bytes) else row.encode()
    content = reader.pack(GOOD + line + b"\n" + GOOD)
    write(cli, {reader.file: content}, on_bad_row="skip")
    place = reader.line_place.format(line=2, column=column) + reason.format(byte=content.find(b"\xe9"))
    excerpt = repr(content.splitlines()[1].decode(errors="replace")[:SHOWN])
    fix = f": {excerpt}; correct the line, or give the rows as JSON Lines in data.path"
    refused_unstarted(cli, streaming, reader.arguments(), f"error: {place}", fix)


FIELDS = {
    "missing": (f'{{"body": "{LONG}"}}', 1, "no field 'text', the row has 'body' (set data.text_field): "),
    "null": ('{"text": null}', 2, "field 'text' must be a string, found null: '{\"text\": null}'"),
    "number": ('{"text": 3}', 2, "field 'text' must be a string, found a number: '{\"text\": 3}'"),
    "list": (f'{{"text": ["{LONG}"]}}', 2, "field 'text' must be a string, found a list: "),
}


@each_way
@pytest.mark.parametrize("mistake", FIELDS)
def test_field_of_another_type(cli: Cli, mistake: str, name: str, streaming: bool) -> None:
    reader, (row, column, reason) = READERS[name], FIELDS[mistake]
    if name == "array" and mistake == "missing":  # Arrow gives every row every field
        row, reason = '{"text": null}', "field 'text' must be a string, found null: "
    write(cli, {reader.file: reader.pack(GOOD + row.encode())})
    place = reader.field_place.format(line=2, row=1, column=column)
    excerpt = f": {row[:SHOWN]!r}; correct the row, or set data.on_bad_row: skip"
    refused_unstarted(cli, streaming, reader.arguments(), f"error: {place}", reason, excerpt)


CHATS: dict[str, tuple[Any, str]] = {
    "null": (None, "field 'messages' must be a list of messages, found null"),
    "text": ("hi", "field 'messages' must be a list of messages, found a string"),
    "empty": ([], "field 'messages' must hold at least one message, found an empty list"),
    "numbers": ([1], "messages[0] must be an object with 'role' and 'content', found a number"),
    "no content": ([{"role": "user"}], "messages[0] "),
    "role": ([{"role": 1, "content": "a"}], "messages[0].role must be a string, found a number"),
    "parts": ([{"role": "user", "content": ["a"]}], "messages[0].content must be a string, found a list"),
    "ShareGPT": ([{"from": "human", "value": "hi"}], "rename 'from' to 'role'"),
    "no answer": ([{"role": "user", "content": "hi"}], "no message with role 'assistant'"),
}
CHAT = {"format": "chat", "chat_template": CHAT_TEMPLATE, "train_on": "assistant"}


@pytest.mark.parametrize("name", ["jsonl", "webdataset", "hf", "array"])
@pytest.mark.parametrize("mistake", CHATS)
def test_chat_of_another_shape(cli: Cli, mistake: str, name: str) -> None:
    """Streaming is the same reader of rows; every second mistake is streamed."""
    reader, (messages, reason) = READERS[name], CHATS[mistake]
    write(cli, {reader.file: reader.pack(json.dumps({"messages": messages}).encode())}, **CHAT)
    place = reader.field_place.format(line=1, row=0, column=2)
    streaming = list(CHATS).index(mistake) % 2 == 1
    refused_unstarted(cli, streaming, reader.arguments(), f"error: {place}", reason, "on_bad_row: skip")


TABLES: dict[str, tuple[str, bytes, str]] = {
    "null": ("rows.parquet", parquet(text=["a", None]), "[train] row 1: field 'text' must be a string, found null"),
    "number": ("rows.parquet", parquet(text=[1]), "[train] row 0: field 'text' must be a string, found a number"),
    "list": ("rows.parquet", parquet(text=[["a"]]), "[train] row 0: field 'text' must be a string, found a list"),
    "missing": ("rows.parquet", parquet(body=["a"]), "[train]: no field 'text', the rows have body (set data.text_fi"),
    "cut": ("rows.parquet", parquet(text=["a" * 99])[:200], "[train]: cannot be read: Parquet magic bytes not found"),
    "empty file": ("rows.parquet", b"", "[train]: cannot be read: Parquet file size is 0 bytes"),
    "csv null": ("rows.csv", b"text,n\na,1\n,2\n", "[train] row 1: field 'text' must be a string, found null"),
    "csv missing": ("rows.csv", b"body\na\n", "no field 'text', the row"),
    "csv ragged": ("rows.csv", b"text,n\na,1\nb,2,3\n", ":3:1: 3 fields, the rows above have 2: 'b,2,3'; correct"),
    "csv quotes": ("rows.csv", b'text,n\na,1\n"b,2\nc,3\n', ":3:1: the row has a quotation mark that is never closed:"),
    "csv not UTF-8": ("rows.csv", b"text\ncaf\xe9\n", ":2:4: not UTF-8 at byte 8 of the file"),
    "csv empty": ("rows.csv", b"", "[train]: cannot be read: No columns to parse from file"),
}


@both_ways
@pytest.mark.parametrize("mistake", TABLES)
def test_bad_table(cli: Cli, mistake: str, streaming: bool) -> None:
    file, content, phrase = TABLES[mistake]
    write(cli, {file: content})
    refused_unstarted(cli, streaming, ("data.source=hf", f"data.path={file}"), f"error: {file}", phrase)


def files_of(name: str, lines: bytes) -> tuple[dict[str, bytes], tuple[str, ...]]:
    return {READERS[name].file: READERS[name].pack(lines)}, READERS[name].arguments()


TEXT, TEXTS = ("data.source=text", "data.path=a.txt"), ("data.source=text", "data.path=texts")
NOTHING: dict[str, tuple[dict[str, bytes], tuple[str, ...]]] = {
    **{f"{name}, empty": files_of(name, b"") for name in READERS},
    **{f"{name}, blank": files_of(name, b"\n \n") for name in OURS},
    **{f"{name}, no text": files_of(name, b'{"text": ""}\n{"text": " \\n"}\n') for name in READERS},
    "parquet, no text": ({"rows.parquet": parquet(text=["", " "])}, ("data.source=hf", "data.path=rows.parquet")),
    "text, empty": ({"a.txt": b""}, TEXT),
    "text, blank": ({"a.txt": b"\n\n  \n"}, TEXT),
    "texts, empty": ({"texts/a.txt": b"", "texts/b.txt": b" \n"}, TEXTS),
}


@pytest.mark.parametrize("case", NOTHING)
def test_nothing_to_train_on(cli: Cli, case: str) -> None:
    files, arguments = NOTHING[case]
    write(cli, files)
    refused_unstarted(cli, False, arguments, f"error: 0 usable documents in {next(iter(files))}", "set data.path to")


@pytest.mark.parametrize("case", [case for case in NOTHING if "no text" in case or "text" in case.split(",")[0]])
def test_nothing_to_stream(cli: Cli, case: str) -> None:
    """Never a success of no steps."""
    files, arguments = NOTHING[case]
    write(cli, files)
    phrase = f"error: 0 usable documents in {next(iter(files)).split('/')[0]}"
    refused_unstarted(cli, True, arguments, phrase, "0 documents read", "data.path")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_to_stream_in_one_of_two_sources(cli: Cli, num_workers: int) -> None:
    """The other one alone would be enough to train on."""
    sources = [{"source": "jsonl", "path": path, "weight": 1} for path in ("good.jsonl", "empty.jsonl")]
    data = {"validation_fraction": 0, "num_workers": num_workers}
    write(cli, {"good.jsonl": GOOD, "empty.jsonl": b'{"text": " "}\n'}, sources=sources, **data)
    refused_unstarted(cli, True, (), "error: 0 usable documents in empty.jsonl, read to the end: 0 documents read")
    write(cli, {"empty.jsonl": GOOD}, sources=sources, **data)
    finished = cli("train", "base.yaml", "data.streaming=true", "training.max_steps=1")
    assert finished.exit_code == 0, finished.stderr


EMPTY_FILES: dict[str, tuple[dict[str, bytes], tuple[str, ...]]] = {
    "hf, blank jsonl": ({"rows/train.jsonl": b"\n \n"}, ("data.source=hf", "data.dataset=rows")),
    "hf, blank jsonl, stream": (
        {"rows/train.jsonl": b"\n \n"},
        ("data.source=hf", "data.dataset=rows", "data.streaming=true"),
    ),
    "hf, empty array": ({"rows.json": b"[]"}, READERS["array"].arguments()),
    "hf, csv of a header": ({"rows.csv": b"text\n"}, ("data.source=hf", "data.path=rows.csv")),
    "hf, parquet without rows": (
        {"rows.parquet": parquet(text=pa.array([], pa.string()))},
        ("data.source=hf", "data.path=rows.parquet"),
    ),
}


@pytest.mark.parametrize("case", EMPTY_FILES)
def test_nothing_to_train_on_names_the_file(cli: Cli, case: str) -> None:
    files, arguments = EMPTY_FILES[case]
    write(cli, files)
    refused_unstarted(cli, False, arguments, f"0 usable documents in {next(iter(files)).split('/')[0]}")


@each_way
def test_overlong_rows_all_dropped(cli: Cli, name: str, streaming: bool) -> None:
    files, arguments = files_of(name, GOOD * 3)
    write(cli, files, max_seq_len=4, overlong="drop")
    refused_unstarted(cli, streaming, arguments, "0 usable ", "3 longer" if streaming else "of 3: 3 are")


@each_reader
def test_fewer_rows_than_a_batch(cli: Cli, name: str) -> None:
    """11 rows in batches of 8 are two steps an epoch, the second one with what is left; a stream goes round."""
    rows = [{"text": "x" * length} for length in range(1, 12)]
    files, arguments = files_of(name, "".join(json.dumps(row) + "\n" for row in rows).encode())
    write(cli, files, validation_fraction=0, packing=False)
    finished = cli("train", "base.yaml", *arguments, "training.max_steps=null", "training.epochs=1", "--json")
    assert finished.exit_code == 0, finished.stderr
    last = json.loads((cli.folder / "runs/t/metrics.jsonl").read_text().splitlines()[-1])
    assert (finished.json["step"], last["tokens"]) == (2, sum(range(1, 12)))
    write(cli, files_of(name, b'{"text": "x"}\n')[0], validation_fraction=0, streaming=True)
    finished = cli("train", "base.yaml", *arguments, "training.max_steps=2", "output_dir=runs/s", "--json")
    assert finished.exit_code == 0 and finished.json["step"] == 2, finished.stderr


BAD_ROW = {**dict.fromkeys(OURS, b"{\n"), "array": b'{"text": null}\n'}


@each_reader
def test_skipped_rows_are_counted_and_capped(cli: Cli, name: str) -> None:
    good = b"".join(f'{{"text": "row {number}"}}\n'.encode() for number in range(99))
    files, arguments = files_of(name, good + BAD_ROW[name])
    write(cli, files, on_bad_row="skip")
    finished = cli("train", "base.yaml", *arguments, "training.max_steps=1")
    assert finished.exit_code == 0 and "skipped 1 malformed of 100 rows; the first: rows." in finished.stderr
    files, arguments = files_of(name, good + BAD_ROW[name] * 2)
    write(cli, files, on_bad_row="skip")
    phrases = ("2 of 101 rows are malformed, more than data.max_bad_fraction 0.01 allows", "the first: rows.")
    refused(cli("train", "base.yaml", *arguments, "output_dir=runs/second"), 3, *phrases)


@each_reader
def test_skipped_rows_of_a_stream_are_capped_from_row_1000_on(cli: Cli, name: str) -> None:
    rows = [f'{{"text": "row {number}"}}\n'.encode() for number in range(1100)]
    files, arguments = files_of(name, b"".join([BAD_ROW[name] if n % 50 == 49 else row for n, row in enumerate(rows)]))
    write(cli, files, on_bad_row="skip")
    refused_unstarted(cli, True, arguments, "rows are malformed, more than data.max_bad_fraction 0.01 allows")


def inspected(cli: Cli, arguments: Sequence[str]) -> tuple[list[list[str]], str]:
    """The tokens of every training document, and what was said."""
    finished = cli("inspect", "base.yaml", *arguments, "--json", "--samples", "9")
    assert finished.exit_code == 0, finished.stderr
    documents = [document for sample in finished.json["first_samples"] for document in sample]
    return sorted([token["text"] for token in document] for document in documents), finished.stderr


LINES = b'{"text": "one two"}\n{"text": "three\\n"}\n'
PLAIN = b"one two\nthree\n"


def spelt_otherwise(content: bytes) -> bytes:
    """With a byte-order mark and CRLF, and without the last line end."""
    return b"\xef\xbb\xbf" + content.removesuffix(b"\n").replace(b"\n", b"\r\n")


@both_ways
@pytest.mark.parametrize("name", ["text", "txt members", "csv", "array", *OURS])
def test_bytes_that_change_no_token(cli: Cli, name: str, streaming: bool) -> None:
    """Byte-order mark, CRLF and a missing last line end; what stands inside a document is never touched."""
    packs: dict[str, tuple[str, str, Callable[[bytes], bytes], bytes]] = {
        "text": ("text", "a.txt", bytes, PLAIN + b"end"),
        "txt members": ("webdataset", "a.tar", lambda text: tar(("0.txt", text)), PLAIN + b"end"),
        "csv": ("hf", "a.csv", bytes, b"text\n" + PLAIN),
        "array": ("hf", "a.json", bytes, array_of_lines(LINES)),
        **{key: (READERS[key].source, READERS[key].file, READERS[key].pack, LINES) for key in OURS},
    }
    source, file, pack, content = packs[name]
    arguments = (f"data.source={source}", f"data.path={file}", f"data.streaming={str(streaming).lower()}")
    write(cli, {file: pack(content)}, validation_fraction=0)
    expected, _ = inspected(cli, arguments)
    assert len(expected) == (1 if content.endswith(b"end") else 2)
    write(cli, {file: pack(spelt_otherwise(content))}, validation_fraction=0)
    assert inspected(cli, arguments)[0] == expected


@pytest.mark.parametrize("name", ["text", *OURS])
def test_nul_and_half_a_surrogate_pair(cli: Cli, name: str) -> None:
    if name == "text":
        write(cli, {"a.txt": b"one\0two\r\r\n"}, validation_fraction=0)
        assert inspected(cli, TEXT)[0] == [[*"one\0two\r\n", "<|endoftext|>"]]
        return
    files, arguments = files_of(name, b'{"text": "a\\u0000b"}\n')
    write(cli, files, validation_fraction=0)
    assert inspected(cli, arguments)[0] == [["a", "\0", "b", "<|endoftext|>"]]
    files, arguments = files_of(name, b'{"text": "a\\ud800b"}\n')
    write(cli, files, validation_fraction=0)
    tokens, said = inspected(cli, arguments)
    assert len(tokens[0]) == len("a\ufffdb".encode()) + 1
    assert "unpaired surrogates in 1 texts became U+FFFD" in said


@both_ways
@pytest.mark.parametrize("path", ["a.txt", "texts"])
def test_text_that_is_not_utf8(cli: Cli, path: str, streaming: bool) -> None:
    file = "a.txt" if path == "a.txt" else "texts/b.txt"
    write(cli, {file: b"x" * 400 + b"\ncaf\xe9\n", "texts/a.txt": b"good"})
    phrase = f"error: {file}: not UTF-8 at byte 404 (0xe9: invalid continuation byte); convert the file, for"
    refused_unstarted(cli, streaming, ("data.source=text", f"data.path={path}"), phrase)


@pytest.mark.parametrize("source", ["text", "jsonl", "webdataset", "hf", "image_folder"])
def test_no_file_there(cli: Cli, source: str) -> None:
    write(cli, {})
    task = ("model.task=image_classification", "data.collate=cv") if source == "image_folder" else ()
    arguments = (f"data.source={source}", "data.path=nowhere", *task)
    refused(cli("train", "base.yaml", *arguments), 3, "nowhere")
    assert not is_run_directory(cli.folder / "runs/t")


@both_ways
def test_refusal_leaves_the_directory_as_fresh_as_before(cli: Cli, streaming: bool) -> None:
    """And one token with its end of text is the least that can be trained on."""
    write(cli, {"a.txt": b""})
    refused_unstarted(cli, streaming, TEXT, "0 usable documents in a.txt")
    write(cli, {"a.txt": b"a"}, streaming=streaming)
    finished = cli("train", "base.yaml", *TEXT, "training.max_steps=1")
    assert finished.exit_code == 0, finished.stderr


def test_prompts_without_completions_are_no_training_data(cli: Cli) -> None:
    write(cli, {"long.jsonl": json.dumps({"prompt": "x" * 100, "completion": "y"}).encode()})
    overrides = ("data.format=prompt_completion", "data.train_on=completion", "data.path=long.jsonl")
    refused(
        cli("train", "base.yaml", "data.source=jsonl", *overrides), 3, "0 usable rows of 1", "raise data.max_seq_len"
    )
