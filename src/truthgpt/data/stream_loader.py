"""Global batches of documents that are read and tokenised while training, with a position that goes in a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.utils.data import IterableDataset

from truthgpt.data.base import Batch, Collator, GlobalBatch
from truthgpt.data.loader import supervised_tokens
from truthgpt.data.loader_processes import WorkerSettings, read_batches, torch_loader
from truthgpt.data.stream import SampleStream, StreamPosition, WeightedStream
from truthgpt.data.stream_samples import StreamCounts, StreamSettings
from truthgpt.data.tokenization import DocumentEncoder
from truthgpt.errors import DataError, TruthGPTError

__all__ = ["StreamLoader", "StreamSettings", "WeightedStream"]

logger = logging.getLogger(__name__)

KEPT_STATES = 4
"""States of the last batches that can still be asked for; a trainer asks for the step it has just finished."""

COUNT_TEXTS = {
    "overlong": "{} of {} documents are longer than data.max_seq_len (data.overlong: {overlong})",
    "unsupervised": "left out {} samples without a token the loss counts (of {} documents; data.train_on)",
    "double_bos": "{} of {} documents began with a second begin-of-text token, which was dropped",
    "double_eos": "{} of {} documents end with an end-of-text token of their own, and got no second one",
    "missing_eos": "{} of {} chats have no end-of-text token behind the last turn, which was added",
}
"""What is said about a count that is not 0."""

REMEDIES = {
    "sources": "the files, data.path, data.sources with their weights, and data.validation_fraction",
    "encoder": "the tokenizer and data.chat_template",
    "seed": "seed",
    "max_seq_len": "data.max_seq_len",
    "global_batch": "training.train_batch_size x training.grad_accum_steps",
    "micro_batch_size": "training.train_batch_size",
    "grad_accum_steps": "training.grad_accum_steps",
    "shuffle_window": "data.shuffle_window",
    "overlong": "data.overlong",
    "packing": "data.packing",
    "pad_token_id": "the tokenizer",
    "bins": "data.bucket_by_length and data.bucket_bins",
    "max_tokens": "data.max_tokens",
    "mix_by": "data.mix_by",
}
"""What to keep so that a value of `describe()` stays as it was."""


class StreamLoader:
    """The training batches of every optimizer step, out of sources that are read while training.

    With loader processes, one of them (whatever their number) reads, tokenises and collates ahead; what is trained on
    is the same with and without it. Each next sample (each micro-batch with bucketing) comes from the source that is
    furthest behind its share, counted in documents or in tokens given out; the first of several. Batches go on across
    the end of a pass: none is cut short. Documents left out or cut are counted and said when first met and at the end.

    The position after a step is made with its batch and travels with it. Going on from one reads the window that was
    being given out again, whatever the step.

    Args:
        streams: the sources; names must differ.
        encoder: documents to tokens.
        collate: samples to a micro-batch.
        settings: shapes of samples and batches.
        seed: seed of the run.
        workers: loader processes; 0 reads in the training process.
        pin_memory: page-locked batches.

    Raises:
        DataError: a stream without shards.
        ValueError: no stream, or two of one name.
    """

    steps_per_epoch: int | None = None
    """Not known: only reading tells. The epoch of a batch is the number of passes every source had finished before."""

    def __init__(
        self,
        streams: Sequence[WeightedStream],
        encoder: DocumentEncoder,
        collate: Collator,
        settings: StreamSettings,
        seed: int,
        workers: WorkerSettings,
        pin_memory: bool = False,
    ) -> None:
        if len({stream.name for stream in streams}) != len(streams) or not streams:
            raise ValueError(f"streams need different names: {[stream.name for stream in streams]}")
        self._dataset = _BatchStream(streams, encoder, collate, settings, seed)
        self._workers = dataclasses.replace(workers, num_workers=min(workers.num_workers, 1))
        self._pin_memory = pin_memory
        self._start = 0, _Mix(self._dataset, [_SourceState() for _ in streams]).state()
        self._handed_out: deque[tuple[int, str]] = deque(maxlen=KEPT_STATES)
        self._said: dict[str, StreamCounts] = {}

    def batches(self, start_step: int = 0) -> Generator[GlobalBatch, None, None]:
        """Global batches of `start_step`, `start_step + 1` and so on, without end.

        `start_step` is the step of the loaded state (0 without one), or one of the last that were handed out. Close the
        generator (`contextlib.closing`) to end the loader process.

        Raises:
            DataError: a document cannot be read or used, a pass has no usable one, or the loader process died or hangs.
        """
        self._dataset.state = self._state_after(start_step)
        loader = torch_loader(self._dataset, self._workers, pin_memory=self._pin_memory)
        step = start_step
        counts: Sequence[dict[str, int]] = ()
        try:
            with closing(read_batches(loader)) as items:
                for item in items:
                    if isinstance(item, TruthGPTError):
                        raise item
                    micro_batches, samples, epoch, state, counts = item
                    step += 1
                    self._handed_out.append((step, state))
                    self._report(counts, first=True)
                    tokens = sum(supervised_tokens(batch) for batch in micro_batches)
                    yield GlobalBatch(micro_batches, tokens=tokens, samples=samples, epoch=epoch)
        finally:
            self._report(counts, first=False)

    def state_dict(self, step: int) -> dict[str, Any]:
        """The position after `step` steps: of one of the last batches handed out, or where the loader began.

        Raises:
            ValueError: another step.
        """
        return {"step": step, "described": self.describe(), "sources": json.loads(self._state_after(step))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            DataError: the data or what shapes their order is not what `state` was saved with; it says what differs.
        """
        if "described" not in state:
            raise DataError(
                "this run was trained on data that was not streamed: keep data.streaming: false, or start a new run in "
                "another output_dir"
            )
        then, now = state["described"], self.describe()
        changed = [key for key in now if then[key] != now[key]]
        if changed:
            raise DataError(_change(changed, then, now))
        self._start = state["step"], json.dumps(state["sources"])
        self._handed_out.clear()

    def describe(self) -> dict[str, Any]:
        """Plain values that must be equal for two runs to see the same batches: every source's fingerprint and share,
        the encoder, the seed and the settings."""
        return self._described

    @cached_property
    def _described(self) -> dict[str, Any]:
        """Made once: a fingerprint may take a second, and every checkpoint holds it."""
        dataset = self._dataset
        settings = dataset.settings
        values = dataclasses.asdict(settings)
        values["global_batch"] = settings.micro_batch_size * settings.grad_accum_steps
        if settings.bins is None:  # how a step is split into micro-batches changes no order
            values["micro_batch_size"] = values["grad_accum_steps"] = None
        else:
            values["bins"] = list(settings.bins)
        sources = [
            {
                "name": stream.name,
                "fingerprint": stream.source.fingerprint(),
                "weight": stream.weight,
                "held_out": stream.held_out,
            }
            for stream in dataset.streams
        ]
        return {"sources": sources, "encoder": dataset.encoder.digest, "seed": dataset.seed, **values}

    def _state_after(self, step: int) -> str:
        for known, state in [self._start, *self._handed_out]:
            if known == step:
                return state
        raise ValueError(
            f"the position after step {step} is not known: the loader began at step {self._start[0]} and keeps the "
            f"last {KEPT_STATES} steps"
        )

    def _report(self, counts: Sequence[dict[str, int]], first: bool) -> None:
        """Say which documents were left out or cut: when a count is first above 0, or all that have grown since."""
        for stream, values in zip(self._dataset.streams, counts, strict=False):
            said = self._said.setdefault(stream.name, StreamCounts())
            for name, text in COUNT_TEXTS.items():
                before = getattr(said, name)
                if values[name] > before and (before == 0 or not first):
                    setattr(said, name, values[name])
                    overlong = self._dataset.settings.overlong
                    found = text.format(values[name], values["documents"], overlong=overlong)
                    # A split row loses nothing.
                    level = logging.INFO if name == "overlong" and overlong == "split" else logging.WARNING
                    logger.log(level, "%s: %s, %s", stream.name, found, "so far" if first else "in all")


