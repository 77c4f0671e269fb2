"""A plugin for tests: attention that breaks at the call of `FAIL_AT_CALL`, and an attention of ten lines that does not.

Every layer of every micro-batch is one call, in training and in evaluation.
"""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import torch
from tests.plugins.reference_attention import reference_attention

from truthgpt.factories.attention import ATTENTION_BACKENDS


def _failing(fail: Any) -> Any:
    calls = itertools.count()

    def attention(module: torch.nn.Module, *tensors: Any, **keywords: Any) -> tuple[torch.Tensor, None]:
        output, _ = reference_attention(module, *tensors, **keywords)
        return (fail(output) if next(calls) >= int(os.environ.get("FAIL_AT_CALL", "0")) else output), None

    return attention


def _out_of_memory(output: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nThe rest of torch's message")


def _nan_gradient(output: torch.Tensor) -> torch.Tensor:
    return output + (output * 0).sqrt()


@ATTENTION_BACKENDS.register("plain")
def build_plain() -> Any:
    """Works."""
    return reference_attention


@ATTENTION_BACKENDS.register("out_of_memory")
def build_out_of_memory() -> Any:
    """Raises torch's error."""
    return _failing(_out_of_memory)


@ATTENTION_BACKENDS.register("nan")
def build_nan() -> Any:
    """Gives NaN."""
    return _failing(lambda output: output * math.nan)


@ATTENTION_BACKENDS.register("nan_gradient")
def build_nan_gradient() -> Any:
    """Gives the right values and a NaN gradient."""
    return _failing(_nan_gradient)
