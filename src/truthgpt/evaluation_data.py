"""What a trained model is evaluated on: the validation split of its run, or other data that is named. Layer 4."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from truthgpt.config.data_section import DataConfig, MixedSource
from truthgpt.config.load import Origin, RawConfig, load_raw
from truthgpt.config.schema import Config
from truthgpt.errors import ConfigError, Problem
from truthgpt.factories.datasets import BUNDLES, DATASETS, KEYS, reads
from truthgpt.validate_config import validate_config

logger = logging.getLogger(__name__)

_READ = ("data", "hardware", "eval.metrics", "training.eval_batch_size", "training.mixed_precision")
"""What an evaluation reads of a configuration: sections, and keys of others."""
_NAMES_DATA = {"source", "sources", "dataset", "subset", "split", "path"}
_PLACES = ("dataset", "subset", "split", "path")
"""Keys that say where the documents of a source are."""
_HELD_OUT = ("validation_path", "validation_split", "validation_fraction")
_ENDINGS = {"jsonl": (".jsonl", ".json"), "hf": (".parquet", ".csv", ".tsv", ".arrow"), "webdataset": (".tar",)}


@dataclass(frozen=True)
class EvaluationData:
    """A configuration of which only the data, the metrics and the machine are read.

    Attributes:
        what: what is evaluated, in words.
        sized: `data.max_seq_len` is somebody's choice, not a default.
    """

    config: Config
    what: str
    sized: bool


def own_config(target: Path) -> Path | None:
    """The `config.yaml` of the run that `target`, a run, its model folder or a checkpoint of it, belongs to."""
    places = (target, target.parent, target.parent.parent)
    return next((folder / "config.yaml" for folder in places if (folder / "config.yaml").is_file()), None)


def names_data(overrides: Sequence[str]) -> bool:
    """Whether one of `overrides` says what is to be evaluated."""
    return bool(_named(overrides) & {*_NAMES_DATA, *_HELD_OUT})


def evaluation_data(
    target: Path,
    base: str | None,
    overrides: Sequence[str] = (),
    metrics: Sequence[str] | None = None,
    loaded_plugins: frozenset[str] = frozenset(),
) -> EvaluationData:
    """The configuration `base`, or else that of the run of `target`, with `overrides`.

    Overrides that name other data (`data.path`, `data.source`, `data.dataset`, `data.split` ...) name what is
    evaluated, all of it; nothing is held out. What they leave open is as in the base, save what describes its source
    where another one is named.

    Args:
        base: a YAML file or a preset.
        overrides: `key=value`; of the keys that an evaluation reads.
        metrics: their names, instead of those of the base.

    Raises:
        ConfigError: every problem found.
    """
    named = _named(overrides)
    found = base or own_config(target)
    if found is None and not target.exists():
        raise ConfigError(f"{target} does not exist; give a run directory, a checkpoint or a Hugging Face folder")
    if found is None and not named & _NAMES_DATA:
        raise ConfigError(
            f"{target} lies in no run directory: name what to evaluate it on, data.path=FILE, or --config YAML"
        )
    raw = load_raw(None if found is None else str(found), overrides)
    given = raw.data.get("data", {})
    if isinstance(given, dict):
        if base is None and "chat_template" not in named:
            given = {key: value for key, value in given.items() if key != "chat_template"}  # the tokenizer has it
        raw = replace(raw, data={**raw.data, "data": _renamed(given, named)})
    if metrics is not None:
        raw = _measuring(raw, metrics)
    try:
        config = validate_config(_ranked_by_loss(raw), loaded_plugins)
    except ConfigError as error:
        raise ConfigError([_of_option(problem, metrics) for problem in error.problems]) from None
    return EvaluationData(config, _what(config.data, named), found is not None or "max_seq_len" in named)


def fit_context(data: EvaluationData, context: int | None) -> Config:
    """The configuration with samples that a model of `context` positions takes; None: any number.

    Raises:
        ConfigError: `data.max_seq_len` was chosen, and is more.
    """
    config, length = data.config, data.config.data.max_seq_len
    if context is None or length <= context:
        return config
    if data.sized:
        message = f"{length} is more than the {context} positions that the model has"
        raise ConfigError([Problem("data.max_seq_len", message, suggestion=f"set it to at most {context}")])
    logger.info("data.max_seq_len is %d, the positions that the model has", context)
    return config.model_copy(update={"data": config.data.model_copy(update={"max_seq_len": context})})


def _named(overrides: Sequence[str]) -> set[str]:
    """The keys of `data` that `overrides` name.

    Raises:
        ConfigError: an override that an evaluation does not read.
    """
    keys = [override.partition("=")[0].strip() for override in overrides]
    unread = [key for key in keys if not any(key == read or key.startswith(f"{read}.") for read in _READ)]
    if unread:
        hint = f"eval reads {', '.join(_READ[:2])} and {', '.join(_READ[2:])}"
        raise ConfigError([Problem(key=key, message="is not read by eval", suggestion=hint) for key in unread])
    return {key.split(".")[1] for key in keys if key.startswith("data.")}


def _renamed(given: dict[str, Any], named: set[str]) -> dict[str, Any]:
    """The section `data` as the base has it, changed by what `named` keys say."""
    if not named & _NAMES_DATA:
        return given
    data = dict(given)
    if "sources" in named:
        data.pop("source", None)
    elif named & {"source", "path", "dataset"}:
        data.pop("sources", None)
        data.pop("mix_by", None)
    if "source" not in named and "sources" not in named:
        _choose_source(data, named)
    _forget_other_source(data, named)
    if not named & set(_HELD_OUT):
        _hold_out_all(data)
    return data


def _choose_source(data: dict[str, Any], named: set[str]) -> None:
    """A source that reads the path that is named: the base's, or else by its ending. `text` reads any file, rows with
    their braces and names too, so a file of rows is not for it."""
    entry = DATASETS.entry(_type(data)) if _type(data) in DATASETS else None
    if "dataset" in named:
        data["source"] = "hf"
    elif "path" in named and entry is not None:
        first = data["path"][0] if isinstance(data["path"], list) and data["path"] else data["path"]
        name = str(first).removesuffix(".gz").removesuffix(".zst")
        by_ending = next((source for source, ends in _ENDINGS.items() if name.endswith(ends)), "text")
        if not reads(entry, "path") or _type(data) == "text" != by_ending:
            data["source"] = by_ending
            logger.info("data.source is %s, by the name of %s", by_ending, first)


def _forget_other_source(data: dict[str, Any], named: set[str]) -> None:
    """Take out what the base says about documents that are not read: where they are, and what no source reads."""
    places = _PLACES if named & {"source", "sources", "path", "dataset"} else ()
    forgotten = {*places, *_HELD_OUT, "streaming", "shuffle_window"} - named
    items = data.get("sources") or [data]
    types = [_type(item) for item in items if isinstance(item, dict)]
    entries = [DATASETS.entry(name) for name in types if name in DATASETS]
    if len(entries) == len(items):
        forgotten |= {key for key in KEYS if not any(reads(entry, key) for entry in entries)} - named
        if not any(reads(entry, BUNDLES["rows"][0]) for entry in entries):
            forgotten |= {"chat_template"} - named
    for key in forgotten:
        data.pop(key, None)


def _hold_out_all(data: dict[str, Any]) -> None:
    """All documents that are named are validation documents; a source without a place keeps its validation split."""
    for item in [data, *(item for item in data.get("sources") or [] if isinstance(item, dict))]:
        split = item.get("split") or data.get("split")
        has_splits = _type(item) in DATASETS and reads(DATASETS.entry(_type(item)), "split")
        # Files have one split, of which a part may be named.
        if item.get("path") is not None and not (split and has_splits):
            item["validation_path"] = item["path"]
        elif item.get("path") is not None or item.get("dataset") is not None:
            item["validation_split"] = split or "train"


def _type(source: dict[str, Any]) -> str:
    """Name of a source, as written in `data` or in an item of `data.sources`."""
    found = source.get("source", DataConfig().source.type)
    return str(found.get("type")) if isinstance(found, dict) else str(found)


def _measuring(raw: RawConfig, metrics: Sequence[str]) -> RawConfig:
    """`raw` with other metrics, which no file names."""
    origins = {path: origin for path, origin in raw.origins.items() if path[:1] != ("eval",)}
    return replace(raw, data={**raw.data, "eval": {"metrics": list(metrics)}}, origins={**origins, ("eval",): Origin()})


def _of_option(problem: Problem, metrics: Sequence[str] | None) -> Problem:
    """The problem as one of `--metrics`, where that is what it is about."""
    given = metrics is not None and problem.file is None and problem.key.startswith("eval.metrics")
    return replace(problem, key="--metrics") if given else problem


def _ranked_by_loss(raw: RawConfig) -> RawConfig:
    """Nothing is selected by an evaluation, so that any metrics may be asked for."""
    section = raw.data.get("eval", {})
    if not isinstance(section, dict):
        return raw
    return replace(raw, data={**raw.data, "eval": {**section, "select_best_by": "loss"}})


def _what(data: DataConfig, named: set[str]) -> str:
    parts: Sequence[DataConfig | MixedSource] = data.sources or [data]
    whole = any(part.validation_path is not None or part.validation_split is not None for part in parts)
    if whole and named & _NAMES_DATA and not named & set(_HELD_OUT):
        places = [place for part in parts for place in part.path or [str(part.dataset)]]
        return f"all documents of {', '.join(places)}"
    return f"the validation documents of {'data.sources' if data.sources else data.source.type}"
