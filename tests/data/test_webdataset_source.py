from __future__ import annotations

import logging
import pickle
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from truthgpt.data import webdataset_source
from truthgpt.data.base import ImageSource, StreamSource
from truthgpt.data.webdataset_source import WebdatasetImageSource
from truthgpt.errors import ConfigError, DataError

from .tar_files import MEMBERS, error_of, tar_end, text_source, texts, with_checksums, write_samples, write_tar


def test_library_shards_give_rows_of_every_format(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    shard = write_samples(
        tmp_path / "a.tar",
        [
            {"__key__": "one", "json": {"text": "é", "prompt": "p", "completion": "c", "messages": messages}},
            {"__key__": "two", "json": {"text": "b", "prompt": "q", "completion": "d", "messages": messages[:1]}},
        ],
    )
    assert [(d.text, d.where, d.continues) for d in text_source(shard).documents()] == [
        ("é", f"{shard}:one", False),
        ("b", f"{shard}:two", False),
    ]
    assert [[s.text for s in d.segments] for d in text_source(shard, format="prompt_completion").documents()] == [
        ["p", "c"],
        ["q", "d"],
    ]
    chats = [d.conversation for d in text_source(shard, format="chat").documents()]
    assert [len(chat.messages) for chat in chats if chat is not None] == [2, 1]


def test_txt_is_the_text_where_the_row_has_none(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        [
            ("a.txt", b"\xef\xbb\xbfx\r\ny\n"),
            ("b.json", b'{"id": 1}'),
            ("b.txt", b"from b.txt"),
            ("c.json", b'\xef\xbb\xbf{"text": "from c.json"}'),
            ("c.txt", b"unused"),
            ("D.TXT", b"upper"),
        ],
    )
    assert texts(shard) == ["x\ny\n", "from b.txt", "from c.json", "upper"]
    with pytest.raises(DataError, match=r"a\.tar:a: no \.json member stands beside: '\.txt'"):
        list(text_source(shard, format="prompt_completion").documents())


def test_key_is_the_content_alone(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "1.tar", [("a.txt", b"x"), ("b.txt", b"y")])
    other = write_tar(tmp_path / "2.tar.gz", [("dir/q.txt", b"y"), ("dir/r.json", b'{"text": "x"}')])
    keys = [[d.key for d in text_source(path).documents()] for path in (one, other)]
    assert keys[0] == keys[1][::-1]
    assert len(set(keys[0])) == 2


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "renamed"])
def test_every_cursor_gives_the_rest(tmp_path: Path, name: str) -> None:
    members = [(f"d/{i:02}.{suffix}", f"text {i}".encode()) for i in range(9) for suffix in ("npy", "txt")]
    members.insert(8, ("no suffix", b"z" * 700))
    members.insert(11, ("d/" + "long" * 60 + ".txt", b"long"))
    members.insert(14, ("d/empty.txt", b" "))
    written = write_tar(tmp_path / (name if "." in name else "a.tar.gz"), members)
    shard = written.rename(tmp_path / name)
    source = text_source(shard)
    assert isinstance(source, StreamSource)
    whole = list(source.read(0))
    assert [d for d, _ in whole] == list(source.documents())
    assert len(whole) == 10
    for index, (_, cursor) in enumerate(whole):
        assert list(source.read(0, cursor)) == whole[index + 1 :]
    assert whole[-1][1] == ((11,) if "gz" in name or name == "renamed" else (tar_end(shard),))


def test_a_pickle_is_counted_and_never_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    marker = tmp_path / "marker"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return open, (str(marker), "w")  # type: ignore[return-value]

    payload = pickle.dumps(Payload(), protocol=0)
    suffixes = ("pickle", "pkl", "pyd", "pth", "npy", "npz", "txt.pickle")
    shard = write_tar(tmp_path / "a.tar", [("a.txt", b"fine"), *((f"a.{suffix}", payload) for suffix in suffixes)])
    images = write_tar(
        tmp_path / "b.tar",
        [m for i in range(2) for m in ((f"{i}.cls", str(i).encode()), (f"{i}.jpg", b"x"), (f"{i}.pth", payload))],
    )
    with caplog.at_level(logging.INFO, "truthgpt"):
        source = text_source(shard)
        assert [d.text for d in source.documents()] == ["fine"]
        list(source.documents())
        list(source.read(0))
        assert WebdatasetImageSource([str(images)], "label").read(1).data == b"x"
    assert not marker.exists()
    assert [record.getMessage() for record in caplog.records] == [
        f"{shard}: left out 7 members (1 .pickle, 1 .pkl, 1 .pyd, 1 .pth, 1 .npy); read are .json .txt",
        f"{images}: left out 2 members (2 .pth); read are .cls .jpeg .jpg .json .png .webp",
    ]
    pickle.loads(payload).close()  # noqa: S301  the payload does work when it is run
    assert marker.exists()


