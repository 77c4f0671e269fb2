"""The source code of the Python standard library: a corpus that every machine has, with no download."""

from __future__ import annotations

import io
import logging
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from truthgpt.data.base import Document, Segment
from truthgpt.data.file_identity import stat_identity
from truthgpt.errors import DataError

logger = logging.getLogger(__name__)

EXCLUDED_NAMES = frozenset({"test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__", "site-packages"})
"""Modules, packages and folders left out: tests, tools and tables say little about how Python is written."""
EXCLUDED_PREFIX = "_sysconfigdata"
"""Build settings of one machine, generated."""


class PythonStdlib:
    """Modules named in `sys.stdlib_module_names`, one document a file, sorted by path.

    The key of a document is its path below the library's folder, so that the split is the same on every machine with
    the same Python version.
    """

    layout: Literal["stream", "rows"] = "stream"

    def documents(self) -> Iterator[Document]:
        """All files in order; files of white space only are left out.

        Raises:
            DataError: this Python has no library source on disk (a frozen or zipped one), or a file is unreadable.
        """
        root = Path(sysconfig.get_path("stdlib"))
        usable = 0
        for key in stdlib_files(root):
            text = _read_python(root / key)
            if text.strip():
                usable += 1
                yield Document(key, (Segment(text),), where=str(root / key))
        if usable == 0:
            raise DataError(
                f"0 usable documents in {root}: this Python comes without the source of its standard library; "
                "use another Python, or data.source: text with data.path"
            )

    def identity(self) -> str:
        """Version of this Python, and paths, sizes and times of the files."""
        root = Path(sysconfig.get_path("stdlib"))
        return f"python_stdlib {sys.version} {stat_identity([root / key for key in stdlib_files(root)])}"


def stdlib_files(root: Path) -> list[str]:
    """Paths of the corpus below `root`, with `/`, sorted."""
    found: list[str] = []
    for name in sys.stdlib_module_names:
        if name in EXCLUDED_NAMES or name.startswith(EXCLUDED_PREFIX):
            continue
        if (root / f"{name}.py").is_file():
            found.append(f"{name}.py")
        for file in (root / name).rglob("*.py"):
            relative = file.relative_to(root)
            if not EXCLUDED_NAMES.intersection(relative.parts):
                found.append(relative.as_posix())
    return sorted(found)


def _read_python(path: Path) -> str:
    """Text of a Python file by the language's own rules: coding line or UTF-8, universal newlines."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError) as error:
        logger.warning("%s: not decodable by its own rules (%s); bytes that are not UTF-8 become U+FFFD", path, error)
        text = data.decode("utf-8", errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")
