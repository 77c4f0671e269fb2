"""The documents of a workload as our data layer cuts and orders them: what every contender trains on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import count, islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from truthgpt.build_data import TokenizedText
    from truthgpt.config.schema import Config
    from truthgpt.data.base import Sample
    from truthgpt.data.loader import GlobalBatchLoader
    from truthgpt.data.samples import BlockDataset, RowDataset


class Documents:
    """The unpacked training samples of a configuration, in the order of our loader."""

    def __init__(self, config: Config) -> None:
        from truthgpt.build_data import row_dataset
        from truthgpt.data.samples import BlockDataset
        from truthgpt.data.split import DocumentSet

        text, self._loader = _text_and_loader(config, packed=False)
        self.tokenizer = text.tokenizer
        self.are_rows = text.data.has_rows
        part, store = text.data.parts[0], text.stores[0]
        assert isinstance(part.train, DocumentSet)
        self._dataset: RowDataset | BlockDataset = (
            row_dataset(config.data, store, part.layout, part.train)
            if self.are_rows
            else BlockDataset(store, config.data.max_seq_len)
        )

    def __len__(self) -> int:
        """Samples of an epoch."""
        return len(self._dataset)

    def take(self, samples: int) -> list[Sample]:
        """The first `samples` that our loader hands out, over as many epochs as it takes."""
        return [self._dataset.read(index) for index in islice(self._indices(), samples)]

    def epoch_tokens(self) -> int | None:
        """Supervised tokens of an epoch; None for joined text, whose samples can be compared one by one."""
        if not self.are_rows:
            return None
        return sum(int((self._dataset.read(index)["labels"] >= 0).sum()) for index in range(len(self)))

    def _indices(self) -> Iterator[int]:
        for step in count():
            yield from self._loader.sample_indices(step)


def loader_epoch_tokens(config: Config, packed: bool) -> int | None:
    """Supervised tokens in the batches that our loader hands out in one epoch; None for joined text."""
    text, loader = _text_and_loader(config, packed)
    if not text.data.has_rows:
        return None
    with closing(loader.batches()) as batches:
        return sum(batch.tokens for batch in islice(batches, loader.steps_per_epoch))


def _text_and_loader(config: Config, packed: bool) -> tuple[TokenizedText, GlobalBatchLoader]:
    import torch

    from truthgpt.build_data import build_tokenizer, build_train_loader, tokenize_text
    from truthgpt.build_sources import build_text_data
    from truthgpt.data.loader import GlobalBatchLoader
    from truthgpt.memory.base import MemoryPlan
    from truthgpt.runtime.fallbacks import Fallbacks

    data = build_text_data(config)
    text = tokenize_text(data, build_tokenizer(config, data))
    plan = MemoryPlan(config.training.train_batch_size, config.training.grad_accum_steps, False)
    loader = build_train_loader(config, text, plan, packed, torch.device("cpu"), Fallbacks())
    assert isinstance(loader, GlobalBatchLoader), "a stream has no first samples to compare"
    return text, loader
