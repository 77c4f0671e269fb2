"""Rules between keys: what is valid alone and wrong together. Layer 4; never imports torch."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from truthgpt.config.data_section import DataConfig, MixedSource
from truthgpt.config.load import shown
from truthgpt.config.schema import Config, LoraConfig
from truthgpt.config.strict_yaml import KeyPath
from truthgpt.factories.collate import COLLATORS
from truthgpt.factories.datasets import DATASETS, KEYS, reads
from truthgpt.factories.metrics import METRICS
from truthgpt.factories.optimizer import OPTIMIZERS, SCHEDULE_FREE
from truthgpt.factories.registry import Entry, accepts

_IMAGES = "image_classification"


@dataclass(frozen=True)
class Broken:
    """A rule that is broken. `depends` are the other keys the verdict rests on."""

    path: KeyPath
    message: str
    suggestion: str | None = None
    depends: tuple[KeyPath, ...] = ()


def broken_rules(config: Config, loaded_plugins: frozenset[str]) -> Iterator[Broken]:
    """Every rule that `config` breaks.

    Args:
        loaded_plugins: names of the plugin modules that are imported.
    """
    yield from _model_rules(config)
    yield from _optimizer_rules(config)
    for rule in (_source_rules, _format_rules, _reading_rules, _batch_rules, _image_rules):
        yield from rule(config)
    yield from _evaluation_rules(config)
    yield from _plugin_rules(config, loaded_plugins)


def _model_rules(config: Config) -> Iterator[Broken]:
    model = config.model
    name, init, model_type = ("model", "name_or_path"), ("model", "init"), ("model", "config", "model_type")
    if model.name_or_path is None and model.init == "pretrained":
        yield Broken(name, "missing; init: pretrained needs it", "give a Hub id or a local folder", (init,))
    elif model.name_or_path is None and "model_type" not in model.config:
        fix = "set it, or model.name_or_path, or `extends: llm_default`"
        yield Broken(model_type, "missing; a model from scratch needs it", fix, (init, name, ("extends",)))
    elif "model_type" in model.config and not isinstance(model.config["model_type"], str):
        found = shown(model.config["model_type"])
        yield Broken(model_type, f"must be the name of a transformers model type; found {found}")
    if model.config.get("output_router_logits"):
        message = "true asks for the routers' balancing loss, and the loss is cross-entropy alone"
        yield Broken(("model", "config", "output_router_logits"), message, "leave it out")
    tokenizer = model.tokenizer
    kind = ("model", "tokenizer", "type")
    for key, owner in (("vocab_size", "bpe"), ("path", "path")):
        value = getattr(tokenizer, key)
        if value is None and tokenizer.type == owner:
            yield Broken(("model", "tokenizer", key), f"missing; type: {owner} needs it", None, (kind,))
        elif value is not None and tokenizer.type != owner:
            message = f"is for type: {owner} only; the type is {tokenizer.type}"
            yield Broken(("model", "tokenizer", key), message, f"leave it out, or set type: {owner}", (kind,))
    if model.kv_cache.type == "none" and model.kv_cache.block_size != type(model.kv_cache)().block_size:
        message = "is not read by kv_cache.type: none"
        yield Broken(("model", "kv_cache", "block_size"), message, "leave it out", (("model", "kv_cache", "type"),))
    yield from _weight_rules(config)
    yield from _float8_rules(config)
    yield from _lora_rules(config)


def _lora_rules(config: Config) -> Iterator[Broken]:
    model = config.model
    lora, enabled, targets = model.lora, ("model", "lora", "enabled"), ("model", "lora", "target_modules")
    if not lora.enabled:
        for key in LoraConfig.model_fields:
            if getattr(lora, key) != getattr(LoraConfig(), key):
                fix = "leave it out, or set enabled: true"
                yield Broken(("model", "lora", key), "is read with model.lora.enabled: true only", fix, (enabled,))
        return
    if model.task != "causal_lm":
        message = f"true is for task: causal_lm; the task is {model.task}"
        yield Broken(enabled, message, "set it to false: all weights are trained", (("model", "task"),))
    if "all-linear" in lora.target_modules and len(lora.target_modules) > 1:
        yield Broken(targets, "all-linear takes all layers, and others stand beside it", "leave the others out")
    if lora.method == "dora" and config.training.weights != "float32":
        weights = config.training.weights
        message = f"dora needs its magnitudes in float32; training.weights is {weights}"
        yield Broken(("model", "lora", "method"), message, "set weights: float32", (("training", "weights"),))
    scratch = model.init == "scratch" or model.name_or_path is None
    if lora.quantization != "none" and scratch:
        message = f"{lora.quantization} is for a pretrained model; this one starts from random weights"
        fix = "set it to none, or give model.name_or_path"
        yield Broken(("model", "lora", "quantization"), message, fix, (("model", "init"), ("model", "name_or_path")))


def _weight_rules(config: Config) -> Iterator[Broken]:
    weights, path = config.training.weights, ("training", "weights")
    if weights == "float32":
        return
    if config.training.mixed_precision != "bf16":
        message = f"{weights} is for mixed_precision: bf16; it is {config.training.mixed_precision}"
        yield Broken(path, message, "set weights: float32", (("training", "mixed_precision"),))
    optimizer = config.optimizer.type
    if optimizer in OPTIMIZERS and not accepts(OPTIMIZERS.entry(optimizer).build, "weights"):
        message = f"{weights} needs an optimizer that keeps such weights; {optimizer} does not"
        yield Broken(path, message, "set weights: float32, or optimizer.type: adamw", (("optimizer", "type"),))


def _float8_rules(config: Config) -> Iterator[Broken]:
    float8, path, fix = config.training.float8, ("training", "float8"), "set float8: none"
    if float8 == "none":
        return
    if config.training.mixed_precision != "bf16":
        message = f"{float8} is for mixed_precision: bf16; it is {config.training.mixed_precision}"
        yield Broken(path, message, fix, (("training", "mixed_precision"),))
    if config.model.lora.enabled:
        message = f"{float8} is for training all weights; model.lora.enabled is true"
        yield Broken(path, message, fix, (("model", "lora", "enabled"),))
    if config.model.task == _IMAGES:
        yield Broken(path, f"{float8} is for task: causal_lm; the task is {_IMAGES}", fix, (("model", "task"),))


def _optimizer_rules(config: Config) -> Iterator[Broken]:
    if config.optimizer.type != SCHEDULE_FREE:
        return
    scheduler, depends = config.training.scheduler.type, (("optimizer", "type"),)
    if scheduler != "constant":
        message = f"{scheduler} changes the learning rate, and {SCHEDULE_FREE} is for one that stays"
        yield Broken(("training", "scheduler"), message, "set training.scheduler: constant", depends)
    if config.ema.enabled:
        message = f"true beside {SCHEDULE_FREE}, which keeps an average of its own, used where EMA's would be"
        yield Broken(("ema", "enabled"), message, "set ema.enabled: false", depends)


# --- the data: which keys its sources read ---------------------------------------------------------------------------


def _source_rules(config: Config) -> Iterator[Broken]:
    """A key that a source needs is there, and none is set that no source reads."""
    data = config.data
    if not data.sources:
        if data.source.type in DATASETS:
            entry = DATASETS.entry(data.source.type)
            yield from _missing_keys(data, entry, None, ("data",))
            yield from _unread_keys(data, [entry], ("data", "source"))
        return
    if data.source.type != DataConfig().source.type:
        yield Broken(("data", "source"), "is not read beside data.sources", "leave it out", (("data", "sources"),))
    entries = [(i, item, DATASETS.entry(item.source)) for i, item in enumerate(data.sources) if item.source in DATASETS]
    for index, item, entry in entries:
        path = ("data", "sources", index)
        yield from _missing_keys(data, entry, item, path)
        for key in MixedSource.model_fields:
            if key in KEYS and getattr(item, key) is not None and not reads(entry, key):
                yield Broken((*path, key), f"is not read by data source {entry.name}", "leave it out")
    yield from _unread_keys(data, [entry for _, _, entry in entries], ("data", "sources"))
    yield from _shared_validation_rule(data, entries)
    weights = [item.weight is None for item in data.sources]
    if any(weights) and not all(weights):
        first = weights.index(True)
        yield Broken(("data", "sources", first), "has no weight, and another source has one", "give all or none one")


def _missing_keys(data: DataConfig, entry: Entry, item: MixedSource | None, path: KeyPath) -> Iterator[Broken]:
    source = (*path, "source")
    values = {key: getattr(data, key) for key in KEYS}
    if item is not None:
        values |= {key: getattr(item, key) for key in KEYS if getattr(item, key, None) is not None}
    for key in KEYS:
        if values[key] is None and _required(entry.build, key):
            yield Broken((*path, key), f"missing; data source {entry.name} needs it", None, (source,))
    either = [key for key in ("dataset", "path") if accepts(entry.build, key)]
    given = [key for key in either if values[key] is not None]
    if len(either) == 2 and len(given) != 1:
        what = "missing; give data.dataset or data.path" if not given else "is set beside data.path; one is read"
        yield Broken((*path, "dataset"), f"{what} (data source {entry.name})", None, (source,))
    for key, needed in (("validation_split", "split"), ("validation_path", "path")):
        if getattr(item or data, key) is not None and not accepts(entry.build, needed):
            yield Broken((*path, key), f"is not read by data source {entry.name}", "leave it out", (source,))


def _shared_validation_rule(data: DataConfig, entries: list[tuple[int, MixedSource, Entry]]) -> Iterator[Broken]:
    """Validation files of a whole mixture are read by its first source that has no validation documents of its own."""
    if data.validation_path is None:
        return
    path, depends = ("data", "validation_path"), (("data", "sources"),)
    without = [entry for _, item, entry in entries if item.validation_path is None and item.validation_split is None]
    if not without:
        yield Broken(path, "is not read: all sources have validation documents of their own", "leave it out", depends)
    elif not reads(without[0], "path"):
        message = (
            f"is read by the first source without validation documents of its own, and {without[0].name} reads no files"
        )
        yield Broken(path, message, "put a source that reads them before it", depends)


def _unread_keys(data: DataConfig, entries: list[Entry], source: KeyPath) -> Iterator[Broken]:
    """Keys of `data` set to something else than their default that none of the sources reads."""
    names = " and ".join(dict.fromkeys(entry.name for entry in entries))
    for key in KEYS:
        if any(reads(entry, key) for entry in entries):
            continue
        if getattr(data, key) != DataConfig.model_fields[key].default:
            readers = [other.name for other in DATASETS if reads(other, key)]
            fix = f"leave it out, or set data.source to {' or '.join(readers)}" if readers else "leave it out"
            yield Broken(("data", key), f"is not read by data source {names}", fix, (source,))


def _required(builder: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(builder).parameters
    return name in parameters and parameters[name].default is inspect.Parameter.empty


# --- the data: what rows hold, and how they are read and batched -----------------------------------------------------


def _format_rules(config: Config) -> Iterator[Broken]:
    """`train_on` fits the format, for `data` itself and for every source of a mixture; so does the chat template."""
    data = config.data
    formats = set()
    for index, item in enumerate(data.sources or [None]):
        path: KeyPath = ("data",) if item is None else ("data", "sources", index)
        row_format = (item and item.format) or data.format
        train_on = (item and item.train_on) or data.train_on
        formats.add(row_format)
        for wanted, needed in (("completion", "prompt_completion"), ("assistant", "chat")):
            if train_on == wanted and row_format != needed:
                message = f"{wanted} needs format: {needed}; the format is {row_format}"
                yield Broken((*path, "train_on"), message, f"set data.format: {needed}", (("data", "format"),))
    if data.chat_template is not None and "chat" not in formats:
        yield Broken(("data", "chat_template"), "is for format: chat only", "leave it out", (("data", "format"),))


def _reading_rules(config: Config) -> Iterator[Broken]:
    """Streaming, and the keys that only it or only a mixture reads."""
    data, streaming = config.data, ("data", "streaming")
    if data.streaming and config.training.max_steps is None:
        message = "missing; a stream has no known length"
        yield Broken(("training", "max_steps"), message, "set it, or data.streaming: false", (streaming,))
    unweighted = [index for index, item in enumerate(data.sources) if item.weight is None]
    if data.streaming and len(data.sources) > 1 and len(unweighted) == len(data.sources):
        message = "has no weight; how long a stream is, and so its natural share, is not known"
        yield Broken(("data", "sources", 0), message, "give every source one", (streaming,))
    if not data.streaming and data.shuffle_window != DataConfig().shuffle_window:
        yield Broken(("data", "shuffle_window"), "is read with data.streaming: true only", "leave it out", (streaming,))
    if not data.sources and data.mix_by != DataConfig().mix_by:
        yield Broken(("data", "mix_by"), "is read with data.sources only", "leave it out", (("data", "sources"),))


def _batch_rules(config: Config) -> Iterator[Broken]:
    data, bucketing, packing = config.data, ("data", "bucket_by_length"), ("data", "packing")
    if data.bucket_by_length and data.packing is True:
        message = "true together with packing: true; packed rows all have one length"
        yield Broken(bucketing, message, "set one of them to false", (packing,))
    if data.packing is True and data.collate.options.get("pad_to_multiple_of") not in (None, 1):
        message = "is not read with packing: true; packed rows all have one length"
        yield Broken(("data", "collate", "pad_to_multiple_of"), message, "leave it out", (packing,))
    if data.bucket_by_length and not data.streaming and any(item.weight is not None for item in data.sources):
        message = "true with weighted sources: how many batches of each length an epoch has would change every epoch"
        yield Broken(bucketing, message, "use data.packing: true, or leave the weights out", (("data", "sources"),))
    if not data.bucket_by_length and data.bucket_bins != DataConfig().bucket_bins:
        fix = "leave it out, or set bucket_by_length: true"
        yield Broken(("data", "bucket_bins"), "is read with data.bucket_by_length: true only", fix, (bucketing,))
    if data.max_tokens is not None and data.max_tokens < data.max_seq_len:
        message = f"{data.max_tokens} is less than one sample of data.max_seq_len {data.max_seq_len}"
        fix = f"set it to at least {data.max_seq_len}"
        yield Broken(("data", "max_tokens"), message, fix, (("data", "max_seq_len"),))


def _image_rules(config: Config) -> Iterator[Broken]:
    """Image classification reads other keys than text does."""
    data, task = config.data, ("model", "task")
    collate = ("data", "collate")
    if data.collate.type in COLLATORS:
        makes_images = not accepts(COLLATORS.entry(data.collate.type).build, "pad_token_id")
        if config.model.task == _IMAGES and data.collate.type == "lm":
            yield Broken(collate, "lm makes batches of text; the task is image_classification", "set it to cv", (task,))
        if config.model.task != _IMAGES and data.collate.type == "cv" and makes_images:
            fix = "set model.task: image_classification"
            yield Broken(collate, "cv makes batches of images; the task is causal_lm", fix, (task,))
    if config.model.task != _IMAGES:
        for key in ("image_field", "label_field"):
            if getattr(data, key) != DataConfig.model_fields[key].default:
                fix = "leave it out"
                yield Broken(("data", key), "is read with model.task: image_classification only", fix, (task,))
        for path, name in _source_names(config):
            if name in DATASETS and _has_only_images(DATASETS.entry(name)):
                fix = "set model.task: image_classification"
                yield Broken(path, f"data source {name} has no text; the task is causal_lm", fix, (task,))
        return
    for key in ("streaming", "sources", "bucket_by_length", "max_tokens"):
        if getattr(data, key):
            yield Broken(("data", key), "is for text; the task is image_classification", "leave it out", (task,))
    if data.packing is True:
        yield Broken(("data", "packing"), "is for text; the task is image_classification", "set it to auto", (task,))
    if config.generate.prompts:
        path = ("generate", "prompts")
        yield Broken(path, "an image classifier writes no text", "leave it out", (task,))
    if data.source.type in DATASETS and not accepts(DATASETS.entry(data.source.type).build, "images"):
        readers = [entry.name for entry in DATASETS if accepts(entry.build, "images")]
        message = f"data source {data.source.type} has no images"
        yield Broken(("data", "source"), message, f"set it to {' or '.join(readers)}", (task,))


def _source_names(config: Config) -> Iterator[tuple[KeyPath, str]]:
    if not config.data.sources:
        yield ("data", "source"), config.data.source.type
    for index, item in enumerate(config.data.sources):
        yield ("data", "sources", index, "source"), item.source


def _has_only_images(entry: Entry) -> bool:
    return accepts(entry.build, "images") and not accepts(entry.build, "rows")


def _evaluation_rules(config: Config) -> Iterator[Broken]:
    names = ["loss", *(metric.type for metric in config.eval.metrics if metric.type != "loss")]
    chosen = config.eval.select_best_by
    if chosen not in names:
        message = f"must be loss or one of eval.metrics ({', '.join(names)}); found {shown(chosen)}"
        near = difflib.get_close_matches(chosen, names, n=1)
        fix = f"did you mean {near[0]}?" if near else "add it to eval.metrics, or choose another"
        yield Broken(("eval", "select_best_by"), message, fix, (("eval", "metrics"),))
    for index, metric in enumerate(config.eval.metrics):
        needs_text = metric.type in METRICS and accepts(METRICS.entry(metric.type).build, "tokenizer")
        if config.model.task == _IMAGES and needs_text:
            path = ("eval", "metrics", index)
            yield Broken(path, f"{metric.type} is for text", "use accuracy or loss", (("model", "task"),))


def _plugin_rules(config: Config, loaded: frozenset[str]) -> Iterator[Broken]:
    for index, name in enumerate(config.plugins):
        if name not in loaded:
            fix = "--allow-plugins imports what a YAML lists, which runs its code"
            yield Broken(("plugins", index), f"needs the module {shown(name)}, which is not loaded", fix)
