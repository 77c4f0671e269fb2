"""Opening a dataset with the `datasets` library: hub names, local folders and local files, errors made clear.

No code of a dataset is ever run: the library has no dataset scripts any more, and only formats it reads without pickle
are let through.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truthgpt.data.compressed_file import ArchiveError, open_binary
from truthgpt.data.file_identity import READ_BYTES, content_fingerprint, stat_identity
from truthgpt.data.hf_columns import PARQUET_BATCH_ROWS, column_options
from truthgpt.data.hf_diagnosis import find_mistake, format_suffix, is_json_lines
from truthgpt.data.paths import resolve_files
from truthgpt.errors import ConfigError, DataError, Problem
from truthgpt.runtime.hub import cache_when_unreachable

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, IterableDataset

logger = logging.getLogger(__name__)

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {"batch_size": PARQUET_BATCH_ROWS}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".arrow": ("arrow", {}),
}
"""How files of `data.path` are read, by their ending: the library's builder and its options."""
COMPRESSED_FORMATS = (".csv", ".tsv", ".json", ".jsonl")
SUFFIXES = (*FORMATS, *(f"{suffix}{packed}" for suffix in COMPRESSED_FORMATS for packed in (".gz", ".zst")))
SETTINGS_OF_ANY_FILE = (
    *("name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter"),
    *("converters", "keep_default_na", "na_values"),
)
"""Settings of the library's builders that leave JSON what it is, and CSV but for its delimiter."""
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def import_datasets() -> Any:
    """The `datasets` library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise _problem("source", "hf needs the package datasets", "pip install 'truthgpt[hf]'") from error
    return datasets


@dataclass(frozen=True)
class HfLocation:
    """Where a dataset is: `dataset` (a hub name or a local folder) or `path` (local files), and which split of it; of
    files in `path`, which `columns` are read, as far as they are there (none named: all of them)."""

    dataset: str | None
    subset: str | None
    split: str
    path: tuple[str, ...] | None
    columns: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The dataset as messages call it."""
        first = self.dataset or (self.path or ("",))[0]
        more = f" and {len(self.path) - 1} more paths" if self.path and len(self.path) > 1 else ""
        return f"{first}{more}[{self.split}]"

    def check(self) -> None:
        """Refuse what can be refused without reading anything.

        Raises:
            ConfigError: not exactly one of dataset and path, or a name that is neither a folder nor one of the hub.
        """
        if (self.dataset is None) == (not self.path):
            raise _problem("dataset", "source: hf reads either data.dataset or data.path", "set exactly one of them")
        if self.path and self.subset is not None:
            raise _problem("subset", "files of data.path have no subsets", "remove data.subset, or set data.dataset")
        if self.dataset is None or self._folder() is not None:
            return
        if not HUB_NAME.fullmatch(self.dataset):
            if "://" not in self.dataset and Path(self.dataset).suffix not in FORMATS:
                raise DataError(f"data.dataset {self.dataset!r}: no such folder; give a folder, or a name of the hub")
            raise _problem(
                "dataset",
                f"{self.dataset!r} is neither a local folder nor a name of the hub such as openai/gsm8k",
                "single files are given as data.path",
            )
        from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

        if self.dataset in _PACKAGED_DATASETS_MODULES:
            # `datasets` would read every file below the working directory, with `pandas` even as pickles.
            raise _problem("dataset", f"{self.dataset!r} is a file format", "give the files as data.path")

    def files(self) -> list[Path] | None:
        """The local files of the dataset; None for one of the hub.

        Raises:
            DataError: a path that matches no file.
        """
        if self.path:
            return resolve_files(self.path, suffix=SUFFIXES)
        folder = self._folder()
        return None if folder is None else resolve_files([str(folder)])

    def is_json_lines(self) -> bool:
        """Whether all of it is files of JSON Lines in `path`, which need no library. `.json` files are looked into.

        Raises:
            DataError: a path that matches no file.
        """
        if not self.path or self.dataset or self.subset or self.split != "train":
            return False
        return all(is_json_lines(file) for file in self.files() or ())

    def saved_folder(self) -> Path | None:
        """The folder, when it was written by `save_to_disk`."""
        folder = self._folder()
        saved = folder is not None and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
        return folder if saved else None

    def _folder(self) -> Path | None:
        folder = Path(self.dataset or "").expanduser()
        return folder if self.dataset and folder.is_dir() else None