def test_names_are_keys_and_never_paths(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    members = [("../x.txt", b"a"), ("/etc/y.txt", b"b"), ("new\nline.txt", b"c"), ("k.__key__", b"1"), ("k.txt", b"d")]
    shard = write_tar(folder / "a.tar", members)
    with tarfile.open(shard, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo("k.json")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    with caplog.at_level(logging.INFO, "truthgpt"):
        documents = list(text_source(shard).documents())
    assert "left out 3 members (2 others, 1 .__key__)" in caplog.text
    assert [d.text for d in documents] == ["a", "b", "c", "d"]
    assert [d.where.removeprefix(f"{shard}:") for d in documents] == ["../x", "/etc/y", r"new\nline", "k"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "in"]


def test_names_that_are_not_utf8_can_be_hashed(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("xy.cls", b"0"), ("xy.jpg", b"i"), ("z.cls", b"1"), ("z.jpg", b"i")])
    shard.write_bytes(with_checksums(shard.read_bytes().replace(b"xy.", b"\xff\xfe.")))
    assert list(map(str.encode, images([shard]).keys())) == [
        rb"a.tar/\xff\xfe",
        b"a.tar/z",
    ]


def test_bad_rows_name_member_line_and_column(tmp_path: Path) -> None:
    def message(name: str, data: bytes) -> str:
        shard = write_tar(tmp_path / "a.tar", [("ok.txt", b"x"), (name, data)])
        return error_of(shard).removeprefix(f"{shard}:")

    fix = "; correct the row, or set data.on_bad_row: skip"
    assert message("k.json", b'{\n "text": "a",\n "b" 1}') == (
        """k.json:3:6: not valid JSON: Expecting ':' delimiter: '{\\n "text": "a",\\n "b" 1}'""" + fix
    )
    assert message("k.json", b'{"text": 1,\n  "text": 2}').startswith(
        "k.json:2:3: the key 'text' stands twice in one object"
    )
    assert message("k.json", b'{"text": "\n\xff"}').startswith("k.json:2:1: not UTF-8 at byte 11")
    assert message("k.json", b"[1]").startswith("k.json:1:1: a row must be a JSON object, found a list")
    assert message("k.json", b'{"text": null}') == (
        "k.json:1:2: field 'text' must be a string, found null: '{\"text\": null}'" + fix
    )
    assert message("k.json", b'{"other": 1}') == (
        "k.json:1:1: no field 'text', the row has 'other' (set data.text_field): '{\"other\": 1}'" + fix
    )
    assert message("k.txt", b"ab\xff" + b"c" * 100).startswith("k.txt: not UTF-8 at byte 2 (invalid start byte): 'ab")
    assert len(message("k.txt", b"ab\xff" + b"c" * 1000)) < 200
    assert message("k.npy", b"x") == "k: no .json or .txt member stands beside: '.npy'" + fix


@pytest.mark.parametrize(
    ("member", "place"),
    [
        (b'{"n": 1,\n "text": 3}', "2:2"),
        (b'\xef\xbb\xbf{"\xc3\xa9": "\xc3\xa9", "text": 3}', "1:12"),
        (b'\n{ "text" :\t3, "kind": "text", "more": {"text": "\\"text\\": "}}', "2:3"),
        (b'{"other": {"text": [1, {"text": 2}]}, "\\u0074ext"\n: [3], "last": "text"}', "1:39"),
    ],
    ids=["line", "characters", "later values", "earlier values"],
)
def test_field_at_fault_is_found_among_its_like(tmp_path: Path, member: bytes, place: str) -> None:
    shard = write_tar(tmp_path / "a.tar", [("ok.txt", b"x"), ("k.json", member)])
    excerpt = member.decode("utf-8-sig").strip()[:60]
    found = "a list" if b"[3]" in member else "a number"
    assert error_of(shard) == (
        f"{shard}:k.json:{place}: field 'text' must be a string, found {found}: {excerpt!r}; correct the row, or set "
        "data.on_bad_row: skip"
    )
    with pytest.raises(DataError, match=f"a.tar:k.json:{place}: field 'text' must be"):
        list(text_source(shard).read(0))


def test_bad_chat_names_the_field_of_its_member(tmp_path: Path) -> None:
    member = b'{"id": 7,\n  "messages": [{"role": 1, "content": "' + b"a" * 80 + b'"}]}'
    shard = write_tar(tmp_path / "a.tar", [("k.json", member)])
    with pytest.raises(DataError) as caught:
        list(text_source(shard, format="chat").documents())
    excerpt = repr(member[:60].decode())
    assert f"{shard}:k.json:2:3: messages[0].role must be a string, found a number: {excerpt}; correct" in str(
        caught.value
    )


def test_bad_rows_are_skipped_up_to_the_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = write_tar(tmp_path / "a.tar", [("a.txt", b"\xff"), ("b.txt", b"b"), ("c.txt", b"c"), ("d.json", b"{")])
    source = text_source(shard, on_bad_row="skip")
    assert [d.text for d in source.documents()] == ["b", "c"]
    assert "skipped 2 malformed of 4 rows; the first: " + f"{shard}:a.txt: not UTF-8" in caplog.text
    with pytest.raises(DataError, match="2 of 4 rows are malformed, more than"):
        list(text_source(shard, on_bad_row="skip", max_bad_fraction=0.4).documents())
    assert [d.text for d, _ in source.read(0)] == ["b", "c"]


def test_no_usable_sample(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("a.txt", b" \n")])
    assert (
        error_of(shard)
        == f"0 usable documents in {shard}: 1 rows, 1 without text to train on; set data.path to files with text in "
        "them"
    )
    assert "0 usable documents" in error_of(write_tar(tmp_path / "b.tar", []))


