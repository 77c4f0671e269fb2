"""Images in one folder a class."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from truthgpt.data.base import ImageExample
from truthgpt.data.file_identity import WHOLE_BYTES, content_fingerprint
from truthgpt.data.paths import at_home, is_visible, visible_files
from truthgpt.errors import DataError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
WHOLE_FILES = 10_000
"""Up to this many images (and 1 GiB) are fingerprinted by content, in about a second; more by name, size and time."""
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


class ImageFolder:
    """Images below `root/<class>/`, at any depth; the folders' names, sorted, are the classes.

    Read are `.jpg .jpeg .png .webp .bmp`, in any case. Hidden files and folders (a leading dot) are left out; other
    files are left out and counted in one line. Several roots are one data set: folders of the same name are one
    class. The key of an image is `<class>/<path below it>`; images of two roots that share a key are always on the
    same side of a train/validation split.

    Args:
        paths: root folders, or globs of them.
        classes: names of the classes, in the order of their labels, where another source has set them: a folder of
            another name is an error, and a class may have no folder. None: the folders found, at least two.

    Raises:
        DataError: no folder at a path, no class folders, a class folder without images, or a class not in `classes`.
    """

    def __init__(self, paths: Sequence[str], classes: Sequence[str] | None = None) -> None:
        roots = _roots(paths)
        found: list[tuple[str, str, Path]] = []
        left_out: Counter[str] = Counter()
        for root in roots:
            found.extend(_images_below(root, left_out))
        # By key alone, so that the same images have the same order wherever the roots lie.
        found.sort(key=lambda image: (image[0], image[1]))
        where = ", ".join(str(root) for root in roots)
        names = sorted({name for name, _, _ in found})
        self.classes: Sequence[str] = _class_names(names, where) if classes is None else list(classes)
        _refuse_unknown(names, self.classes, where)
        labels = {name: label for label, name in enumerate(self.classes)}
        self._keys = [f"{name}/{relative}" for name, relative, _ in found]
        self._labels = [labels[name] for name, _, _ in found]
        self._files = [file for _, _, file in found]
        if left_out:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common(5))
            logger.info("%s: %d files are not images and were left out (%s)", where, left_out.total(), kinds)

    def keys(self) -> Sequence[str]:
        """`<class>/<path below it>` of every image, sorted."""
        return self._keys

    def read(self, index: int) -> ImageExample:
        """Image `index`.

        Raises:
            DataError: the file cannot be read, or is empty.
        """
        file = self._files[index]
        try:
            data = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}; check the file and its permissions") from error
        if not data:
            raise DataError(f"{file}: the file is empty; delete it or write the image again")
        return ImageExample(data, self._labels[index], where=str(file))

    def fingerprint(self) -> str:
        """SHA-256 over the classes, the keys and what the files hold.

        Up to 10,000 images and 1 GiB the files are read. Beyond that, size and modification time of each stand for
        its content: reading a million images at every start would take minutes. An edit then changes the fingerprint
        as surely, and so does a copy that does not keep the times (`cp -a` and `rsync -a` keep them).

        Raises:
            DataError: a file that is gone or cannot be read.
        """
        digest = hashlib.sha256(json.dumps([list(self.classes), self._keys]).encode())
        status = [_status(file) for file in self._files]
        if len(status) <= WHOLE_FILES and sum(size for size, _ in status) <= WHOLE_BYTES:
            digest.update(content_fingerprint(self._files).encode())
        else:
            digest.update(json.dumps(status).encode())
        return digest.hexdigest()


def _roots(paths: Sequence[str]) -> list[Path]:
    """Every folder that `paths` name, once, in their order."""
    roots: dict[Path, Path] = {}
    for path in paths:
        expanded = at_home(path)
        # An existing path wins over its reading as a glob.
        names = [str(expanded)] if expanded.exists() else sorted(glob.glob(str(expanded), recursive=True))  # noqa: PTH207
        folders = [Path(name) for name in names if Path(name).is_dir()]
        if not folders:
            found = "a file" if expanded.is_file() else "nothing there"
            raise DataError(
                f"data path {path!r}: {found} (working directory {Path.cwd()}); give a folder that holds one folder of "
                "images for each class"
            )
        for folder in folders:
            roots.setdefault(folder.resolve(), folder)
    if not roots:
        raise DataError("data path: the list is empty; give a folder that holds one folder of images for each class")
    return list(roots.values())


def _images_below(root: Path, left_out: Counter[str]) -> Iterator[tuple[str, str, Path]]:
    """Class, path below the class folder, and file of every image; other files are counted by suffix."""
    entries = [entry for entry in sorted(root.iterdir()) if is_visible(entry.name)]
    folders = [entry for entry in entries if entry.is_dir()]
    files = [entry for entry in entries if not entry.is_dir()]
    if not folders:
        hint = "images lie in it directly; " if any(_is_image(file.name) for file in files) else ""
        raise DataError(f"{root}: no class folders; {hint}put the images of each class into a folder named after it")
    left_out.update(_kind(file.name) for file in files)
    for folder in folders:
        images = 0
        for file in visible_files(folder):
            if _is_image(file.name):
                images += 1
                yield folder.name, file.relative_to(folder).as_posix(), file
            else:
                left_out[_kind(file.name)] += 1
        if images == 0:
            raise DataError(
                f"{folder}: no image in this class folder; put images ({' '.join(IMAGE_SUFFIXES)}) into it, or delete "
                "the folder"
            )


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _kind(name: str) -> str:
    return Path(name).suffix.lower() or "without a suffix"


def _class_names(found: Sequence[str], where: str) -> Sequence[str]:
    if {name.lower() for name in found} <= _SPLIT_NAMES:
        raise DataError(
            f"{where}: {', '.join(found)} look like splits, not classes; set data.path to the training folder (and "
            "data.validation_path to the other)"
        )
    if len(found) < 2:
        raise DataError(f"{where}: a single class, {found[0]!r}; at least two class folders are needed")
    return found


def _refuse_unknown(found: Sequence[str], classes: Sequence[str], where: str) -> None:
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise DataError(
            f"{where}: {', '.join(unknown[:5])}: no class of the training images, which have "
            f"{', '.join(classes[:5])}{' ...' if len(classes) > 5 else ''}; give the folders the same names"
        )


def _status(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}; check the path and its permissions") from error
    return status.st_size, status.st_mtime_ns
