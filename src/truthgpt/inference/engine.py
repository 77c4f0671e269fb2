"""Writes many answers at once: requests come and go at every step (continuous batching, Yu et al. 2022).

A step runs at most two forward passes: prompts, as many of their tokens as the budget allows, and one new token of
every answer that has begun. When the cache is full, the request that came last gives its blocks back and is computed
again later; its text stays what it was, since its random numbers depend on nothing but itself.
"""

from __future__ import annotations

import logging
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from truthgpt.errors import ConfigError
from truthgpt.inference.chosen_tokens import ChosenTokens
from truthgpt.inference.request import FinishReason, Piece, Sampling
from truthgpt.inference.runner import Runner, Work
from truthgpt.inference.sampling import NO_TOKEN, sample
from truthgpt.inference.stop_tokens import stop_token_ids
from truthgpt.inference.text_stream import TextStream
from truthgpt.inference.token_sequence import TokenSequence
from truthgpt.kv_cache.blocks import OutOfBlocks

logger = logging.getLogger(__name__)

_Twins = tuple[TokenSequence, TokenSequence]
"""Two with the same tokens: the first is run, and the second goes on from there."""


@dataclass(frozen=True)
class EngineLimits:
    """How much is done at once.

    Args:
        sequences: answers that are written at the same time.
        prompt_tokens: tokens of prompts a step, over all requests: answers wait for them.
    """

    sequences: int = 256
    prompt_tokens: int = 8192


@dataclass(frozen=True)
class EngineLoad:
    """Requests that are answered and that wait, and positions of the cache in all and in use (0: no cache)."""

    running: int
    waiting: int
    cache_tokens: int
    cache_used_tokens: int