def open_stored(location: HfLocation) -> Dataset:
    """The split as a dataset with random access; what is not stored as Arrow yet is converted once, into the cache.

    Raises:
        ConfigError: no such subset or split.
        DataError: not found, not readable, or not reachable.
    """
    if location.saved_folder() is not None:
        return _load_saved(location)
    builder = _open_builder(location)
    with reading(location.name, location):
        builder.download_and_prepare()
        splits = list(builder.info.splits or ())
        try:
            return builder.as_dataset(location.split)
        except ValueError as error:
            if location.split in splits:  # the library keeps no files for a split without rows
                raise no_rows(location.name) from error
            raise _unknown_split(location, splits) from error


def open_stream(location: HfLocation) -> IterableDataset:
    """The split as a dataset that is read from its files while it is iterated.

    Raises:
        ConfigError: no such subset or split.
        DataError: not found, not readable, or not reachable.
    """
    builder = _open_builder(location)
    with reading(location.name, location):
        splits = builder.as_streaming_dataset()
        if location.split not in splits:
            raise _unknown_split(location, list(splits))
        return splits[location.split]


def dataset_identity(location: HfLocation) -> str:
    """Text that changes with the files' places, sizes and times, or with the version of a hub dataset.

    Raises:
        ConfigError, DataError: as `open_stored`.
    """
    files = location.files()
    state = stat_identity(files) if files is not None else _hub_version(location)
    return f"hf {import_datasets().__version__} {location} {state}"


def dataset_fingerprint(location: HfLocation) -> str:
    """Digest of the files' names and contents, or of the version of a hub dataset, and of subset and split.

    Raises:
        ConfigError, DataError: as `open_stored`.
    """
    files = location.files()
    state = content_fingerprint(files) if files is not None else _hub_version(location)
    return hashlib.sha256(json.dumps([location.subset, location.split, state]).encode()).hexdigest()


@contextmanager
def reading(name: str, location: HfLocation | None = None) -> Iterator[None]:
    """Turn what `datasets` raises while opening or reading `name` into a DataError; its progress bars are off, and so
    is the line that its readers of files log before they raise.

    With `location` its files are the cause, and parsed again to say where the mistake is.
    """
    datasets = import_datasets()
    import pyarrow
    from huggingface_hub.errors import HfHubHTTPError

    bars_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    readers = logging.getLogger("datasets.packaged_modules")
    level = readers.level
    readers.setLevel(logging.CRITICAL)
    try:
        yield
    except StopIteration as error:
        raise no_rows(name) from error
    # The bases of HfHubHTTPError are the base error of the HTTP library in use (it has changed once) and OSError.
    except (
        *HfHubHTTPError.__bases__,
        datasets.exceptions.DatasetsError,
        pyarrow.ArrowException,
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
        ImportError,
        TypeError,  # a number among the objects of a JSON array
    ) as error:
        if "BatchSize must be greater than 0" in _reason(error):  # what a parquet file without rows ends in
            raise no_rows(name) from error
        mistake = None if location is None else _find_mistake(location)
        raise DataError(mistake or f"{name}: cannot be read: {_reason(error)}") from error
    finally:
        readers.setLevel(level)
        if not bars_off:
            datasets.enable_progress_bars()


def no_rows(name: str) -> DataError:
    """The error of files that hold nothing."""
    return DataError(f"0 usable documents in {name}: there are no rows; set data.path to files with rows in them")


def _check_archives(files: Sequence[Path]) -> None:
    """Read `.zst` files to their end: the library takes a truncated one for a shorter one."""
    for file in files:
        if file.suffix == ".zst":
            try:
                with open_binary(file) as content:
                    while content.read(READ_BYTES):
                        pass
            except ArchiveError as error:
                raise DataError(f"{file}: {error}; copy or download the file again") from error


def _open_builder(location: HfLocation) -> DatasetBuilder:
    with reading(location.name):
        builder = _load_builder(location)
        _check_archives(_data_files(location, builder))
    return builder


def _data_files(location: HfLocation, builder: DatasetBuilder) -> list[Path]:
    """The local files that the library reads, as messages call them; none for a dataset of the hub."""
    called = {file.resolve(): file for file in location.files() or ()}
    names = [name for names in (builder.config.data_files or {}).values() for name in names]
    return [called[file] for file in (Path(name).resolve() for name in names) if file in called]


