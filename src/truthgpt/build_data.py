"""The data of a language model: tokenizer, tokens, samples, batches and loaders from a Config. Layer 4."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from truthgpt.build_sources import TextData
from truthgpt.config.data_section import DataConfig
from truthgpt.config.schema import Config
from truthgpt.data.base import (
    BatchOrder,
    Collator,
    Layout,
    SampleDataset,
    TrainLoader,
)
from truthgpt.data.batch_order import BucketedOrder, MixedOrder, ShuffledOrder, SourceShare, sample_weights
from truthgpt.data.chat import MARK, load_chat_template
from truthgpt.data.loader import EvalLoader, GlobalBatchLoader, WorkerSettings
from truthgpt.data.packing import PackedDataset, compare_filling
from truthgpt.data.samples import BlockDataset, ConcatenatedDataset, RowDataset
from truthgpt.data.split import DocumentSet
from truthgpt.data.stream import WeightedStream, require_sample
from truthgpt.data.stream_loader import StreamLoader
from truthgpt.data.stream_samples import StreamSettings
from truthgpt.data.token_store import TokenStore, default_cache_dir, tokenize_documents
from truthgpt.data.tokenization import DocumentEncoder
from truthgpt.factories.collate import COLLATORS
from truthgpt.factories.registry import accepts
from truthgpt.inference.turn_end import turn_end
from truthgpt.memory.base import MemoryPlan
from truthgpt.models.tokenizer import byte_tokenizer, load_tokenizer, saved_tokenizer, train_bpe_tokenizer
from truthgpt.runtime.device import cap_workers, usable_cores
from truthgpt.runtime.fallbacks import Fallbacks

logger = logging.getLogger(__name__)


COMPARED_BATCH_SIZE = 8
"""Rows of the padded batches that packing is compared with; not the run's own number, so that cutting a global batch
into other micro-batches changes nothing."""


@dataclass(frozen=True)
class TokenizedText:
    """The documents of a run with their tokenizer; `stores` hold the training tokens of every part, none of streams."""

    data: TextData
    tokenizer: PreTrainedTokenizerFast
    stores: tuple[TokenStore, ...]


def build_tokenizer(config: Config, data: TextData) -> PreTrainedTokenizerFast:
    """The tokenizer of `model.tokenizer`, with the chat template of `data.chat_template` if one is given.

    One that this run (or the one it resumes) saved before is used again; a new `bpe` one is trained on the training
    documents.
    """
    tokenizer = _tokenizer(config, data)
    if config.data.chat_template is not None:
        tokenizer.chat_template = load_chat_template(config.data.chat_template)
    if "assistant" in (config.data.train_on, *(source.train_on for source in config.data.sources)):
        _warn_of_untrained_end(tokenizer)
    return tokenizer


def _warn_of_untrained_end(tokenizer: PreTrainedTokenizerFast) -> None:
    """Say when mere letters follow an answer in the template, as in ChatML with the tokenizer of a base model: they
    are not trained, and the model writes on where it should stop. Marks in the template decide for themselves, and
    where nothing stands behind the last answer it is the end-of-text token that does."""
    written = turn_end(tokenizer).text
    if not written or written in tokenizer.get_added_vocab() or MARK.search(str(tokenizer.chat_template)):
        return
    chat = [{"role": role, "content": f"<<{role}>>"} for role in ("user", "assistant")]
    if not str(tokenizer.apply_chat_template(chat, tokenize=False)).endswith("<<assistant>>"):
        logger.warning(
            "the chat template puts %r behind an answer, which is no token of the tokenizer and so is not trained: the "
            "model does not learn where to stop; give a tokenizer that has it (model.tokenizer.path, see docs/lora.md, "
            "New tokens), or a template that puts {{ eos_token }} there",
            written.split("\n")[0][:40],
        )


def tokenize_text(data: TextData, tokenizer: PreTrainedTokenizerFast) -> TokenizedText:
    """The training tokens of every source, from the cache or made now; streams are tokenised while training."""
    documents = [part.train for part in data.parts if isinstance(part.train, DocumentSet)]
    return TokenizedText(data, tokenizer, tuple(_token_store(one, tokenizer) for one in documents))


def build_train_loader(
    config: Config, text: TokenizedText, plan: MemoryPlan, packed: bool, device: torch.device, fallbacks: Fallbacks
) -> TrainLoader:
    """Global batches of the training documents, in an order that depends on the seed alone."""
    data, tokenizer = text.data, text.tokenizer
    collate = _collator(config.data, tokenizer, plan.micro_batch_size if packed else None)
    workers, pin_memory = worker_settings(config.data, fallbacks), device.type == "cuda"
    streams = [part.train for part in data.parts if isinstance(part.train, WeightedStream)]
    if streams:
        encoder = DocumentEncoder(tokenizer, len(tokenizer))
        settings = _stream_settings(config, tokenizer, plan, packed)
        loader = StreamLoader(streams, encoder, collate, settings, config.seed, workers, pin_memory)
        for stream in streams:
            require_sample(stream, encoder, settings)
        return loader
    datasets = [
        _samples(config, store, part.train, part.layout, tokenizer, packed)
        for part, store in zip(data.parts, text.stores, strict=True)
        if isinstance(part.train, DocumentSet)
    ]
    order = _order(config, datasets, data, plan)
    return GlobalBatchLoader(_joined(datasets), collate, order, workers, pin_memory)


def build_eval_loader(
    config: Config,
    data: TextData,
    tokenizer: PreTrainedTokenizerFast,
    packed: bool,
    device: torch.device,
    fallbacks: Fallbacks,
) -> EvalLoader | None:
    """Batches of the validation documents of all sources; None when nothing is held out."""
    called = "validation rows"
    datasets = [
        _samples(config, _token_store(held_out, tokenizer), held_out, part.layout, tokenizer, packed, called)
        for part in data.parts
        if (held_out := part.validation) is not None
    ]
    if not datasets:
        return None
    batch_size = config.training.eval_batch_size
    return EvalLoader(
        _joined(datasets),
        _collator(config.data, tokenizer, batch_size if packed else None),
        batch_size=batch_size,
        workers=worker_settings(config.data, fallbacks),
        pin_memory=device.type == "cuda",
    )


def rows_per_micro_batch(config: Config) -> int:
    """Rows of `max_seq_len` tokens a micro-batch holds: `train_batch_size`, or as many as `data.max_tokens` allows."""
    budget = config.data.max_tokens
    return config.training.train_batch_size if budget is None else max(1, budget // config.data.max_seq_len)


def bucket_bins(data: DataConfig) -> list[int] | None:
    """Lengths that batches are padded to, `max_seq_len` the last of them; None without bucketing."""
    if not data.bucket_by_length:
        return None
    return [*sorted(size for size in set(data.bucket_bins) if size < data.max_seq_len), data.max_seq_len]


def wants_packing(data: DataConfig, has_rows: bool) -> bool:
    """What `data.packing` asks for: `auto` is rows, unless the YAML says how to pad them."""
    if data.packing == "auto":
        pads = data.bucket_by_length or data.collate.options.get("pad_to_multiple_of") not in (None, 1)
        return has_rows and not pads
    return data.packing


def packing_pays(config: Config, text: TokenizedText) -> bool:
    """Whether packed rows hold more tokens than padded ones: two samples may not fit into one row.

    Of a stream nothing is known before, and its rows are packed.
    """
    lengths = [
        np.clip(np.diff(store.offsets) - 1, 1, config.data.max_seq_len)
        for store, part in zip(text.stores, text.data.parts, strict=False)
        if part.layout == "rows"
    ]
    if not lengths:
        return True
    packed, padded = compare_filling(np.concatenate(lengths), config.data.max_seq_len, COMPARED_BATCH_SIZE)
    if packed < padded:
        logger.info("rows are padded, not packed: padding fills %.0f%%, packing %.0f%%", 100 * padded, 100 * packed)
    return packed >= padded


def can_pack(data: DataConfig) -> bool:
    """Whether the collator takes packed rows."""
    return accepts(COLLATORS.entry(data.collate.type).build, "packed_rows")


def _token_store(documents: DocumentSet, tokenizer: PreTrainedTokenizerFast) -> TokenStore:
    """The tokens of `documents`, from the cache or made now on all cores."""
    encoder = DocumentEncoder(tokenizer, len(tokenizer))
    return tokenize_documents(documents, encoder, default_cache_dir(), processes=usable_cores())


def row_dataset(
    data: DataConfig,
    store: TokenStore,
    layout: Layout,
    documents: DocumentSet,
    report: bool = True,
    called: str = "rows",
) -> RowDataset:
    """Every document a sample; of text that is else joined, a document too long for a row goes on in the next one."""
    overlong = "split" if layout == "stream" else data.overlong
    return RowDataset(store, data.max_seq_len, overlong, documents, report, called)


def packed_dataset(config: Config, rows: RowDataset, tokenizer: PreTrainedTokenizerFast) -> PackedDataset:
    """Rows of `max_seq_len` tokens, each filled with several samples."""
    return PackedDataset(
        rows, config.data.max_seq_len, int(tokenizer.pad_token_id), config.seed, cache_dir=default_cache_dir()
    )


def worker_settings(data: DataConfig, fallbacks: Fallbacks) -> WorkerSettings:
    """Loader processes as `data` asks for them, capped at the cores there are."""
    return WorkerSettings(cap_workers(data.num_workers, fallbacks), data.prefetch_factor, data.persistent_workers)


def _tokenizer(config: Config, data: TextData) -> PreTrainedTokenizerFast:
    wanted, name = config.model.tokenizer, config.model.name_or_path
    if wanted.type == "path" and wanted.path is not None:
        return load_tokenizer(wanted.path, config.model.trust_remote_code)
    if wanted.type == "auto" and name is not None:
        return load_tokenizer(name, config.model.trust_remote_code)
    if wanted.type != "bpe" or wanted.vocab_size is None:
        return byte_tokenizer()
    for folder in _tokenizer_folders(config):
        saved = saved_tokenizer(folder)
        if saved is not None:
            return saved
    logger.info("training a BPE tokenizer of %d tokens on the training documents", wanted.vocab_size)
    return train_bpe_tokenizer((document.text for document in data.train_documents()), wanted.vocab_size)


def _samples(
    config: Config,
    store: TokenStore,
    documents: DocumentSet,
    layout: Layout,
    tokenizer: PreTrainedTokenizerFast,
    packed: bool,
    called: str = "rows",
) -> BlockDataset | RowDataset | PackedDataset:
    """The samples of one source, cut from its tokens."""
    if layout == "stream" and not packed:
        return BlockDataset(store, config.data.max_seq_len)
    rows = row_dataset(config.data, store, layout, documents, called=called)
    return packed_dataset(config, rows, tokenizer) if packed else rows


def _stream_settings(
    config: Config, tokenizer: PreTrainedTokenizerFast, plan: MemoryPlan, packed: bool
) -> StreamSettings:
    data, bins = config.data, bucket_bins(config.data)
    return StreamSettings(
        max_seq_len=data.max_seq_len,
        micro_batch_size=plan.micro_batch_size,
        grad_accum_steps=plan.grad_accum_steps,
        shuffle_window=data.shuffle_window,
        overlong=data.overlong,
        packing=packed,
        pad_token_id=int(tokenizer.pad_token_id),
        bins=None if bins is None else tuple(bins),
        max_tokens=data.max_tokens,
        mix_by=data.mix_by,
    )


def _order(
    config: Config,
    datasets: Sequence[BlockDataset | RowDataset | PackedDataset],
    data: TextData,
    plan: MemoryPlan,
) -> BatchOrder:
    sizes = (plan.micro_batch_size, plan.grad_accum_steps, config.seed)
    bins = bucket_bins(config.data)
    weights = [part.weight for part in data.parts if part.weight is not None]
    if weights:
        samples = [len(dataset) for dataset in datasets]
        # Not those of the stores: of rows that are cut or left out nothing is trained on.
        documents = [dataset.documents for dataset in datasets]
        tokens = [dataset.tokens for dataset in datasets]
        shares = sample_weights(weights, config.data.mix_by, samples, documents, tokens)
        return MixedOrder([SourceShare(n, share) for n, share in zip(samples, shares, strict=True)], *sizes)
    if bins is not None:
        lengths = [dataset.lengths for dataset in datasets if not isinstance(dataset, PackedDataset)]
        return BucketedOrder(np.concatenate(lengths), bins, *sizes, max_tokens=config.data.max_tokens)
    return ShuffledOrder(sum(len(dataset) for dataset in datasets), *sizes)


def _joined(datasets: list[Any]) -> SampleDataset:
    joined: SampleDataset = datasets[0] if len(datasets) == 1 else ConcatenatedDataset(datasets)
    return joined


def _collator(data: DataConfig, tokenizer: PreTrainedTokenizerFast, packed_rows: int | None) -> Collator:
    collator: Collator = COLLATORS.build(
        data.collate.type,
        data.collate.options,
        pad_token_id=tokenizer.pad_token_id,
        max_seq_len=data.max_seq_len,
        packed_rows=packed_rows,
        bins=bucket_bins(data),
    )
    return collator


def _tokenizer_folders(config: Config) -> list[Path]:
    folders = [Path(config.run_directory) / "model"]
    if config.resume.checkpoint_dir is not None:
        start = Path(config.resume.checkpoint_dir)
        folders += [folder / "model" for folder in (start, *start.parents[:2])]
    return folders