def test_identity_and_fingerprint_follow_the_shards(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", MEMBERS)
    source = text_source(shard)
    identity, fingerprint = source.identity(), source.fingerprint()
    assert (identity, fingerprint) == (text_source(shard).identity(), text_source(shard).fingerprint())
    assert text_source(shard, format="chat").identity() != identity
    assert source.shards() == [str(shard)]
    write_tar(shard, [*MEMBERS[:2], ("c.txt", b"d" * 512)])
    assert text_source(shard).identity() != identity
    assert text_source(shard).fingerprint() != fingerprint


@pytest.mark.parametrize("build", [text_source, lambda path: WebdatasetImageSource([str(path)], "label")])
def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: object) -> None:
    shard = write_tar(tmp_path / "a.tar", MEMBERS)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ConfigError) as caught:
        build(shard)  # type: ignore[operator]
    assert str(caught.value) == "data.source: needs the package webdataset (pip install 'truthgpt[webdataset]')"


def images(paths: Sequence[Path], classes: Sequence[str] | None = None) -> WebdatasetImageSource:
    return WebdatasetImageSource([str(path) for path in paths], "kind", classes)


def image_error(path: Path, classes: Sequence[str] | None = None) -> str:
    with pytest.raises(DataError) as caught:
        images([path], classes)
    return str(caught.value).removeprefix(f"{path}")


def test_images_by_index_with_integer_classes(tmp_path: Path) -> None:
    one = write_samples(tmp_path / "0.tar", [{"__key__": f"d/{i}", "jpg": b"%d" % i * 700, "cls": i} for i in (3, 0)])
    two = write_tar(tmp_path / "1.tar", [("x.png", b"p"), ("x.cls", b" 1\n"), ("x.txt", b"caption")])
    source: ImageSource = images([one, two])
    assert list(source.classes) == ["0", "1", "2", "3"]
    assert list(source.keys()) == ["0.tar/d/3", "0.tar/d/0", "1.tar/x"]
    found = [source.read(index) for index in (2, 0, 1)]
    assert [(e.data, e.label, e.where) for e in found] == [
        (b"p", 1, f"{two}:x"),
        (b"3" * 700, 3, f"{one}:d/3"),
        (b"0" * 700, 0, f"{one}:d/0"),
    ]
    again = pickle.loads(pickle.dumps(source))  # noqa: S301  as a loader process gets it
    assert again.read(1) == found[2]


