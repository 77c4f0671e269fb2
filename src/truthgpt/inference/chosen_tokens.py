"""Tokens that were chosen on the device, on their way to the host while the device goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from truthgpt.inference.token_sequence import TokenSequence


class ChosenTokens:
    """The next token of each of `sequences`.

    Args:
        tokens: int64 `(B,)`.
    """

    def __init__(self, sequences: Sequence[TokenSequence], tokens: torch.Tensor) -> None:
        self.sequences = sequences
        self.tokens = tokens
        self._host, self._arrived = tokens, None
        if tokens.is_cuda:
            self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> list[int]:
        """The tokens; waits for what was asked of the device before they were chosen, and for nothing later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        ids: list[int] = self._host.tolist()
        return ids