@dataclass
class _SourceState:
    """Where one source stands, and what of it was given out."""

    position: StreamPosition = dataclasses.field(default_factory=StreamPosition)
    documents: int = 0
    tokens: int = 0


class _Mix:
    """Groups of several sources, each from the one that is furthest behind its share."""

    def __init__(self, dataset: _BatchStream, states: Sequence[_SourceState]) -> None:
        settings = dataset.settings
        self._streams = [
            SampleStream(stream, dataset.encoder, settings, dataset.seed, state.position)
            for stream, state in zip(dataset.streams, states, strict=True)
        ]
        self._weights = [stream.weight for stream in dataset.streams]
        self._documents = [state.documents for state in states]
        self._tokens = [state.tokens for state in states]
        self._shared = self._documents if settings.mix_by == "documents" else self._tokens

    def next_samples(self) -> list[Any]:
        number = min(range(len(self._streams)), key=lambda source: self._shared[source] / self._weights[source])
        group = self._streams[number].next_group()
        self._documents[number] += group.documents
        self._tokens[number] += group.tokens
        return list(group.samples)

    @property
    def epoch(self) -> int:
        """Passes that every source has finished."""
        return min(stream.position.place.epoch for stream in self._streams)

    def state(self) -> str:
        """JSON, which costs little to hand from process to process and cannot change afterwards."""
        given = zip(self._streams, self._documents, self._tokens, strict=True)
        return json.dumps(
            [
                {"position": stream.position.to_state(), "documents": documents, "tokens": tokens}
                for stream, documents, tokens in given
            ]
        )

    def counts(self) -> list[dict[str, int]]:
        return [dataclasses.asdict(stream.counts) for stream in self._streams]


