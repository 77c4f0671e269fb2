"""The registered metrics."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from truthgpt.factories.metrics import METRICS


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "ab": 1, "gap": 9}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_names() -> None:
    assert {"loss", "ppl", "bits_per_byte"} <= set(METRICS.names())


@pytest.mark.parametrize("name", ["loss", "ppl", "bits_per_byte"])
def test_a_metric_is_called_as_registered(name: str) -> None:
    metric = METRICS.build(name, {}, tokenizer=tokenizer())
    assert metric.name == name
    assert METRICS.entry(name).probe().available
    assert METRICS.entry(name).summary


def test_bits_per_byte_knows_every_id_of_a_vocabulary_with_gaps() -> None:
    import torch

    from truthgpt.metrics.base import EvalBatch

    metric = METRICS.build("bits_per_byte", {}, tokenizer=tokenizer())
    metric.update(EvalBatch(torch.tensor(1.0), torch.tensor(1), torch.tensor([[9]]), lambda: torch.zeros(1, 1, 10)))
    assert metric.compute() == pytest.approx(1.4426950408889634 / 3)
