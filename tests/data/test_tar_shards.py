from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from truthgpt.data import tar_shards
from truthgpt.data.tar_shards import TarShard, shard_files
from truthgpt.errors import ConfigError, DataError

from .tar_files import BLOCK, MEMBERS, error_of, tar_end, text_source, texts, with_checksums, write_tar


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0/"), min_size=1, max_size=130),
        unique=True,
        max_size=6,
    ),
    sizes=st.lists(st.sampled_from([0, 1, 511, 512, 513, 5000]), min_size=6, max_size=6),
    format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    suffix=st.sampled_from([".tar", ".tar.gz"]),
)
def test_members_are_those_of_tarfile(
    tmp_path: Path, names: list[str], sizes: list[int], format: int, suffix: str
) -> None:
    members = [(f"d/{name}", bytes([i]) * size) for i, (name, size) in enumerate(zip(names, sizes, strict=False))]
    path = write_tar(tmp_path / f"a{suffix}", members, format)
    with TarShard(path) as shard, tarfile.open(path) as archive:
        found = [(m.name, m.offset, m.data_offset, shard.data(m)) for m in shard.members()]
        expected = [(m.name, m.offset, m.offset_data, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    assert found == expected
    assert [name for name, *_ in found] == [name for name, _ in members]


def test_pax_size_is_followed_and_a_global_header_passed(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.txt")
    info.size = 5
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"00000000000\0"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    pax = tarfile.TarInfo.create_pax_global_header({"comment": "c"})
    pax += tarfile.TarInfo._create_pax_generic_header({"size": "5"}, tarfile.XHDTYPE, "utf-8")  # type: ignore[attr-defined]
    path = tmp_path / "a.tar"
    path.write_bytes(pax + bytes(header) + b"hello".ljust(BLOCK, b"\0") + bytes(2 * BLOCK))
    assert texts(path) == ["hello"]


def test_folders_globs_and_braces(tmp_path: Path) -> None:
    for number in range(12):
        write_tar(tmp_path / f"shard-{number:03}.tar", [("a.txt", str(number).encode())])
    (tmp_path / "sub").mkdir()
    write_tar(tmp_path / "sub" / "x.tar.gz", [("a.txt", b"x")])
    (tmp_path / "README.md").write_text("no shard")
    assert texts(tmp_path / "shard-{000..009}.tar") == [str(number) for number in range(10)]
    assert texts(tmp_path / "shard-{011,003}.tar") == ["11", "3"]
    assert texts(tmp_path / "shard-{010..011}.tar", tmp_path / "shard-01*.tar") == ["10", "11"]
    assert len(texts(tmp_path)) == 13
    assert len(texts(tmp_path / "*")) == 13
    with pytest.raises(DataError, match=r"shard-012\.tar"):
        text_source(tmp_path / "shard-{011..012}.tar")
    (tmp_path / "{1..2}.tar").write_bytes((tmp_path / "shard-007.tar").read_bytes())
    assert texts(tmp_path / "{1..2}.tar") == ["7"]


def test_a_folder_without_shards_and_an_empty_list(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no \.tar, \.tar\.gz, \.tgz file found"):
        text_source(tmp_path)
    with pytest.raises(DataError, match="the list is empty"):
        shard_files([])


@pytest.mark.parametrize(
    "path",
    [
        "pipe:touch {marker}",
        "http://localhost/a.tar",
        "file:///etc/a.tar",
        "{{pipe:touch {marker},x.tar}}",
        "x.tar::pipe:touch {marker}",
    ],
)
def test_commands_and_urls_are_refused(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "x.tar", [("a.txt", b"x")])
    with pytest.raises(ConfigError, match=r"data\.path: .*only local files are read"):
        text_source(path.format(marker="marker"))
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar"]


def test_braces_and_variables_that_cannot_be_expanded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path: .* cannot be expanded"):
        text_source(f"{tmp_path}/${{NOT_SET}}.tar")
    with pytest.raises(ConfigError, match=r"data\.path: .* cannot be expanded"):
        text_source(f"{tmp_path}/{{1..2.tar")


@pytest.mark.parametrize("content", [b"", b"x", b"some text\n" * 100, b"\x28\xb5\x2f\xfd" + bytes(2000)])
def test_a_file_that_is_no_archive(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    assert error_of(path).startswith(f"{path}: is no tar archive")
    path.write_bytes(gzip.compress(content))
    assert error_of(path).startswith(f"{path}: is no tar archive")


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_an_archive_cut_anywhere_is_an_error(tmp_path: Path, format: int) -> None:
    members = [*MEMBERS, ("n" * 200 + ".txt", b"x")]
    whole = write_tar(tmp_path / "whole.tar", members, format)
    end, data, path = tar_end(whole), whole.read_bytes(), tmp_path / "a.tar"
    for size in range(1, end + 1, 100):
        path.write_bytes(data[:size])
        assert error_of(path).startswith(f"{path}: ")
    for size in (0, BLOCK, 3 * BLOCK, 4 * BLOCK, 5 * BLOCK, end):
        path.write_bytes(data[:size])
        message = error_of(path)
        assert (f"ends early, at byte {size}" in message) == (size > 0), message
    assert "in or after member 'b.txt'" in error_of(cut(path, data, 5 * BLOCK))
    path.write_bytes(data[: end + BLOCK])
    assert len(texts(path)) == 4


def cut(path: Path, data: bytes, size: int) -> Path:
    path.write_bytes(data[:size])
    return path


def test_a_gzip_shard_cut_or_damaged_is_an_error(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "whole.tar.gz", MEMBERS).read_bytes()
    path = tmp_path / "a.tar.gz"
    for size in range(2, len(data), 7):
        assert "the gzip stream ends early" in error_of(cut(path, data, size))
    path.write_bytes(data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])
    assert "the gzip stream is damaged (CRC check failed" in error_of(path)
    path.write_bytes(data[:20] + bytes(20) + data[40:])
    assert str(path) in error_of(path)


@pytest.mark.parametrize("gz", [False, True])
def test_damage_in_the_middle_names_byte_and_member(tmp_path: Path, gz: bool) -> None:
    data = bytearray(write_tar(tmp_path / "whole.tar", MEMBERS).read_bytes())
    path = tmp_path / "a.tar"

    def message(damaged: bytes) -> str:
        path.write_bytes(gzip.compress(damaged) if gz else damaged)
        return error_of(path).removeprefix(f"{path}: ")

    header = 3 * BLOCK
    assert message(data[:header] + b"\1" + data[header + 1 :]).startswith(
        f"byte {header}, after member 'a.txt': a damaged header (bad checksum)"
    )
    assert message(data + data).startswith(
        f"byte {tar_end(tmp_path / 'whole.tar') + BLOCK}, after member 'c.txt': data behind the end"
    )
    negative = bytearray(data)
    negative[header + 124 : header + 136] = b"\xff" * 12
    assert message(with_checksums(negative)).startswith(f"byte {header}, after member 'a.txt': a negative size")
    twice = data[:header] + data[: tar_end(tmp_path / "whole.tar")]
    assert message(bytes(twice) + bytes(2 * BLOCK)).startswith(
        f"byte {header}: member 'a.txt' is the second of its sample"
    )


@pytest.mark.parametrize("record", [b"99 path=x\n", b"7 path=x\n", b"rubbish\n", b"11 size=-1\n", b"11 size=1e9\n"])
def test_damaged_pax_headers(tmp_path: Path, record: bytes) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    path = tmp_path / "a.tar"
    plain = write_tar(tmp_path / "b.tar", [("a.txt", b"x")]).read_bytes()
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(BLOCK, b"\0") + plain)
    assert f"{path}: byte 0: a " in error_of(path)
    assert "pax header" in error_of(path)
    info.size = 2**21
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + plain)
    assert "byte 0: an extended header of 2097152 bytes" in error_of(path)
    info.size = 0
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + bytes(2 * BLOCK))
    assert "byte 512: an extended header is followed by no member" in error_of(path)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE])