_Item = tuple[list[Batch], int, int, str, list[dict[str, int]]]
"""Micro-batches, samples, epoch, state behind them, counts of every source. Plain, because it goes through torch."""


class _BatchStream(IterableDataset[Any]):
    """Global batches from `state` on; runs in the loader process."""

    def __init__(
        self,
        streams: Sequence[WeightedStream],
        encoder: DocumentEncoder,
        collate: Collator,
        settings: StreamSettings,
        seed: int,
    ) -> None:
        self.streams = list(streams)
        self.encoder = encoder
        self.settings = settings
        self.seed = seed
        self.state = ""
        self._collate = collate

    def __iter__(self) -> Iterator[_Item | TruthGPTError]:
        try:
            yield from self._items()
        except TruthGPTError as error:
            yield error  # torch would put a traceback in front of the message

    def _items(self) -> Iterator[_Item]:
        states = [
            _SourceState(StreamPosition.from_state(source["position"]), source["documents"], source["tokens"])
            for source in json.loads(self.state)
        ]
        mix = _Mix(self, states)
        bucketed = self.settings.bins is not None
        while True:
            micro_batches, samples, epoch = [], 0, mix.epoch
            for _ in range(self.settings.grad_accum_steps):
                rows = mix.next_samples()
                while not bucketed and len(rows) < self.settings.micro_batch_size:
                    rows += mix.next_samples()
                micro_batches.append(self._collate(rows))
                samples += len(rows)
            yield micro_batches, samples, epoch, mix.state(), mix.counts()


def _change(changed: Sequence[str], then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Says which values of the description changed, and what to keep for them."""
    described = []
    for key in changed:
        if key == "sources" and len(then[key]) == len(now[key]):
            described += [_source_change(*pair) for pair in zip(then[key], now[key], strict=True) if pair[0] != pair[1]]
        elif key == "sources":
            described.append(f"{len(then[key])} sources then, {len(now[key])} now")
        else:
            described.append(f"{key} was {then[key]}, now {now[key]}")
    keep = ", ".join(REMEDIES[key] for key in changed)
    return (
        f"the data is not what this run was trained on: {'; '.join(described)}. Keep {keep} as it was, or start a new "
        "run in another output_dir"
    )


def _source_change(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    values = [f"{key} was {str(then[key])[:12]}, now {str(now[key])[:12]}" for key in now if then[key] != now[key]]
    return f"{now['name']}: {', '.join(values)}"