class Engine:
    """Answers requests, a token of each a step. Not for several threads at once.

    Args:
        model: in evaluation mode, set up for `runner`.
        tokenizer: the tokenizer it was trained with.
        runner: runs it.
        model_name: what the model is called.
        streaming: every piece has the text of its tokens; otherwise the last one has it all, which is much less work.

    Attributes:
        context_tokens: positions the model has; None: no limit is known.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        runner: Runner,
        limits: EngineLimits,
        model_name: str = "",
        streaming: bool = False,
    ) -> None:
        self.model_name = model_name
        self.context_tokens = context_tokens(model)
        self._tokenizer = tokenizer
        self._runner = runner
        self._limits = limits
        self._streaming = streaming
        self._vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self._stop_ids = frozenset(stop_token_ids(model, tokenizer))
        self._next_id = 0
        self._cancelling = False
        self._chosen: ChosenTokens | None = None  # by the last pass, and not looked at yet
        self._waiting: deque[TokenSequence] = deque()  # both in the order they were asked for
        self._running: list[TokenSequence] = []

    def submit(self, prompt_ids: Sequence[int], sampling: Sampling) -> int:
        """Ask for an answer; returns the id that its pieces carry.

        Raises:
            ConfigError: an empty prompt, one longer than the model's context or the cache, or a token that is not the
                model's.
        """
        self._check(prompt_ids)
        limit = sampling.max_new_tokens
        if self.context_tokens is not None:
            limit = min(limit, self.context_tokens + 1 - len(prompt_ids))
        needed = len(prompt_ids) + limit - 1  # the last token's keys and values are never needed
        if 0 < self._runner.positions < needed:
            raise ConfigError(
                f"the prompt of {len(prompt_ids)} tokens and {limit} new ones need {needed} positions of the cache, "
                f"which has {self._runner.positions}: ask for fewer new tokens, or give the cache more memory"
            )
        stream = TextStream(self._tokenizer, prompt_ids, sampling.stop)
        sequence = TokenSequence(list(prompt_ids), self._next_id, sampling, len(prompt_ids), limit, stream)
        self._next_id += 1
        self._waiting.append(sequence)
        return sequence.request_id

    def cancel(self, request_id: int) -> None:
        """Break off a request; one that is unknown or answered is ignored."""
        for sequence in (*self._running, *self._waiting):
            if sequence.request_id == request_id:
                sequence.cancelled = self._cancelling = True

    @property
    def has_work(self) -> bool:
        """Whether any request is not answered yet."""
        return bool(self._waiting or self._running)

    def load(self) -> EngineLoad:
        """What is being done now."""
        runner = self._runner
        return EngineLoad(len(self._running), len(self._waiting), runner.positions, runner.used_positions)

    def step(self) -> list[Piece]:
        """Read prompts, and write one token of every answer that has begun; what came of it."""
        ahead = self._run_ahead()
        pieces = self._collect(self._chosen)  # while the device works on what comes after
        self._chosen = ahead
        if ahead is not None:
            return pieces
        pieces += self._drop_cancelled()
        decoding = [s for s in self._running if s.pending == 1]
        pieces += self._collect(self._advance(*self._prompts_in_budget()))
        self._chosen = self._advance(self._with_room(decoding))
        if not self._runner.runs_ahead:
            pieces += self._collect(self._chosen)
            self._chosen = None
        return pieces

    def abandon(self) -> None:
        """Forget all requests, for example after an error in a step."""
        self._chosen = None
        for sequence in list(self._running):
            self._dismiss(sequence)
        self._waiting.clear()

    def _check(self, prompt_ids: Sequence[int]) -> None:
        if not prompt_ids:
            raise ConfigError("the prompt is empty: give one token at least")
        if self.context_tokens is not None and len(prompt_ids) > self.context_tokens:
            raise ConfigError(
                f"the prompt has {len(prompt_ids)} tokens, the model's context {self.context_tokens}: shorten it"
            )
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self._vocab_size:
            bad = next(token for token in prompt_ids if not 0 <= token < self._vocab_size)
            raise ConfigError(
                f"token id {bad} is not in the model's vocabulary of {self._vocab_size}; use the tokenizer the model "
                "was trained with"
            )

    def _drop_cancelled(self) -> list[Piece]:
        cancelled = [s for s in (*self._running, *self._waiting) if s.cancelled] if self._cancelling else []
        self._cancelling = False
        for sequence in cancelled:
            if sequence.running:
                self._dismiss(sequence)
            else:
                self._waiting.remove(sequence)
        return [Piece(s.request_id, (), self._last_text(s), "cancelled") for s in cancelled]

    def _prompts_in_budget(self) -> tuple[list[tuple[TokenSequence, int]], list[_Twins]]:
        """The tokens of prompts that this step runs: those that have begun first, then new ones while there is room.
        Beside them, the sequences that one of these serves as well."""
        budget = self._limits.prompt_tokens
        work: list[tuple[TokenSequence, int]] = []
        later: list[TokenSequence] = []
        for sequence in [s for s in self._running if s.pending > 1]:
            if budget > 0 and self._reserved(sequence, count := self._part(sequence, budget)):
                work.append((sequence, count))
                budget -= count
        twins: list[_Twins] = []
        # With budget left, all of them are run to their end.
        leaders = {tuple(sequence.tokens): sequence for sequence, _ in work} if self._runner.shared_tokens else {}
        while budget > 0 and self._waiting and len(self._running) + len(later) + len(twins) < self._limits.sequences:
            sequence = self._waiting.popleft()
            leader = leaders.get(tuple(sequence.tokens))
            if leader is not None:
                twins.append((leader, sequence))
                continue
            self._runner.start(sequence)
            if self._shares_soon(sequence, work):
                self._runner.release(sequence)
                later.append(sequence)
                continue
            count = self._part(sequence, budget)
            if not self._reserved(sequence, count):
                self._runner.release(sequence)
                self._waiting.appendleft(sequence)
                break
            self._admit(sequence)
            work.append((sequence, count))
            budget -= count
            if self._runner.shared_tokens:
                leaders[tuple(sequence.tokens)] = sequence
        self._waiting.extendleft(reversed(later))
        return work, twins

    def _admit(self, sequence: TokenSequence) -> None:
        insort(self._running, sequence, key=_id)
        sequence.running = True

    def _part(self, sequence: TokenSequence, budget: int) -> int:
        return sequence.pending if self._runner.whole_prompts else min(sequence.pending, budget)

    def _shares_soon(self, sequence: TokenSequence, work: Work) -> bool:
        """Whether `work` computes the next block of `sequence`, which then finds it in the next step."""
        begin = sequence.computed
        end = begin + self._runner.shared_tokens
        if begin == end or end >= len(sequence.tokens):  # the last token is computed in any case
            return False
        block, past = sequence.tokens[begin:end], sequence.tokens[:begin]
        # A prompt that is run in part takes the whole budget: whoever comes after it waits in any case.
        return any(other.tokens[begin:end] == block and other.tokens[:begin] == past for other, _ in work)

    def _reserved(self, sequence: TokenSequence, count: int) -> bool:
        try:
            self._runner.reserve(sequence, count)
        except OutOfBlocks:
            return False
        return True

    def _with_room(self, sequences: list[TokenSequence]) -> list[tuple[TokenSequence, int]]:
        """One token each; who came last makes room for who came first."""
        work = []
        for sequence in sequences:
            while sequence.running and not self._reserved(sequence, 1):
                self._preempt(self._running[-1])
            if sequence.running:
                work.append((sequence, 1))
        return work

    def _preempt(self, sequence: TokenSequence) -> None:
        self._dismiss(sequence)
        insort(self._waiting, sequence, key=_id)

    def _dismiss(self, sequence: TokenSequence) -> None:
        self._running.remove(sequence)
        self._runner.release(sequence)
        sequence.running = False

    def _run_ahead(self) -> ChosenTokens | None:
        """Start the pass behind tokens that the host has not seen yet; None: something has to be decided before.

        A sequence that turns out to have ended has run one token too many, which nobody reads.
        """
        before = self._chosen
        if before is None or self._cancelling or sum(s.running for s in before.sequences) < len(self._running):
            return None
        goes_on = [(row, s) for row, s in enumerate(before.sequences) if s.running and s.written + 1 < s.limit]
        if not goes_on or (self._waiting and len(goes_on) < self._limits.sequences):
            return None
        rows, sequences = [row for row, _ in goes_on], [s for _, s in goes_on]
        if any(s.sampling.repetition_penalty != 1 for s in sequences):
            return None
        if not all(self._reserved(s, 1) for s in sequences):
            return None
        logits = self._runner.run_ahead(sequences, before.tokens, rows)
        tokens = sample(
            logits, [s.sampling for s in sequences], [s.written + 1 for s in sequences], [s.tokens for s in sequences]
        )
        return ChosenTokens(sequences, tokens)

    def _advance(self, work: list[tuple[TokenSequence, int]], twins: Sequence[_Twins] = ()) -> ChosenTokens | None:
        """Run `work`, and choose a token for every sequence of which nothing is left to run, and for its twins."""
        if not work:
            return None
        logits = self._runner.run(work)
        rows = [row for row, (sequence, _) in enumerate(work) if sequence.pending == 0]
        if not rows:
            return None
        chosen = [work[row][0] for row in rows]
        for leader, twin in twins:
            self._runner.fork(leader, twin)
            self._admit(twin)
            rows.append(rows[chosen.index(leader)])
            chosen.append(twin)
        if twins or len(rows) < len(work):
            logits = logits[torch.tensor(rows, device=logits.device)]
        tokens = sample(logits, [s.sampling for s in chosen], [s.written for s in chosen], [s.tokens for s in chosen])
        return ChosenTokens(chosen, tokens)

    def _collect(self, chosen: ChosenTokens | None) -> list[Piece]:
        if chosen is None:
            return []
        pairs = zip(chosen.sequences, chosen.wait(), strict=True)
        return [self._write(sequence, token) for sequence, token in pairs if sequence.running]

    def _write(self, sequence: TokenSequence, token: int) -> Piece:
        if token == NO_TOKEN:
            logger.error("request %d: the model's logits are not finite; its answer ends", sequence.request_id)
            self._dismiss(sequence)
            return Piece(sequence.request_id, (), self._last_text(sequence), "error")
        sequence.tokens.append(token)
        text = sequence.stream.push([token]) if self._streams(sequence) else ""
        finish: FinishReason | None = sequence.finish_reason(self._stop_ids)
        if finish is not None:
            text += self._last_text(sequence)
            self._dismiss(sequence)
        return Piece(sequence.request_id, (token,), text, finish)

    def _streams(self, sequence: TokenSequence) -> bool:
        """Whether its text is made token by token: a stop text has to be seen when it is there."""
        return self._streaming or bool(sequence.sampling.stop)

    def _last_text(self, sequence: TokenSequence) -> str:
        """What has not been given out of an answer that ends."""
        text = "" if self._streams(sequence) else sequence.stream.push(sequence.tokens[sequence.prompt_tokens :])
        return text + sequence.stream.finish()


def _id(sequence: TokenSequence) -> int:
    return sequence.request_id


def context_tokens(model: PreTrainedModel) -> int | None:
    """Positions the model has; None where its configuration sets no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)