def test_sparse_members_are_refused(tmp_path: Path, kind: bytes) -> None:
    record = b"22 GNU.sparse.major=1\n"
    info = tarfile.TarInfo("a.txt")
    info.type, info.size = kind, len(record)
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + record.ljust(BLOCK, b"\0") + bytes(2 * BLOCK))
    assert "a sparse member, which is not supported (pack without --sparse)" in error_of(path)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_large_members_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(tar_shards, "MAX_MEMBER_BYTES", 1000)
    shard = write_tar(tmp_path / name, [("a.bin", b"x" * 5000), ("a.txt", b"x" * 1000)])
    assert texts(shard) == ["x" * 1000]
    write_tar(shard, [("a.txt", b"x" * 1001)])
    assert error_of(shard).startswith(f"{shard}: member 'a.txt' has 1001 bytes, more than the 1000 that are read")


def test_a_decompression_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_shards, "MAX_MEMBER_BYTES", 2**20)
    shard = write_tar(tmp_path / "a.tar.gz", [("a.bin", bytes(2**25)), ("a.txt", b"x")])
    assert "as a decompression bomb does" in error_of(shard)
    incompressible = b"".join(json.dumps({"text": str(i**5)}).encode() for i in range(200_000))
    assert texts(write_tar(tmp_path / "b.tar.gz", [("a.bin", incompressible), ("a.txt", b"x")])) == ["x"]
