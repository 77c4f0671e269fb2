"""The data half of build: source, split, tokenizer, token caches and loaders from a Config."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from truthgpt.config.schema import Config, DataConfig
from truthgpt.data.base import Collator, SampleDataset, Source
from truthgpt.data.loader import EvalLoader, GlobalBatchLoader, WorkerSettings
from truthgpt.data.samples import BlockDataset, RowDataset
from truthgpt.data.split import DocumentSet, Split, split_documents
from truthgpt.data.token_store import default_cache_dir, tokenize_documents
from truthgpt.factories.collate import COLLATORS
from truthgpt.factories.datasets import DATASETS
from truthgpt.memory.base import MemoryPlan
from truthgpt.models.tokenizer import byte_tokenizer, load_tokenizer, saved_tokenizer, train_bpe_tokenizer
from truthgpt.runtime.device import cap_workers
from truthgpt.runtime.fallbacks import Fallbacks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitData:
    """The documents of a run, divided; `fixed_shapes` when every full batch has one shape."""

    split: Split
    layout: str

    @property
    def fixed_shapes(self) -> bool:
        """Blocks of one length, against rows padded to the longest of their batch."""
        return self.layout == "stream"


def build_split(config: Config) -> SplitData:
    """Read the source once and divide it into training and validation documents.

    Raises:
        DataError: files missing, empty or malformed.
    """
    data = config.data
    source = _source(data, data.path)
    validation = _source(data, data.validation_path) if data.validation_path else None
    return SplitData(split_documents(source, data.validation_fraction, validation), source.layout)


def build_tokenizer(config: Config, documents: DocumentSet) -> PreTrainedTokenizerFast:
    """The tokenizer of `model.tokenizer`; one that this run (or the one it resumes) saved before is used again.

    Args:
        documents: the training split, which a `bpe` tokenizer is trained on.
    """
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
    logger.info("training a BPE tokenizer of %d tokens on %d documents", wanted.vocab_size, len(documents))
    return train_bpe_tokenizer((document.text for document in documents), wanted.vocab_size)


def build_train_loader(
    config: Config,
    data: SplitData,
    tokenizer: PreTrainedTokenizerFast,
    plan: MemoryPlan,
    device: torch.device,
    fallbacks: Fallbacks,
) -> GlobalBatchLoader:
    """Global batches of the training split, in an order that depends on the seed alone."""
    dataset = _dataset(config.data, data.split.train, data.layout, tokenizer)
    return GlobalBatchLoader(
        dataset,
        _collator(config.data, tokenizer),
        micro_batch_size=plan.micro_batch_size,
        grad_accum_steps=plan.grad_accum_steps,
        seed=config.seed,
        workers=_workers(config.data, fallbacks),
        pin_memory=device.type == "cuda",
    )


def build_eval_loader(
    config: Config,
    data: SplitData,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    fallbacks: Fallbacks,
) -> EvalLoader | None:
    """Batches of the validation split; None when nothing is held out."""
    if data.split.validation is None:
        return None
    return EvalLoader(
        _dataset(config.data, data.split.validation, data.layout, tokenizer),
        _collator(config.data, tokenizer),
        batch_size=config.training.eval_batch_size,
        workers=_workers(config.data, fallbacks),
        pin_memory=device.type == "cuda",
    )


def _source(data: DataConfig, path: list[str] | None) -> Source:
    source: Source = DATASETS.build(
        data.source.type,
        data.source.options,
        path=path,
        dataset=data.dataset,
        subset=data.subset,
        format=data.format,
        text_field=data.text_field,
        prompt_field=data.prompt_field,
        completion_field=data.completion_field,
        train_on=data.train_on,
        on_bad_row=data.on_bad_row,
        max_bad_fraction=data.max_bad_fraction,
    )
    return source


def _dataset(
    data: DataConfig, documents: DocumentSet, layout: str, tokenizer: PreTrainedTokenizerFast
) -> SampleDataset:
    store = tokenize_documents(documents, tokenizer, len(tokenizer), default_cache_dir())
    if layout == "stream":
        return BlockDataset(store, data.max_seq_len)
    return RowDataset(store, data.max_seq_len, data.overlong, documents)


def _collator(data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> Collator:
    collator: Collator = COLLATORS.build(
        data.collate.type, data.collate.options, pad_token_id=tokenizer.pad_token_id, max_seq_len=data.max_seq_len
    )
    return collator


def _workers(data: DataConfig, fallbacks: Fallbacks) -> WorkerSettings:
    return WorkerSettings(cap_workers(data.num_workers, fallbacks), data.prefetch_factor, data.persistent_workers)


def _tokenizer_folders(config: Config) -> list[Path]:
    folders = [Path(config.run_directory) / "model"]
    if config.resume.checkpoint_dir is not None:
        start = Path(config.resume.checkpoint_dir)
        folders += [folder / "model" for folder in (start, *start.parents[:2])]
    return folders
