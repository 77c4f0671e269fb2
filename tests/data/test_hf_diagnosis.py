from __future__ import annotations

import csv
import gzip
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest
import zstandard

from tests.data.test_hf_source import source
from truthgpt.data import hf_dataset
from truthgpt.data.base import ImageFields
from truthgpt.data.hf_diagnosis import find_mistake
from truthgpt.data.hf_source import HfImageSource
from truthgpt.errors import DataError

PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
FIX = "correct the line, or give the rows as JSON Lines in data.path, where data.on_bad_row: skip leaves bad ones out"
LONG = "x" * 100
VALUE, COMMA = "not valid JSON: Expecting value", "not valid JSON: Expecting ',' delimiter"
NUMBER = "a row must be a JSON object, found a number"
FIELDS, QUOTE = "3 fields, the rows above have 2", "the row has a quotation mark that is never closed"


DEFAULT_LIMIT = csv.field_size_limit()


class Mistake(NamedTuple):
    file: str
    content: bytes
    place: str
    reason: str
    excerpt: str


MISTAKES = {
    "array": Mistake("a.json", b'[{"text": "a"},\n  {"text": b}]', "2:12", VALUE, '{"text": b}]'),
    "array behind BOM": Mistake("a.json", b'\xef\xbb\xbf[{"text": b}]', "1:11", VALUE, '[{"text": b}]'),
    "array, cut": Mistake("a.json", b'[{"text": "a"},\n{"text": "b"\n\n', "2:13", COMMA, '{"text": "b"'),
    "array, comma": Mistake("a.json", b'[{"text": "a"},]', "1:16", VALUE, '[{"text": "a"},]'),
    "two arrays": Mistake("a.json", b'[{"a": 1}]\n [{"b": 2}]', "2:2", "not valid JSON: Extra data", '[{"b": 2}]'),
    "array, number": Mistake("a.json", b'[{"a": [1, {}]},\n {},\n\t3]', "3:2", NUMBER, "3]"),
    "array, long": Mistake("a.json", f'[{{"a": "{LONG}", "b": c}}]'.encode(), "1:117", VALUE, f'[{{"a": "{LONG[:52]}'),
    "array, not UTF-8": Mistake(
        "a.json",
        b'\xef\xbb\xbf[{"text": "\xc3\xa9"},\n {"text": "\xc3\xa9\xe9"}]',
        "2:13",
        "not UTF-8 at byte 33 of the file (invalid continuation byte)",
        '{"text": "\u00e9\ufffd"}]',
    ),
    "array behind BOM, not UTF-8": Mistake(
        "a.json",
        b'\xef\xbb\xbf["a\xff"]',
        "1:4",
        "not UTF-8 at byte 6 of the file (invalid start byte)",
        '["a\ufffd"]',
    ),
    "array in .jsonl": Mistake("a.jsonl", b'[{"text": "a"},\n{"text": b}]', "2:10", VALUE, '{"text": b}]'),
    "several lines": Mistake("a.json", b'{\n"text": "a"\n}\n{\n"text": b\n}', "5:9", VALUE, '"text": b'),
    "lines": Mistake("a.jsonl", b'\xef\xbb\xbf\n{"text": "a"}\n \n  {"text": b}\n', "4:12", VALUE, '{"text": b}'),
    "lines in .json": Mistake("a.json", b'{"text": "a"\n{"text": "b"}\n', "1:13", COMMA, '{"text": "a"'),
    "lines, number": Mistake("a.json", b'{"text": "a"}\n3\n', "2:1", NUMBER, "3"),
    "csv": Mistake("a.csv", b"text,n\na\nb,1\n\nc,d,2\n", "5:1", FIELDS, "c,d,2"),
    "csv, rows of lines": Mistake("a.csv", b'text,n\n"a\n\nb",1\n"c\nd",2,3\n', "5:1", FIELDS, '"c'),
    "csv, quote": Mistake("a.csv", b'text,n\na,1\n"b,2\nc,3\n', "3:1", QUOTE, '"b,2'),
    "csv, last quote": Mistake("a.csv", b'text\na\n"b', "3:1", QUOTE, '"b'),
    "csv, not UTF-8": Mistake(
        "a.csv",
        b"\xef\xbb\xbftext\ncaf\xc3\xa9 \xe9\n",
        "2:6",
        "not UTF-8 at byte 14 of the file (invalid continuation byte)",
        "caf\u00e9 \ufffd",
    ),
    "csv, long field": Mistake("a.csv", b"text,n\n" + b"x" * 200_000 + b",1\nb,2,3\n", "3:1", FIELDS, "b,2,3"),
    "tsv": Mistake("a.tsv", b"text\tn\na,b,c\t1\nb\t2\t3\n", "3:1", FIELDS, "b\t2\t3"),
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", MISTAKES)
def test_place_of_a_mistake(tmp_path: Path, name: str, packed: str) -> None:
    mistake = MISTAKES[name]
    file = tmp_path / f"{mistake.file}{packed}"
    file.write_bytes(PACKED[packed](mistake.content))
    found = find_mistake(file, "\t" if name == "tsv" else ",")
    assert found == f"{file}:{mistake.place}: {mistake.reason}: {mistake.excerpt!r}; {FIX}"


FLAWLESS = {
    "array": ("a.json", b'\n[{"text": "a, ]"}, {"text": {"b": []}}]\n'),
    "array of strings": ("a.json", b'["a", {"b": 1}]'),
    "empty array": ("a.json", b"[ ]"),
    "deep array": ("a.json", b"[" * 100_000),  # no place is known
    "several lines": ("a.json", b'\xef\xbb\xbf{\n"text": "a"\n} {"text": "b"}\n\n'),
    "lines": ("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": "b"}'),
    "no line": ("a.json", b""),
    "csv": ("a.csv", b'text,n\na\n"b\n, ""c""",1\n\nd,\n'),
    "csv with an index": ("a.csv", b"\n\ntext,n\n1,a,2\n2,b,3\n"),
    "csv of carriage returns": ("a.csv", b"text,n\ra,1\rb,2\r"),
    "csv, no line": ("a.csv", b""),
    "neither": ("a.txt", b"\xff"),
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", FLAWLESS)
def test_nothing_is_found_where_nothing_is_wrong(tmp_path: Path, name: str, packed: str) -> None:
    file, content = FLAWLESS[name]
    (tmp_path / f"{file}{packed}").write_bytes(PACKED[packed](content))
    csv.field_size_limit(DEFAULT_LIMIT)
    assert find_mistake(tmp_path / f"{file}{packed}") is None
    assert csv.field_size_limit() == DEFAULT_LIMIT


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.txt"])
def test_cut_archive(tmp_path: Path, name: str, packed: str) -> None:
    """What looks like a mistake because the file ends there is none."""
    file = tmp_path / f"{name}{packed}"
    file.write_bytes(PACKED[packed](b'{"text": "a"}\n' * 1000)[:-4])
    assert find_mistake(file) == f"{file}: the archive ends early; copy or download the file again"


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    message = f"{tmp_path}/a.json: cannot be read: Is a directory; check its permissions"
    assert find_mistake(tmp_path / "a.json") == message


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


READ_BY_THE_LIBRARY = [
    *((name, "dataset") for name in MISTAKES),
    *((name, "path") for name in MISTAKES if "lines" not in name.split()[0] and ".jsonl" not in name),
]
both_ways = pytest.mark.parametrize("streaming", [False, True])


@both_ways
@pytest.mark.parametrize(("name", "setting"), READ_BY_THE_LIBRARY)
@pytest.mark.usefixtures("own_cache")
def test_what_the_library_refuses(
    tmp_path: Path,
    name: str,
    setting: str,
    streaming: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The file is called as the user does, and the library's own line is left out."""
    mistake = MISTAKES[name]
    file = f"rows/{mistake.file.replace('a.', 'train.')}"
    monkeypatch.chdir(tmp_path)
    Path("rows").mkdir()
    Path(file).write_bytes(mistake.content)
    given = source("rows", streaming=streaming) if setting == "dataset" else source(path=["rows"], streaming=streaming)
    with pytest.raises(DataError) as error:
        list(given.documents())
    assert str(error.value) == f"{file}:{mistake.place}: {mistake.reason}: {mistake.excerpt!r}; {FIX}"
    assert caplog.messages == []
    assert logging.getLogger("datasets.packaged_modules.csv.csv").isEnabledFor(logging.ERROR)


def _refusal(path: list[str], streaming: bool) -> str:
    with pytest.raises(DataError) as error:
        list(source(path=path, streaming=streaming).documents())
    return str(error.value)


@both_ways
@pytest.mark.usefixtures("own_cache")
def test_the_first_file_with_a_mistake_is_named(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "0.csv").write_text("text,n\na,1\n")
    (tmp_path / "1.csv").write_text("text,n\na,1\nb,2\nc,3,4\n")
    (tmp_path / "2.csv").write_text("text,n\na,1\n,,,\n")
    assert _refusal([str(tmp_path / "*.csv")], streaming).startswith(f"{tmp_path}/1.csv:4:1: {FIELDS}: ")


@both_ways
@pytest.mark.usefixtures("own_cache")
def test_the_reason_of_the_library_where_nothing_is_found(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a\\ud800b"}\n')
    with pytest.raises(DataError, match=r"\[train\]: cannot be read: .*surrogate"):
        list(source(tmp_path, streaming=streaming).documents())


def test_a_dataset_of_the_hub_is_not_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hf_dataset, "_open_builder")
    with (
        pytest.raises(DataError, match=r"name: cannot be read: no"),
        hf_dataset.reading("name", hf_dataset.HfLocation("owner/name", None, "train", None)),
    ):
        raise ValueError("no")


@both_ways
@pytest.mark.usefixtures("own_cache")
def test_settings_of_a_folder(tmp_path: Path, streaming: bool) -> None:
    """Another delimiter is heeded; what else a README says of its files is left to the library."""
    settings = "configs:\n- config_name: default\n  data_files: train.csv\n  sep: ';'\n"
    (tmp_path / "README.md").write_text(f"---\n{settings}---\n")
    (tmp_path / "train.csv").write_text("text;n\na,b,c;1\nb;2;3\n")
    with pytest.raises(DataError, match=rf"/train\.csv:3:1: {FIELDS}: 'b;2;3'"):
        list(source(tmp_path, streaming=streaming).documents())
    (tmp_path / "README.md").write_text(f"---\n{settings}  skiprows: 2\n---\n")
    with pytest.raises(DataError, match=r"\[train\]: cannot be read: .*Expected 2 fields in line 5, saw 3"):
        (tmp_path / "train.csv").write_text("a line\nto skip\ntext;n\na;1\nb;2;3\n")
        list(source(tmp_path, streaming=streaming).documents())


@both_ways
@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.csv.gz", "train.csv.zst", "train.txt.gz", "train.txt.zst"])
@pytest.mark.usefixtures("own_cache")
def test_cut_archive_in_a_folder(tmp_path: Path, name: str, streaming: bool) -> None:
    """The library takes a cut `.zst` file for a shorter one, and does not name a cut `.gz` file."""
    lines = b'{"text": "a"}\n' * 5000 if "json" in name else b"text\n" + b"".join(b"%d\n" % n**3 for n in range(5000))
    content = PACKED[Path(name).suffix](lines)
    (tmp_path / name).write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(DataError) as error:
        list(source(tmp_path, streaming=streaming).documents())
    assert str(error.value) == f"{tmp_path / name}: the archive ends early; copy or download the file again"


@pytest.mark.usefixtures("own_cache")
def test_rows_of_images(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,label\na.png,1\nb.png,2,3\n")
    with pytest.raises(DataError, match=rf"/a\.csv:3:1: {FIELDS}: 'b\.png,2,3'"):
        HfImageSource(None, None, "train", [str(tmp_path)], ImageFields("image", "label"))
