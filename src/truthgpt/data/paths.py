"""Which files a `data.path` means: shared by the sources that read local files."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from truthgpt.errors import DataError


def resolve_files(patterns: Sequence[str], suffix: str | tuple[str, ...] | None = None) -> list[Path]:
    """Files that `patterns` name, each once, in the order of the patterns and sorted by path within each.

    A pattern is a file, a folder (all files below it, behind links too; hidden ones, whose name starts with a dot, are
    left out), or a glob, where `**` matches any depth. `~` is the home folder.

    Args:
        patterns: files, folders or globs, relative to the working directory.
        suffix: within a folder take only the files that end so, for example `.jsonl`, or in one of several ways;
            None takes all.

    Raises:
        DataError: a pattern that matches no file or a link to nothing, a folder that cannot be read, or no pattern at
            all.
    """
    files: dict[Path, Path] = {}
    for pattern in patterns:
        with _looking_at(pattern):
            matches = list(_match(at_home(pattern), suffix))
        if not matches:
            wanted = f"no {suffix if isinstance(suffix, str) else ' or '.join(suffix)} file" if suffix else "no file"
            raise _nothing_found(pattern, wanted)
        for match in matches:
            files.setdefault(match.resolve(), match)
    if not files:
        raise DataError("data path: the list is empty; give at least one file, folder or glob")
    return list(files.values())


def look_for(pattern: str) -> None:
    """Look whether there is anything at all that `pattern` names, without listing what is in a folder.

    Raises:
        DataError: as `resolve_files`, which wants files of a kind and so may still find none.
    """
    with _looking_at(pattern):
        found = any(match.is_dir() or _is_file(match) for match in _named(at_home(pattern)))
    if not found:
        raise _nothing_found(pattern, "no file")


def at_home(pattern: str) -> Path:
    """The path with `~` as the home folder; `~name` of a user that there is not stands as it is, as in a shell."""
    return Path(os.path.expanduser(pattern))  # noqa: PTH111 - `Path.expanduser` raises for such a name


def file_keys(files: Sequence[Path]) -> list[str]:
    """Name of each file relative to the deepest folder that holds them all, so that moving that folder changes none."""
    resolved = [file.resolve() for file in files]
    common = Path(os.path.commonpath([file.parent for file in resolved]))
    return [file.relative_to(common).as_posix() for file in resolved]


@contextlib.contextmanager
def _looking_at(pattern: str) -> Iterator[None]:
    if not pattern:  # which `Path` takes for the working directory
        raise DataError("data path '': the path is empty; give a file, folder or glob ('.': the working directory)")
    try:
        yield
    except OSError as error:
        raise DataError(f"data path {pattern[:200]!r}: cannot be looked at: {error.strerror}; check it") from error


def _nothing_found(pattern: str, wanted: str) -> DataError:
    return DataError(
        f"data path {pattern!r}: {wanted} found (working directory {Path.cwd()}); give an existing file, "
        "a folder with files in it, or a glob such as 'texts/**/*.txt'"
    )


def _named(path: Path) -> Iterator[Path]:
    """What is there of one pattern. An existing path wins over its reading as a glob (`notes[1].txt`)."""
    # Path.glob takes no absolute pattern and lets `*` match hidden files.
    return iter((path,)) if path.exists() else map(Path, glob.iglob(str(path), recursive=True))  # noqa: PTH207


def _match(path: Path, suffix: str | tuple[str, ...] | None) -> Iterator[Path]:
    """Files of one pattern, sorted."""
    for match in map(Path, sorted(map(str, _named(path)))):
        if match.is_dir():
            yield from _files_below(match, suffix)
        elif _is_file(match):
            yield match


def is_visible(name: str) -> bool:
    """Whether a file or folder found in a folder is taken: not where it is hidden, nor what file systems keep in the
    root of a disk for lost files, which nobody else may read."""
    return not name.startswith(".") and name != "lost+found"


def visible_files(folder: Path) -> Iterator[Path]:
    """Everything below `folder` that is no folder, those behind links too, each folder once; hidden names are left out.

    Raises:
        DataError: a folder that cannot be read: what is in it would be missing silently.
    """
    seen: set[str] = set()
    # os.walk takes a tenth of the time of Path.rglob where there are many files; rglob follows no link.
    for parent, folders, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(filter(is_visible, folders))
        if real not in seen:
            seen.add(real)
            yield from (Path(parent, name) for name in files if is_visible(name))


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}; check its permissions") from error


def _is_file(path: Path) -> bool:
    """Whether it is a file. DataError for a link to nothing, as a download leaves that was not finished."""
    if path.is_symlink() and not path.exists():
        raise DataError(
            f"{path}: a link to {path.readlink()}, which is not there; restore the file, or delete the link"
        )
    return path.is_file()


def _files_below(folder: Path, suffix: str | tuple[str, ...] | None) -> list[Path]:
    return sorted(
        file for file in visible_files(folder) if (suffix is None or file.name.endswith(suffix)) and _is_file(file)
    )