def test_images_with_named_classes_and_given_ones(tmp_path: Path) -> None:
    rows = [("a.webp", b"A"), ("a.json", b'{\n"kind": "dog"}'), ("b.JPEG", b"B"), ("b.json", b'{"kind": "cat"}')]
    shard = write_tar(tmp_path / "a.tar", rows)
    source = images([shard])
    assert list(source.classes) == ["cat", "dog"]
    assert [source.read(index).label for index in range(2)] == [1, 0]
    other = images([shard], classes=["dog", "eel", "cat"])
    assert list(other.classes) == ["dog", "eel", "cat"]
    assert [other.read(index).label for index in range(2)] == [0, 2]
    assert "'cat' is no class of the training data, which has dog, eel" in image_error(shard, ["dog", "eel"])


def test_image_fingerprint_follows_images_and_labels(tmp_path: Path) -> None:
    prints = set()
    for image, label in ((b"A", b"1"), (b"A", b"0"), (b"B", b"1"), (b"A", b"1")):
        shard = write_tar(tmp_path / "a.tar", [("a.jpg", image), ("a.cls", label), ("b.jpg", b"x"), ("b.cls", b"2")])
        prints.add(images([shard]).fingerprint())
    assert len(prints) == 3


def test_image_fingerprint_holds_every_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large shard only samples of the content are digested."""
    monkeypatch.setattr(webdataset_source, "content_fingerprint", lambda files: "the same")
    prints = set()
    for label in (b"1", b"0"):
        shard = write_tar(tmp_path / "a.tar", [("a.jpg", b"x"), ("a.cls", label), ("b.jpg", b"x"), ("b.cls", b"2")])
        prints.add(images([shard]).fingerprint())
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"x")], ":a: no label, a .cls or .json member; the members of a sample must stand together"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], ":a.cls: a class is an integer from 0 to 1048575, found -1"),
        ([("a.jpg", b"x"), ("a.cls", b"9999999")], ":a.cls: a class is an integer from 0 to 1048575, found 9999999"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], ":a.cls: a class is an integer from 0, found b'cat'"),
        (
            [("a.jpg", b"x"), ("a.json", b"{}")],
            ":a.json:1:1: no field 'kind', it has none (set data.label_field): '{}'; correct the member",
        ),
        ([("a.jpg", b"x"), ("a.json", b"{")], ":a.json:1:2: not valid JSON"),
        (
            [("a.jpg", b"x"), ("a.json", b'{\n "kind": true}')],
            ":a.json:2:2: field 'kind': a class is an integer or a string, found a boolean: "
            "'{\\n \"kind\": true}'; correct the member",
        ),
        (
            [("a.cls", b"1"), ("a.gif", b"x")],
            ":a: a sample has one image (.jpeg .jpg .png .webp), this one has .cls, .gif",
        ),
        ([("a.cls", b"1"), ("a.jpg", b"x"), ("a.png", b"x")], ":a: a sample has one image (.jpeg .jpg .png .webp)"),
        ([("a.cls", b"1"), ("a.jpg", b"")], ":a.jpg: an image of 0 bytes"),
        ([("a.cls", b"0"), ("a.jpg", b"x")], ": a single class, '0'"),
        (
            [("a.cls", b"0"), ("a.jpg", b"x"), ("b.jpg", b"x"), ("b.json", b'{"kind": "x"}')],
            ": some classes are integers",
        ),
    ],
)
def test_unusable_image_samples(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    assert image_error(write_tar(tmp_path / "a.tar", members)).startswith(message)


def test_no_samples_gzip_and_a_shard_that_shrinks(tmp_path: Path) -> None:
    assert image_error(empty := write_tar(tmp_path / "a.tar", [])).startswith(f"0 samples in {empty}; set data.path")
    packed = write_tar(tmp_path / "a.tar.gz", MEMBERS)
    assert image_error(packed) == f": images are read by place, which gzip does not allow; run: gunzip {packed}"
    shard = write_tar(tmp_path / "b.tar", [("a.cls", b"1"), ("a.jpg", b"x")])
    source = images([shard])
    shard.write_bytes(b"")
    with pytest.raises(DataError, match="the shard has become shorter"):
        source.read(0)
    shard.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        source.read(0)
