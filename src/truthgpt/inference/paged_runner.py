"""Runs many sequences at once through a model whose keys and values lie in a paged cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from truthgpt.attention.install import install_attention
from truthgpt.attention.paged import (
    KEY_PAGES,
    VALUE_PAGES,
    Alone,
    Blocks,
    InOneRow,
    OneByOne,
    PagedStep,
    Ragged,
    Reach,
    Rectangle,
    paged_attention,
    step_in_use,
)
from truthgpt.inference.decode_graph import DecodeGraphs
from truthgpt.inference.prompt_graph import PromptGraphs
from truthgpt.inference.runner import Work, logits_to_keep
from truthgpt.inference.token_sequence import KeptTokens
from truthgpt.kv_cache.paged import KVPages
from truthgpt.runtime.device import has_triton


class PagedRunner:
    """All sequences in one forward pass: their next tokens stand in one row, and attention looks them up in the cache.

    Args:
        model: attends through `paged_attention`, its layers have their part of `cache` (`paged_model`).
        cache: the memory.
        flash: flash attention can compute what the layers do, so that prompts need nothing from the host.
    """

    def __init__(self, model: PreTrainedModel, cache: KVPages, flash: bool = False) -> None:
        self._model = model
        self._cache = cache
        self._kernels = model.device.type == "cuda" and has_triton()
        self._logits_to_keep = logits_to_keep(model)
        self._graphs: DecodeGraphs | None = None
        self._prompt_graphs: PromptGraphs | None = None
        if self._kernels:
            pool = torch.cuda.graph_pool_handle()
            self._graphs = DecodeGraphs(self._run_step, cache.pool.block_size, pool, model.device)
            if flash:
                self._prompt_graphs = PromptGraphs(self._run_step, pool, model.device)

    @property
    def positions(self) -> int:
        """See `Runner`."""
        return self._cache.pool.blocks * self._cache.pool.block_size

    @property
    def used_positions(self) -> int:
        """See `Runner`."""
        return self._cache.pool.held_positions

    @property
    def whole_prompts(self) -> bool:
        """See `Runner`: attention needs no more than what is kept."""
        return False

    @property
    def shared_tokens(self) -> int:
        """See `Runner`."""
        return self._cache.pool.block_size

    def start(self, sequence: KeptTokens) -> None:
        """See `Runner`: what another sequence with the same beginning has computed is shared."""
        sequence.kept = self._cache.pool.begin(sequence.tokens)
        sequence.computed = sequence.kept.length

    def reserve(self, sequence: KeptTokens, tokens: int) -> None:
        """See `Runner`."""
        table, pool = sequence.kept, self._cache.pool
        has_room = sequence.computed + tokens <= len(table.blocks) * pool.block_size
        if has_room and not pool.writes_shared_block(table, tokens):
            return
        self._commit(sequence)
        self._cache.copy(pool.reserve(table, tokens))

    def fork(self, sequence: KeptTokens, twin: KeptTokens) -> None:
        """See `Runner`: who writes first into a block that is not full gets a copy of it."""
        self._commit(sequence)
        twin.kept, twin.computed = self._cache.pool.fork(sequence.kept), sequence.computed

    def release(self, sequence: KeptTokens) -> None:
        """See `Runner`."""
        sequence.computed = min(sequence.computed, len(sequence.tokens))  # one may have run ahead
        self._commit(sequence)
        self._cache.pool.release(sequence.kept)
        sequence.kept, sequence.computed = None, 0

    @torch.no_grad()
    def run(self, work: Work) -> torch.Tensor:
        """See `Runner`."""
        if self._graphs is not None and all(count == 1 for _, count in work):
            return self._run_graph(self._graphs, [sequence for sequence, _ in work])
        new = [sequence.tokens[sequence.computed : sequence.computed + count] for sequence, count in work]
        starts = [sequence.computed for sequence, _ in work]
        logits = self.forward(new, starts, [tuple(sequence.kept.blocks) for sequence, _ in work])
        for sequence, count in work:
            sequence.computed += count
            self._commit(sequence)
        return logits

    def _commit(self, sequence: KeptTokens) -> None:
        """What was computed can be shared from now on; single tokens are told when they fill a block."""
        table = sequence.kept
        if table.length < sequence.computed:
            self._cache.pool.commit(table, sequence.tokens[table.length : sequence.computed])

    @property
    def runs_ahead(self) -> bool:
        """See `Runner`."""
        return self._graphs is not None

    @torch.no_grad()
    def run_ahead(self, sequences: Sequence[KeptTokens], tokens: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """See `Runner`."""
        assert self._graphs is not None
        return self._run_graph(self._graphs, sequences, (tokens, rows))

    def _run_graph(
        self,
        graphs: DecodeGraphs,
        sequences: Sequence[KeptTokens],
        ahead: tuple[torch.Tensor, Sequence[int]] | None = None,
    ) -> torch.Tensor:
        logits = graphs.logits(sequences, ahead)
        for sequence in sequences:
            sequence.computed += 1
        return logits

    def _run_step(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, step: PagedStep, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits `(B, V)` of these rows; None: of all."""
        kept = {} if rows is None else self._logits_to_keep(rows)
        with step_in_use(step):
            output = self._model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **kept)
        logits: torch.Tensor = output.logits[0]
        return logits if rows is None or len(logits) == len(rows) else logits[rows]

    def forward(
        self, new: Sequence[Sequence[int]], starts: Sequence[int], tables: Sequence[tuple[int, ...]]
    ) -> torch.Tensor:
        """Logits `(B, V)` behind each sequence's `new` tokens, which stand behind `starts` others in its `tables`."""
        counts, device = [len(tokens) for tokens in new], self._model.device
        if self._prompt_graphs is not None and max(counts) > 1 and self._prompt_graphs.fit(starts, counts):
            size = self._cache.pool.block_size
            slots = [_slots(table, size, count) for table, count in zip(tables, counts, strict=True)]
            return self._prompt_graphs.logits(new, np.concatenate(slots))
        positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])
        ids = torch.tensor([token for tokens in new for token in tokens], device=device)
        rows = torch.tensor(list(accumulate(counts)), device=device) - 1
        step = self._step(starts, counts, tables)
        return self._run_step(ids[None], torch.from_numpy(positions).to(device)[None], step, rows)

    def _step(self, starts: Sequence[int], counts: Sequence[int], tables: Sequence[tuple[int, ...]]) -> PagedStep:
        device, size = self._model.device, self._cache.pool.block_size
        totals = [s + n for s, n in zip(starts, counts, strict=True)]
        single = max(counts) == 1
        if single and len(tables) == 1:
            blocks = _in_one_piece(tables[0])
            if isinstance(blocks, range):
                return Alone(range(blocks.start * size, blocks.start * size + totals[0]))
        every = [_slots(table, size, total) for table, total in zip(tables, totals, strict=True)]
        slots = np.concatenate([of_all[start:] for of_all, start in zip(every, starts, strict=True)])
        # Single tokens on a GPU are a graph's, see `run`.
        reach = _rectangle(every, totals, device) if single else self._of_several(starts, counts, tables, every)
        return InOneRow(torch.from_numpy(slots).to(device), reach, self._kernels)

    def _of_several(
        self,
        starts: Sequence[int],
        counts: Sequence[int],
        tables: Sequence[tuple[int, ...]],
        slots: Sequence[npt.NDArray[np.int64]],
    ) -> Reach:
        """`slots` are those of all positions of each sequence."""
        device = self._model.device
        one_by_one = OneByOne(tuple(starts), tuple(counts), tuple(_in_one_piece(table) for table in tables))
        if device.type != "cuda":
            return one_by_one
        totals = [len(of_sequence) for of_sequence in slots]
        borders = torch.tensor([[0, *accumulate(counts)], [0, *accumulate(totals)]], dtype=torch.int32, device=device)
        seen = torch.from_numpy(np.concatenate(slots)).to(device) if any(starts) else None
        return Ragged(borders, seen, (max(counts), max(totals)), one_by_one)