def _find_mistake(location: HfLocation) -> str | None:
    """What is wrong, and where, in the first of the local files that is no valid JSON or CSV; None where none is."""
    if location.files() is None:
        return None
    builder = _open_builder(location)
    default = type(builder.config)()
    for name, value in vars(builder.config).items():
        if name not in SETTINGS_OF_ANY_FILE and value != getattr(default, name):
            return None  # a folder's README may say that it holds JSON or CSV of another kind
    for file in _data_files(location, builder):
        mistake = find_mistake(file, getattr(builder.config, "sep", ","))
        if mistake is not None:
            return mistake
    return None


def _load_builder(location: HfLocation) -> DatasetBuilder:
    datasets = import_datasets()
    location.check()
    if location.path:
        kind, options, files = _files_of_one_kind(location.files() or [])
        if location.columns:
            options = {**options, **column_options(kind, location.columns, files, options.get("sep", ","))}
        patterns = [glob.escape(str(file.resolve())) for file in files]
        return datasets.load_dataset_builder(kind, data_files={"train": patterns}, **options)
    folder = location._folder()
    with ExitStack() as stack:
        if folder is None:
            stack.enter_context(_cache_when_unreachable(location.name))
        source = location.dataset if folder is None else str(folder.resolve())
        try:
            return datasets.load_dataset_builder(source, location.subset)
        except ValueError as error:
            # "BuilderConfig 'x' not found. Available: [...]", or "Config name is missing. Please pick one among ...".
            if "BuilderConfig" in str(error) or "Config name" in str(error):
                raise _problem("subset", f"{location.dataset}: {_reason(error)}", "set data.subset to one") from error
            raise


def _files_of_one_kind(files: Sequence[Path]) -> tuple[str, dict[str, Any], Sequence[Path]]:
    kinds: dict[str, Path] = {}
    for file in files:
        kinds.setdefault(format_suffix(file), file)
    for suffix, file in kinds.items():
        if suffix not in FORMATS:
            raise _problem("path", f"{file}: hf reads files ending in {', '.join(SUFFIXES)}", "use another data.source")
    if len({FORMATS[suffix][0] for suffix in kinds}) > 1 or {".csv", ".tsv"} <= set(kinds):
        raise _problem("path", f"files of one kind are needed, found {', '.join(sorted(kinds))}", "name one kind only")
    kind, options = FORMATS[next(iter(kinds))]
    return kind, options, files


def _load_saved(location: HfLocation) -> Dataset:
    """What `save_to_disk` wrote: one dataset, or a folder for each split."""
    datasets = import_datasets()
    folder = location.saved_folder()
    if location.subset is not None:
        raise _problem("subset", f"{location.dataset} was saved without subsets", "remove data.subset")
    with reading(location.name):
        saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if location.split not in saved:
            raise _unknown_split(location, list(saved))
        return saved[location.split]
    if location.split not in ("train", str(saved.split)):
        raise _unknown_split(location, [str(saved.split) if saved.split else "train"])
    return saved


def _hub_version(location: HfLocation) -> str:
    builder = _open_builder(location)
    return f"{builder.dataset_name} {builder.config_id} {builder.hash}"


@contextmanager
def _cache_when_unreachable(name: str) -> Iterator[None]:
    """`cache_when_unreachable` for the library, which has a switch of its own."""
    import datasets
    from huggingface_hub import constants

    if datasets.config.HF_HUB_OFFLINE:
        yield
        return
    with cache_when_unreachable(name):
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE
        try:
            yield
        finally:
            datasets.config.HF_HUB_OFFLINE = False


def _reason(error: BaseException) -> str:
    """What went wrong, in one line: "An error occurred while generating the dataset" has it in its cause."""
    cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    text = " ".join(str(cause).split()) or type(cause).__name__
    if isinstance(error, ConnectionError):
        text += " and the cache holds no copy; connect, or give local files as data.path"
    return text


def _unknown_split(location: HfLocation, splits: Sequence[str]) -> ConfigError:
    hint = f"there is {', '.join(splits) or 'none'}"
    if "[" in location.split:
        hint += "; a part of a split is for streaming: false"
    place = location.dataset or ", ".join(location.path or ())
    return _problem("split", f"{place} has no split {location.split!r}", hint)


def _problem(key: str, message: str, suggestion: str) -> ConfigError:
    return ConfigError([Problem(key=f"data.{key}", message=message, suggestion=suggestion)])
