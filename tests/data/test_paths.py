from __future__ import annotations

from pathlib import Path

import pytest

from truthgpt.data.paths import file_keys, resolve_files
from truthgpt.errors import DataError


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


def test_relative_to_working_directory(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    assert resolve_files(["sub", "*.jsonl"]) == [Path("sub/c.txt"), Path("a.jsonl")]


def test_an_existing_name_with_brackets_is_no_glob(tree: Path) -> None:
    assert names(resolve_files([str(tree / "notes[1].txt")]), tree) == ["notes[1].txt"]


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