def _in_one_piece(table: tuple[int, ...]) -> Blocks:
    whole = range(table[0], table[0] + len(table))
    return whole if table == tuple(whole) else table


def _slots(table: tuple[int, ...], size: int, total: int) -> npt.NDArray[np.int64]:
    """Where in the flattened pages the first `total` positions of a sequence are."""
    return (np.array(table, dtype=np.int64)[:, None] * size + np.arange(size)).ravel()[:total]


def _rectangle(slots: Sequence[npt.NDArray[np.int64]], totals: Sequence[int], device: torch.device) -> Rectangle:
    rows = np.zeros((len(totals), max(totals)), dtype=np.int64)
    for row, of_sequence in zip(rows, slots, strict=True):
        row[: len(of_sequence)] = of_sequence
    distance = np.array(totals)[:, None] - 1 - np.arange(max(totals))
    return Rectangle(torch.from_numpy(rows.ravel()).to(device), torch.from_numpy(distance).to(device))


@contextmanager
def paged_model(model: PreTrainedModel, layers: Sequence[torch.nn.Module], cache: KVPages) -> Iterator[None]:
    """`model` attends through the paged cache inside: each attention module has its layer's pages."""
    configured = str(model.config._attn_implementation)
    for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
        setattr(layer, KEY_PAGES, keys)
        setattr(layer, VALUE_PAGES, values)
    model.set_attn_implementation(install_attention("paged", paged_attention))
    try:
        yield
    finally:
        model.set_attn_implementation(configured)
        for layer in layers:
            delattr(layer, KEY_PAGES)
            delattr(layer, VALUE_PAGES)
