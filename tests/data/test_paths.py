from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from truthgpt.data.paths import file_keys, look_for, resolve_files, visible_files
from truthgpt.data.tar_shards import shard_files
from truthgpt.errors import DataError

Read = Callable[[str], object]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.jsonl", "sub/c.txt", "sub/.hidden", ".git/config", "notes[1].txt"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(name)
    return tmp_path


def names(files: list[Path], root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in files]


def test_folder_is_read_to_any_depth_sorted_without_hidden_files(tree: Path) -> None:
    assert names(resolve_files([str(tree)]), tree) == ["a.jsonl", "b.txt", "notes[1].txt", "sub/c.txt"]
    assert names(resolve_files([str(tree)], suffix=".jsonl"), tree) == ["a.jsonl"]


def test_glob_list_and_repeats(tree: Path) -> None:
    assert names(resolve_files([str(tree / "**/*.txt")]), tree) == ["b.txt", "notes[1].txt", "sub/c.txt"]
    found = resolve_files([str(tree / "sub/c.txt"), str(tree / "*.txt"), str(tree / "sub")])
    assert names(found, tree) == ["sub/c.txt", "b.txt", "notes[1].txt"]


def test_folders_behind_links_are_read_once(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "d.txt").write_text("d")
    (elsewhere / "back").symlink_to(tree)
    (tree / "sub/linked").symlink_to(elsewhere)
    (tree / "sub/linked.txt").symlink_to(elsewhere / "e.text")
    (elsewhere / "e.text").write_text("e")
    found = names(resolve_files([str(tree)], suffix=".txt"), tree)
    assert found == ["b.txt", "notes[1].txt", "sub/c.txt", "sub/linked/d.txt", "sub/linked.txt"]
    images = [path.relative_to(tree).as_posix() for path in visible_files(tree)]
    assert sorted(images) == sorted([*found, "a.jsonl", "sub/linked/e.text"])


@pytest.mark.parametrize("pattern", ["", "sub", "sub/*.txt", "sub/gone.txt"])
def test_a_link_to_nothing_is_said(tree: Path, pattern: str) -> None:
    """A file of a data set whose download was not finished is not left out silently."""
    (tree / "sub/gone.txt").symlink_to("../blobs/0123")
    with pytest.raises(DataError, match=r"sub/gone\.txt: a link to \.\./blobs/0123, which is not there"):
        resolve_files([str(tree / pattern)], suffix=".txt")
    assert names(resolve_files([str(tree)], suffix=".jsonl"), tree) == ["a.jsonl"]


def test_a_folder_that_cannot_be_read_is_said(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: the tests may run as root, who may read everything."""
    scandir = os.scandir

    def refused(path: str) -> object:
        if Path(path).name in ("sub", "lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    (tree / "lost+found").mkdir()  # of which a disk has one that only root may read
    with pytest.raises(DataError, match="sub: cannot be read: Permission denied; check its permissions"):
        resolve_files([str(tree)])
    (tree / "sub").rename(tree / "other")
    assert names(resolve_files([str(tree)], suffix=".jsonl"), tree) == ["a.jsonl"]


def test_relative_to_working_directory(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    assert resolve_files(["sub", "*.jsonl"]) == [Path("sub/c.txt"), Path("a.jsonl")]


def test_an_existing_name_with_brackets_is_no_glob(tree: Path) -> None:
    assert names(resolve_files([str(tree / "notes[1].txt")]), tree) == ["notes[1].txt"]


@pytest.mark.parametrize("read", [look_for, lambda path: resolve_files([path]), lambda path: shard_files([path])])
def test_the_home_of_a_user_that_there_is_not(tree: Path, monkeypatch: pytest.MonkeyPatch, read: Read) -> None:
    """`Path.expanduser` raises a RuntimeError for it, which no command expects."""
    monkeypatch.chdir(tree)
    monkeypatch.setenv("HOME", str(tree / "sub"))
    assert resolve_files(["~/c.txt"]) == [tree / "sub/c.txt"]
    with pytest.raises(DataError, match=r"data path '~nobody-of-this-name/x\.tar': no file found"):
        read("~nobody-of-this-name/x.tar")


@pytest.mark.parametrize("pattern", ["missing.txt", "*.csv", "empty"])
def test_nothing_found_names_the_pattern(tree: Path, pattern: str) -> None:
    (tree / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file found.*a folder"):
        resolve_files([str(tree / "b.txt"), str(tree / pattern)])
    with pytest.raises(DataError, match="list is empty"):
        resolve_files([])


@pytest.mark.parametrize(("pattern", "said"), [("", "the path is empty"), ("a long name " * 50, "cannot be looked at")])
def test_what_is_no_path_is_said(tree: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, said: str) -> None:
    """An empty one (`data.path=$UNSET`) is not the working directory."""
    monkeypatch.chdir(tree)
    with pytest.raises(DataError, match=said):
        resolve_files([pattern])


def test_keys_do_not_depend_on_where_the_folder_stands(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    keys = file_keys(resolve_files([str(tree)]))
    moved = tmp_path_factory.mktemp("moved") / "there"
    tree.rename(moved)
    assert file_keys(resolve_files([str(moved)])) == keys == ["a.jsonl", "b.txt", "notes[1].txt", "sub/c.txt"]
